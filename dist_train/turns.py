"""In which order several schedulers of one optimizer were stepped, from their counts alone.

Invariant: each has as many turns as it has steps. What a step does is `schedule`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import merge
from itertools import repeat
from operator import itemgetter


def in_turn(counts: Mapping[str, float]) -> Iterator[str]:
    """The places in the order of their steps: what one makes of a rate depends on what another has made of it before.

    Equally often stepped ones take turns. Of different counts the largest is the clock, and a rarer one is taken to be
    stepped after every n-th of its steps (once an epoch), n being the largest that gives its count; else evenly.
    """
    whole = {place: 1 if isinstance(count, float) else count for place, count in counts.items()}
    most = max(whole.values(), default=0)
    often_first = sorted((place for place in whole if whole[place]), key=lambda place: -whole[place])
    turns = (zip(_times(whole[place], most), repeat(place)) for place in often_first)
    return (place for _, place in merge(*turns, key=itemgetter(0)))


def _times(count: int, most: int) -> Iterator[int]:
    """After which of the most frequent scheduler's steps each step of one is taken."""
    every = most // count
    regular = most // every == count
    return (number * every if regular else number * most // count for number in range(1, count + 1))
