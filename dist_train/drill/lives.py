"""One life of a drilled command: started in a session of its own, watched, and ended with all that it started.

Invariant: it never outlives `Life.end`, nor its patience: what is stopped or stuck is killed. What it says goes to a
file. Processes are ended by their own ids.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

POLL_SECONDS: Final = 0.05
_REAP_SECONDS: Final = 20.0
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a life ended."""

    code: int
    """Exit code; negative, the signal."""
    given_up: bool
    """It did nothing more and was killed."""
    seconds: float


def run_life(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    patience: Callable[[], float],
    activity: Callable[[], object],
    on_poll: Callable[[], None],
) -> Ended:
    """Runs a command to its end, or until nothing has changed for too long.

    Args:
        patience: seconds without any change after which it is given up, asked again and again.
        activity: a value that changes while something happens.
        on_poll: called a few times a second.
    """
    given_up, seen = False, activity()
    started = changed = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=_environment(environment), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while process.poll() is None:
            on_poll()
            if (now := activity()) != seen:
                seen, changed = now, time.monotonic()
            if time.monotonic() - changed > patience():
                given_up = True
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=POLL_SECONDS)
    finally:
        end_session(process)
    return Ended(code=process.returncode, given_up=given_up, seconds=time.monotonic() - started)


def command_of(script: Sequence[str], processes: int) -> list[str]:
    """The victim's command line, under our launcher where there are several ranks; it is the drill that restarts."""
    victim = ["-m", "dist_train.drill.victim", *script]
    if processes == 1:
        return [sys.executable, *victim]
    launcher = [sys.executable, "-m", "dist_train.cli", "launch", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "--max-restarts", "0", *victim]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Of this process, without what a surrounding launcher may have put in."""
    kept = {key: value for key, value in os.environ.items() if key not in _LAUNCHED and "TORCHELASTIC" not in key}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, what is left of its session and all its descendants: a launcher gives each worker a session."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait(timeout=_REAP_SECONDS)
