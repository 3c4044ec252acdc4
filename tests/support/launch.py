"""Starts training scripts in processes of their own, under a deadline, and ends them by their own id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a launched command ended."""

    returncode: int
    output: str

    def require_success(self) -> Outcome:
        assert self.returncode == 0, f"exit code {self.returncode}:\n{self.output[-6000:]}"
        return self


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of this process, without what a surrounding launcher may have put in."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launched and "TORCHELASTIC" not in key}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(extra or {})}


def run_command(command: Sequence[str], *, deadline_seconds: float, extra: Mapping[str, str] | None = None) -> Outcome:
    """Runs a command in a session of its own; past the deadline all of it is killed and the test fails."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:  # a pipe would wait for orphans that hold it
        process = subprocess.Popen(
            command,
            env=environment(extra),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            process.wait(timeout=deadline_seconds)
        except subprocess.TimeoutExpired:
            said = f"still running after {deadline_seconds} s: {' '.join(command)}\n{_written(output)[-6000:]}"
            raise AssertionError(said) from None
        finally:
            end_session(process)
        return Outcome(process.returncode, _written(output))


def _written(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def end_session(process: subprocess.Popen[str]) -> None:
    """Kills a process, what is left of its session and all its descendants: torchrun gives each worker a session."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def torchrun(world_size: int, *script: str, max_restarts: int = 0) -> list[str]:
    """Command line of plain torchrun on this machine, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return [*launcher, "--max-restarts", str(max_restarts), *script]


def run_again_until_done(
    command: Sequence[str], *, deadline_seconds: float, extra: Mapping[str, str], most_lives: int = 60
) -> list[Outcome]:
    """What a person does by hand: the same command, until it ends well."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + deadline_seconds
    while not outcomes or outcomes[-1].returncode != 0:
        assert len(outcomes) < most_lives, f"{most_lives} lives were not enough:\n{outcomes[-1].output[-6000:]}"
        outcomes.append(run_command(command, deadline_seconds=end - time.monotonic(), extra=extra))
    return outcomes
