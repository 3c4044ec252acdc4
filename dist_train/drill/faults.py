"""One fault: what is done, to which rank, and when. It travels as JSON and does nothing itself. [stdlib only]"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from dist_train.errors import ConfigError
from dist_train.phases import Phase, Point

Json = Any
Rank = int | Literal["all", "random"]

SIGNALS: Final = {"kill": "SIGKILL", "stop": "SIGSTOP", "terminate": "SIGTERM"}
"""Faults that are a signal: the first rank that is there sends it, to itself and to all if they are meant."""
KINDS: Final = (
    *SIGNALS,
    "terminate_launcher",
    "hang",
    "raise_error",
    "exit",
    "fail_io",
    "kill_data_worker",
    "corrupt_newest",
)
OF_THE_MAIN_RANK: Final = (Point.BEFORE_COMMIT, Point.AFTER_COMMIT, Point.RETENTION)
"""Only the main rank comes there; it sends another rank the signal that is meant for that moment."""
MOMENTS: Final = (*(str(phase) for phase in Phase), *(str(point) for point in Point))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Done once over all lives of a run."""

    number: int
    """Its place in the plan, from 0: what it is known by when it has fired."""
    kind: str
    rank: Rank
    at_phase: str = str(Point.STEP_DONE)
    """A `Phase` or a `Point`: it comes when that is entered or reached ..."""
    at_step: int = 0
    """... by a run that has done at least so many optimizer updates ..."""
    nth: int = 1
    """... for the nth time within one life; of `fail_io` the nth matching file operation."""
    seconds: float = 0.0
    """Of a hang."""
    code: int = 0
    """Of an exit; of `fail_io` the errno."""
    message: str = ""
    """Of a raised error."""
    operation: str = ""
    """Of `fail_io`: which kind of file operation (`write`, `fsync`, `rename` ...); any kind where it is empty."""
    path: str = ""
    """Of `fail_io`: a part of the path."""
    times: int = 1
    """Of `fail_io`: how many matching operations fail; 0, all that follow in that life."""

    def __post_init__(self) -> None:
        if self.at_phase not in MOMENTS:
            raise ConfigError(f"at_phase is {self.at_phase!r}; there are {', '.join(MOMENTS)}.")
        if self.nth < 1 or self.at_step < 0 or self.times < 0:
            raise ConfigError(f"{self.describe()}: nth counts from 1; at_step and times are 0 or more.")
        if not isinstance(self.rank, int) and self.rank not in ("all", "random"):
            raise ConfigError(f"rank is {self.rank!r}; give a rank, 'all' or 'random'.")

    def concerns(self, rank: int, world_size: int, seed: int) -> bool:
        """Whether that rank has to do with it; `random` is the same rank in every process and life."""
        if self.kind in SIGNALS and self.at_phase in OF_THE_MAIN_RANK:
            return rank == 0
        return rank in self.targets(world_size, seed)

    def targets(self, world_size: int, seed: int) -> Sequence[int]:
        """The ranks that it is done to."""
        if self.rank == "random":
            return [random.Random(f"{seed}-{self.number}").randrange(world_size)]
        return range(world_size) if self.rank == "all" else [self.rank]

    @property
    def is_done_by_each(self) -> bool:
        """Whether each of all ranks does it to itself; signals to all are sent by the first that is there."""
        return self.rank == "all" and self.kind not in (*SIGNALS, "corrupt_newest")

    def describe(self) -> str:
        """For people: `kill of rank 1 at writing from step 12`."""
        what = self.kind.replace("_", " ")
        whom = "all ranks" if self.rank == "all" else "a rank" if self.rank == "random" else f"rank {self.rank}"
        if self.kind == "fail_io":
            what = f"errno {self.code} from {self.operation or 'any operation'} on {self.path or 'any path'}"
            return f"{what} on {whom} from step {self.at_step}, number {self.nth}"
        where = "" if self.at_phase == Point.STEP_DONE else f" at {self.at_phase}"
        since = f" {'at' if not where else 'from'} step {self.at_step}" if self.at_step or not where else ""
        return f"{what} of {whom}{where}{since}{f', time {self.nth}' if self.nth > 1 else ''}"

    def to_json(self) -> dict[str, Json]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Json]) -> Fault:
        return Fault(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A fault that came, noted durably before it was done."""

    number: int
    kind: str
    rank: int
    """Which did it."""
    attempt: int
    """Of the run; 0 before it was entered."""
    global_step: int
    phase: str
    at: float
    """Unix time."""
