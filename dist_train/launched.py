"""What a worker tells the launcher that started it, through a small file a rank.

    worker: note(committed_step=400) -> DIST_TRAIN_LAUNCH_DIR/rank-0.json -> launcher: read_notes(folder)

Invariant: a note is replaced whole, so that a reader sees the last one or the one before; where nobody asked for notes
nothing is written. They live as long as the worker group and are no part of the run: losing them loses no training.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from dist_train import errors
from dist_train.errors import EXIT_CODES, ExitCode, StopReason

Json = Any
LAUNCH_DIR = "DIST_TRAIN_LAUNCH_DIR"
"""Environment variable: folder for the notes of the worker group's present life; set by `dist-train launch`."""
LAUNCHER_PID = "DIST_TRAIN_LAUNCHER_PID"
"""Environment variable of a worker: the process it was forked from, whose death leaves it behind."""
WORKER_PID = "DIST_TRAIN_WORKER_PID"
"""Environment variable: the worker itself. What a worker starts inherits all variables and is no worker."""

PROGRESS_SECONDS = 0.25
"""Between notes of steps that committed nothing."""

_noted: dict[str, Json] = {}
_noting = threading.Lock()
_progress_at = 0.0


def by_dist_train() -> bool:
    """Whether `dist-train launch` started this process: it reads exit codes by their meaning."""
    return LAUNCH_DIR in os.environ


def is_worker() -> bool:
    """Whether this process is the worker that its environment speaks of, and not one that a worker has started."""
    here = str(os.getpid())
    return os.environ.get(WORKER_PID, here) == here


def by_elastic() -> bool:
    """Whether torchrun's agent did, or one that stands on it: it restarts on every exit code but 0."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def exit_code(reason: StopReason, *, requeue: bool = False) -> int:
    """What a run that ended so tells whoever started it.

    Plain torchrun restarts on every code but 0: there, what is to stay stopped is 0, and status.json says why. Not so
    an interruption: its agent was interrupted, too, and restarts nothing.

    Args:
        requeue: a run that only ran out of time ends with REQUEUE, for a scheduler that starts it again.
    """
    restarts_on_any = by_elastic() and not by_dist_train()
    if reason in (StopReason.PREEMPTED, StopReason.TIME_LIMIT) and requeue and not restarts_on_any:
        return int(ExitCode.REQUEUE)
    if reason is StopReason.DIVERGED and restarts_on_any:
        return int(ExitCode.OK)
    return int(EXIT_CODES[reason])


def note(**fields: Json) -> None:
    """Adds to this rank's note: begun, run_dir, attempt, global_step, committed_step, save_seconds, outcome, error."""
    folder = os.environ.get(LAUNCH_DIR)
    if folder is None or not is_worker() or all(_noted.get(key) == value for key, value in fields.items()):
        return
    rank = os.environ.get("RANK", "0")
    path = Path(folder, f"rank-{rank}.json")
    draft = path.with_suffix(".tmp")
    with _noting:  # commits are noted by the writer's thread
        _noted.update(fields)
        body = {**_noted, "pid": os.getpid(), "rank": int(rank), "at": time.time()}
        try:
            draft.write_text(json.dumps(body))
            draft.replace(path)
        except OSError:  # the launcher may have gone, with its folder; on a full disk an old note is worse than none
            for stale in (draft, path):
                with contextlib.suppress(OSError):
                    stale.unlink()


def forget_end() -> None:
    """A further run begins in this process: how the former one ended is no end of it."""
    for name in ("outcome", "error", "save_seconds"):
        _noted.pop(name, None)


def note_progress(global_step: int, committed_step: int, longest_seconds: float = 0.0) -> None:
    """Where the run stands: told at once when something was committed, else now and then.

    Args:
        longest_seconds: how long it may take until this rank can leave: its slowest step, or evaluation.
    """
    global _progress_at
    now = time.monotonic()
    if committed_step != _noted.get("committed_step") or now - _progress_at >= PROGRESS_SECONDS:
        _progress_at = now
        note(global_step=global_step, committed_step=committed_step, longest_seconds=longest_seconds)


def note_run(run_dir: str, **fields: Json) -> None:
    """A run is entered: the last of this process so far."""
    note(begun=True, run_dir=run_dir, run_dirs=[*_noted.get("run_dirs", []), run_dir], rolled_back_to=None, **fields)


def note_roll_back(step: int, **fields: Json) -> None:
    """The run has gone back to the checkpoint of a step by itself: step numbers go down."""
    former = _noted.get("rolled_back_to")
    note(committed_step=step, rolled_back_to=step if former is None else min(step, former), **fields)


def note_error(error: BaseException, *, secondary: bool = False) -> None:
    """Why this rank ends: whether it only lost the others, and whether another start could help."""
    note(
        error={
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "secondary": secondary or isinstance(error, (errors.DeadlineError, errors.LauncherLostError)),
            "final": isinstance(error, _FINAL) or (isinstance(error, SystemExit) and error.code == 2),
        }
    )


_FINAL = (
    errors.ConfigError,
    errors.StateMismatchError,
    errors.FormatVersionError,
    errors.UnsaveableStateError,
)
"""Mistakes of the script or its settings, recognised by the run: the next start would make them, too."""


def read_notes(folder: str | os.PathLike[str]) -> dict[int, dict[str, Json]]:
    """The notes of this node's ranks; a rank that said nothing is absent."""
    notes: dict[int, dict[str, Json]] = {}
    for path in Path(folder).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            notes[int(found["rank"])] = found
    return notes
