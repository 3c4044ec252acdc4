"""An evaluation that a signal cuts short: when it may be cut, and what is put back, as if it had not begun.

    epoch's last update | evaluation: batches, cut by a rank that was told to leave | end_epoch: the ranks agree on it
                        '- EvaluationStart: random generators, schedules -------------- put back -> saved as pending

Invariant: ranks that wait for each other between two batches of an evaluation are not parted: such an evaluation is
not cut. That they do may show late (a collective each hundredth batch): where there are several ranks, one cuts only
what it has seen whole before, never the first evaluation of a process. What an evaluation changes besides (weights,
registered objects) is the loop's to leave alone until `run.end_epoch`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from dist_train.rng import capture_rng, restore_rng
from dist_train.state import LiveState
from dist_train.world import count_collectives

Json = Any


class EvaluationStart:
    """What stood where when the epoch's last update was in."""

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._rng = capture_rng()
        self._schedules = {name: copy.deepcopy(one.state_dict()) for name, one in live.schedulers.items()}
        self._rates = {name: _settings(one) for name, one in live.every_optimizer.items()}

    def put_back(self) -> None:
        """ReduceLROnPlateau was perhaps told of half an evaluation, and random numbers were drawn for it."""
        for name, state in self._schedules.items():
            self._live.schedulers[name].load_state_dict(state)
        for name, groups in self._rates.items():
            for group, settings in zip(self._live.every_optimizer[name].param_groups, groups, strict=True):
                group.update(settings)
        restore_rng(self._rng)


def _settings(optimizer: Any) -> list[dict[str, Json]]:
    """Of each parameter group; a learning rate that is a tensor is copied."""
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


class Cut:
    """Whether the evaluation in progress ends early on this rank.

    Args:
        several: whether there are other ranks, which this one must not be parted from.
    """

    def __init__(self, *, several: bool) -> None:
        self.start: EvaluationStart | None = None
        """Set where an epoch's training has ended."""
        self.is_made = False
        """This rank's evaluation did end early."""
        self._waits_for_others = False
        self._loaders_begun = 0
        self._loaders_seen = 0 if several else math.inf
        """So many loaders of one evaluation were gone through until the loop was done with them."""

    def begin(self, start: EvaluationStart) -> None:
        self.start, self.is_made, self._loaders_begun = start, False, 0

    def end(self) -> None:
        self.start, self.is_made = None, False

    def watched(self, batches: Iterator[Any], is_told: Callable[[], bool]) -> Iterator[Any]:
        """Batches of an evaluation, the first of them in any case: nobody must reduce nothing."""
        if self.start is None:
            yield from batches
            return
        before = count_collectives()
        self._loaders_begun += 1
        number = self._loaders_begun
        try:
            for index, batch in enumerate(batches):
                if index and self.start is not None:
                    self._note_collectives(before)
                    if number <= self._loaders_seen and not self._waits_for_others and is_told():
                        self.is_made = True
                        return
                yield batch
        finally:
            if not self.is_made:
                self._note_collectives(before)
                self._loaders_seen = max(self._loaders_seen, number)

    def _note_collectives(self, before: int | None) -> None:
        self._waits_for_others |= before is None or count_collectives() != before
