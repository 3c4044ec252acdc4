"""Every exception of the package, why a run stopped, and the exit codes.

Invariant: a message says what failed, which path, step and rank, what was expected and found, and what to do next.
Expected ends of a run (done, early stopped, preempted ...) are a `StopReason`, not an exception.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class DistTrainError(Exception):
    """Base of all errors that the package raises on purpose."""


class ConfigError(DistTrainError, ValueError):
    """A setting or an argument that cannot work; raised before anything is touched."""


class CheckpointError(DistTrainError):
    """A checkpoint that cannot be used; `path` names it."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class CorruptCheckpointError(CheckpointError):
    """In place, but its bytes are not those that were committed (or a file is missing)."""


class FormatVersionError(CheckpointError):
    """Written by a format that this version does not know; never renamed or deleted."""


class StateMismatchError(CheckpointError):
    """The checkpoint and the live objects differ in names, shapes or dtypes; `hint` says how to load what fits."""

    def __init__(self, message: str, path: str = "", hint: str = "") -> None:
        super().__init__(message, path)
        self.hint = hint


class UnsaveableStateError(DistTrainError, TypeError):
    """A live object holds something that tensors and JSON cannot hold; the message names it."""


class NoCheckpointError(DistTrainError, FileNotFoundError):
    """A checkpoint was required and there is none."""


class SaveFailedError(DistTrainError):
    """Saves failed as many times in a row as `max_failed_saves` allows."""


class StorageError(DistTrainError, OSError):
    """The run directory cannot be used: not writable, not shared between the nodes, no space."""


class RunInUseError(DistTrainError):
    """Another launch that shows life owns the run directory, or a newer attempt has taken it over."""


class LauncherLostError(DistTrainError):
    """The launcher (torchrun's agent) died and left its workers behind, or its store cannot be reached any more."""


class DeadlineError(DistTrainError, TimeoutError):
    """A wait ended without an answer; says what was waited for, on which rank."""


class DisagreementError(DistTrainError):
    """Ranks hold different values of what must be one truth."""


class StopReason(StrEnum):
    """Why a run ended; `Run.reason`, `TrainResult.status` and `status.json`."""

    DONE = "done"
    EARLY_STOPPED = "early_stopped"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    INTERRUPTED = "interrupted"
    DIVERGED = "diverged"
    ERROR = "error"


class ExitCode(IntEnum):
    """What the process tells the launcher."""

    OK = 0
    ERROR = 1
    USAGE = 2
    REQUEUE = 75
    DO_NOT_REQUEUE = 93
    INTERRUPTED = 130


EXIT_CODES: dict[StopReason, ExitCode] = {
    StopReason.DONE: ExitCode.OK,
    StopReason.EARLY_STOPPED: ExitCode.OK,
    StopReason.PREEMPTED: ExitCode.OK,
    StopReason.TIME_LIMIT: ExitCode.OK,
    StopReason.INTERRUPTED: ExitCode.INTERRUPTED,
    StopReason.DIVERGED: ExitCode.DO_NOT_REQUEUE,
    StopReason.ERROR: ExitCode.ERROR,
}
