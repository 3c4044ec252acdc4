"""Sends a signal, or hangs, at a certain moment of training, once, and notes that it did.

signalled.py SCRIPT ARGS...      runs a script with the plan of the environment variable SIGNALLED armed
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "SIGNALLED"


@dataclass(frozen=True)
class SignalPlan:
    """What is sent to whom, when, by which rank."""

    note: str
    """File that says that it was done."""
    signal: str = "SIGTERM"
    to: Literal["self", "launcher", "group"] = "self"
    rank: int = 0
    at: Literal["step", "evaluation"] = "step"
    count: int = 5
    """Micro-steps before it, or evaluations begun."""
    hanging_rank: int = -1
    """A rank that, from the same moment on, sleeps."""

    def to_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def has_fired(self) -> bool:
        return Path(self.note).exists()


def arm(plan: SignalPlan) -> None:
    rank, count = int(os.environ.get("RANK", "0")), 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == plan.count and rank == plan.hanging_rank:
            while True:
                time.sleep(0.1)
        if count == plan.count and rank == plan.rank:
            Path(plan.note).touch()
            _send(plan)

    if plan.has_fired:
        return
    _before_steps(tick) if plan.at == "step" else _in_evaluations(tick)


def _send(plan: SignalPlan) -> None:
    number = signal.Signals[plan.signal]
    if plan.to == "group":
        os.killpg(os.getpgid(0), number)
    else:
        os.kill(os.getpid() if plan.to == "self" else os.getppid(), number)


def _before_steps(tick: Callable[[], None]) -> None:
    from dist_train.run import Run

    step = Run.step

    def ticking_step(run: Any, loss: Any = None) -> None:
        tick()
        step(run, loss)

    Run.step = ticking_step  # type: ignore[method-assign]


def _in_evaluations(tick: Callable[[], None]) -> None:
    """With the first batch in hand."""
    from dist_train.feed import BatchFeed

    plain = BatchFeed.plain_batches

    def ticking(feed: Any, loader: Any, should_stop: Any) -> Iterator[Any]:
        for index, batch in enumerate(plain(feed, loader, should_stop)):
            if index == 0:
                tick()
            yield batch

    BatchFeed.plain_batches = ticking  # type: ignore[method-assign]


if __name__ == "__main__":
    if VARIABLE in os.environ:
        arm(SignalPlan(**json.loads(os.environ[VARIABLE])))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
