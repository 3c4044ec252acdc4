"""One small vector at step boundaries, by which all ranks decide together: stop, save, time, failure.

Invariant: clocks are read on the main rank only; what a rank does at a step depends on agreed values alone. Where steps
are short the ranks agree every k-th step, so that agreeing takes under 1 % of the time; k is the main rank's choice
and is itself agreed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.errors import ConfigError, StopReason
from dist_train.world import World

Json = Any
MOST_SHARE = 0.01
MOST_STEPS = 64
_REASONS = list(StopReason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What holds on every rank."""

    stop: StopReason | None = None
    save_requested: bool = False
    time_is_up: bool = False
    failed: bool = False
    committed_step: int = -1
    signal: int = 0
    """The number of the signal that told a rank to leave."""


def strongest(*reasons: StopReason | None) -> StopReason | None:
    """What ranks that wish different ends agree on."""
    return max((one for one in reasons if one), key=_REASONS.index, default=None)


def require_alike(told: Mapping[str, Json], world: World, what: str) -> None:
    """Raises ConfigError on all ranks where settings differ by which they act together. Collective."""
    if world.world_size == 1:
        return
    if unlike := first_unlike(world.gather(dict(told), what)):
        raise ConfigError(
            f"The script says on each rank otherwise {what}: {unlike}, and ranks that part wait for each other for "
            f"ever. Give every rank the same settings: the run itself sees to it that only one of them writes what is "
            f"common."
        )


def first_unlike(rows: Sequence[Mapping[str, Json]]) -> str:
    """Where a rank's settings differ from the main rank's, for people; empty where none do."""
    first = rows[0]
    for rank, row in enumerate(rows):
        for name in (*first, *sorted(row.keys() - first.keys())):
            if row.get(name) != first.get(name):
                return f"{name} is {first.get(name)!r} on rank 0 and {row.get(name)!r} on rank {rank}"
    return ""


class Agreement:
    """Counts steps and exchanges the vector when it is due. `exchange` is collective."""

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world = world
        self._clock = clock
        self._interval = self._wanted = 1
        self._since = 0
        self._last: float | None = None

    @property
    def interval(self) -> int:
        """Steps between two exchanges, as agreed last."""
        return self._interval

    def is_due(self) -> bool:
        """Once a step boundary; equal on all ranks."""
        self._since += 1
        return self._since >= self._interval

    def exchange(self, mine: Agreed) -> Agreed:
        """The strongest wish of any rank."""
        started = self._clock()
        stop = _REASONS.index(mine.stop) + 1 if mine.stop else 0
        interval = self._wanted if self._world.is_main else 0
        vector = [stop, mine.save_requested, mine.time_is_up, mine.failed, mine.committed_step, interval, mine.signal]
        agreed = self._world.max(vector, "whether to save or stop")
        self._choose_interval(started, agreed[5])
        return Agreed(
            stop=_REASONS[agreed[0] - 1] if agreed[0] else None,
            save_requested=bool(agreed[1]),
            time_is_up=bool(agreed[2]),
            failed=bool(agreed[3]),
            committed_step=agreed[4],
            signal=agreed[6],
        )

    def _choose_interval(self, started: float, agreed: int) -> None:
        """All ranks use the agreed interval; the main rank measures which one it will propose next."""
        now = self._clock()
        steps, self._since = self._since, 0
        self._interval = max(agreed, 1)
        before, self._last = self._last, now
        if before is not None and steps and self._world.world_size > 1:
            step_seconds = max((started - before) / steps, 1e-9)
            wanted = round((now - started) / (MOST_SHARE * step_seconds))
            self._wanted = min(max(1, wanted), MOST_STEPS, 2 * self._interval)
