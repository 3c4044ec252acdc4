"""Devices as parameters of a test: the CPU runs everywhere, a GPU where there is one, and is skipped visibly elsewhere.

A test whose subject is the same on any device has a twin on the CPU, so that its own mistakes are found there.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, run_command

SCRIPT = str(ROOT / "tests/support/on_device.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 240.0


def on_gpu(*values: Any, **options: Any) -> Any:
    """A set of parameters that needs a GPU."""
    return pytest.param(*values, marks=pytest.mark.gpu, **options)


EACH_DEVICE = ["cpu", on_gpu("cuda")]


def live(device: str, arguments: list[str], plan: ChaosPlan | None = None, *, forks: bool = True) -> bool:
    """One life of the script to its end, or to the plan's next kill; whether it came to its end.

    Args:
        forks: not on a GPU: a process that was forked from a server that has looked for GPUs cannot use any.
    """
    extra = {} if plan is None else plan.to_environment()
    killed = 0 if plan is None else len(plan.fired())
    script = [SCRIPT] if plan is None else [CHAOS, SCRIPT]
    arguments = [*script[1:], "--device", device, *arguments]
    if forks and device == "cpu":
        try:
            run_script(1, script[0], *arguments, deadline_seconds=LIFE_SECONDS, extra=extra)
        except AssertionError as error:
            if plan is None or len(plan.fired()) == killed or "died without an answer" not in str(error):
                raise
            return False
        return True
    command = [sys.executable, script[0], *arguments]
    outcome = run_command(command, deadline_seconds=LIFE_SECONDS, extra={**extra, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    if plan is not None and len(plan.fired()) > killed:
        assert outcome.returncode == -signal.SIGKILL, outcome.output
        return False
    outcome.require_success()
    return True


def live_on(device: str, arguments: list[str], folder: Path, *, kills: int, seed: int, forks: bool = True) -> None:
    """Kills, and then a life to the end: of the same command each time."""
    plan = ChaosPlan(str(folder / "chaos"), seed, kills, most_micro_steps=16, most_operations=40)
    for life in range(kills + 1):
        assert live(device, arguments, plan, forks=forks) == (life == kills)
    assert len(plan.fired()) == kills
