"""The skip ledger: windows of a run that are taken from the loader and not trained on, and why. Pure.

Invariant: a window that stands in it stays in it over every restart; it is kept in each checkpoint and, from the
roll-back that has entered it until the next checkpoint, in `branch.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Json = Any
Unit = Literal["samples", "batches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The samples of one optimizer update."""

    epoch: int
    """0-based."""
    first: int
    """Place in the epoch's order, from 0."""
    last: int
    """The last one that belongs to it."""
    unit: Unit = "samples"
    """What is counted: samples over all ranks, or batches of each rank's own loader."""
    global_step: int
    """Updates done with this one."""

    def __str__(self) -> str:
        return f"{self.unit} {self.first + 1} to {self.last + 1} of epoch {self.epoch + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped(Window):
    """A window that a roll-back has left out."""

    kind: str
    """What was wrong: `not_finite` or `spike`."""
    back_to: int
    """The step of the checkpoint that the run went back to."""


class SkipLedger:
    """In the order in which they were entered."""

    def __init__(self) -> None:
        self.entries: list[Skipped] = []

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, one: Skipped) -> None:
        if one not in self.entries:
            self.entries.append(one)

    def covers(self, unit: Unit, epoch: int, first: int, stop: int) -> bool:
        """Whether a window, from `first` to before `stop`, holds anything that is to be left out."""
        return any(
            one.unit == unit and one.epoch == epoch and one.first < stop and first <= one.last for one in self.entries
        )

    @property
    def proved_step(self) -> int:
        """The run went back to it before, so it had proved good; -1 where it never did."""
        return max((one.back_to for one in self.entries), default=-1)

    def to_json(self) -> list[Json]:
        return [asdict(one) for one in self.entries]

    def replace(self, *sources: Iterable[Json]) -> None:
        """Takes over what a checkpoint and the record of the branch say."""
        self.entries = []
        for source in sources:
            for row in source:
                self.add(Skipped(**row))
