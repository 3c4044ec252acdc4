"""Agreement: one vector by which all ranks decide together, and how often it is worth its price."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from dist_train.agreement import MOST_STEPS, Agreed, Agreement, require_alike
from dist_train.errors import ConfigError, StopReason
from dist_train.world import SoloWorld


class OtherRanks(SoloWorld):
    """A world in which one more rank wishes something, and an exchange takes some time."""

    def __init__(self, clock: list[float], *, rank: int = 0, wish: Sequence[int] = (), seconds: float = 0.0) -> None:
        super().__init__()
        self.rank, self.world_size = rank, 2
        self.wish = list(wish)
        self.seconds = seconds
        self.clock = clock

    def max(self, values: Sequence[int], what: str) -> list[int]:
        self.clock[0] += self.seconds
        theirs = [*self.wish, *[0] * (len(values) - len(self.wish))] if self.wish else values
        return [max(pair) for pair in zip(values, theirs, strict=True)]


def exchange(mine: Agreed, wish: Sequence[int]) -> Agreed:
    return Agreement(OtherRanks([0.0], wish=wish)).exchange(mine)


def test_alone_a_rank_agrees_with_itself() -> None:
    mine = Agreed(stop=StopReason.PREEMPTED, save_requested=True, time_is_up=True, failed=True, committed_step=7)
    assert Agreement(SoloWorld()).exchange(mine) == mine
    assert Agreement(SoloWorld()).exchange(Agreed()) == Agreed()


@pytest.mark.parametrize("reason", list(StopReason))
def test_a_stop_of_any_rank_stops_all_with_its_reason(reason: StopReason) -> None:
    theirs = list(StopReason).index(reason) + 1
    assert exchange(Agreed(), [theirs, 0, 0, 0, -1, 0]).stop is reason


def test_every_wish_of_any_rank_counts_for_all() -> None:
    agreed = exchange(Agreed(committed_step=4), [0, 1, 1, 1, 3, 0, 15])
    assert agreed == Agreed(save_requested=True, time_is_up=True, failed=True, committed_step=4, signal=15)


def steps_until_due(agreement: Agreement) -> int:
    steps = 1
    while not agreement.is_due():
        steps += 1
        assert steps <= MOST_STEPS
    return steps


def train(agreement: Agreement, clock: list[float], step_seconds: float, exchanges: int) -> list[int]:
    """Steps between exchanges."""
    steps = []
    for _ in range(exchanges):
        steps.append(0)
        while True:
            clock[0] += step_seconds
            steps[-1] += 1
            if agreement.is_due():
                break
        agreement.exchange(Agreed())
    return steps


def test_long_steps_agree_every_time() -> None:
    clock = [0.0]
    agreement = Agreement(OtherRanks(clock, seconds=0.001), clock=lambda: clock[0])
    assert train(agreement, clock, step_seconds=1.0, exchanges=6) == [1] * 6


def test_short_steps_agree_as_often_as_one_percent_of_the_time_allows() -> None:
    clock = [0.0]
    agreement = Agreement(OtherRanks(clock, seconds=0.001), clock=lambda: clock[0])
    steps = train(agreement, clock, step_seconds=0.01, exchanges=12)
    assert steps[-1] == 10  # 1 ms of every 100 ms
    assert all(later <= 2 * max(earlier, 1) for earlier, later in pairwise(steps))


def test_very_short_steps_agree_at_least_every_so_many_steps() -> None:
    clock = [0.0]
    agreement = Agreement(OtherRanks(clock, seconds=0.1), clock=lambda: clock[0])
    assert train(agreement, clock, step_seconds=1e-4, exchanges=12)[-1] == MOST_STEPS


def test_steps_that_become_long_again_are_agreed_on_at_once() -> None:
    clock = [0.0]
    agreement = Agreement(OtherRanks(clock, seconds=0.001), clock=lambda: clock[0])
    train(agreement, clock, step_seconds=0.001, exchanges=10)
    assert train(agreement, clock, step_seconds=10.0, exchanges=3)[-1] == 1


def test_one_process_agrees_at_every_step_whatever_it_takes() -> None:
    clock = [0.0]
    agreement = Agreement(SoloWorld(), clock=lambda: clock[0])
    assert train(agreement, clock, step_seconds=1e-9, exchanges=5) == [1] * 5


def test_other_ranks_follow_the_main_ranks_interval_whatever_they_measure() -> None:
    clock = [0.0]
    world = OtherRanks(clock, rank=1, wish=[0, 0, 0, 0, -1, 5], seconds=0.1)
    agreement = Agreement(world, clock=lambda: clock[0])
    assert train(agreement, clock, step_seconds=1e-4, exchanges=4) == [1, 5, 5, 5]


def test_a_forced_exchange_begins_the_count_again() -> None:
    clock = [0.0]
    world = OtherRanks(clock, rank=1, wish=[0, 0, 0, 0, -1, 5])
    agreement = Agreement(world, clock=lambda: clock[0])
    agreement.exchange(Agreed())
    assert not agreement.is_due()
    agreement.exchange(Agreed())
    assert steps_until_due(agreement) == 5


class Others(SoloWorld):
    """A rank of two; the other tells what it is told to."""

    def __init__(self, other: dict[str, Any]) -> None:
        super().__init__()
        self.world_size, self.other = 2, other

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, self.other]


def test_settings_by_which_ranks_act_together_are_the_same_or_refused() -> None:
    mine = {"every_steps": 5, "max_steps": None}
    require_alike(mine, Others(dict(mine)), "when to save")
    told = r"on each rank otherwise when to save: max_steps is None on rank 0 and 7 on rank 1"
    with pytest.raises(ConfigError, match=told):
        require_alike(mine, Others({**mine, "max_steps": 7}), "when to save")
