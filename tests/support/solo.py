"""A one-process run that takes a tenth of a second: for fault tests with many cases, and cheap to start as a script.

The specimen's model (BatchNorm, dropout), random augmentation and AdamW with a warm-up schedule, in a plain loop.

    solo.py --run-dir DIR [--pause SECONDS] [--resume HOW] [--updates N] [--max-failed-saves N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.data import data_loader
from dist_train.errors import StopReason
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.specimen import Augmented, build_model, build_optimizer, loss_fn

NUM_SAMPLES = 40
GLOBAL_BATCH = 8
UPDATES = 15
"""Three epochs of five updates."""
POLICY = CheckpointPolicy(every_steps=2, every_epochs=1, keep_last=3, keep_best=1)
# Saves: 2, 4, 5 (the epoch's end), 6, 8, 10, 12, 14, 15.


@dataclass(frozen=True)
class Ended:
    """How a run ended, and what it printed."""

    run: Run
    output: str


def train(
    run_dir: str | Path,
    *,
    resume: str = "auto",
    policy: CheckpointPolicy = POLICY,
    on_step: Callable[[Run], None] = lambda run: None,
    model: torch.nn.Module | None = None,
    lr: float = 1e-2,
    epochs: int = 3,
    **options: Any,
) -> Run:
    """Trains three epochs or so many, from where the run directory stands; `on_step` is called after each update."""
    model = build_model() if model is None else model
    optimizer, scheduler = build_optimizer(model, lr)
    loader = data_loader(Augmented(NUM_SAMPLES), global_batch_size=GLOBAL_BATCH, seed=3)
    told = RunOptions(log_every_steps=1, **options)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with Run(str(run_dir), **parts, policy=policy, resume=resume, options=told) as run:
        for _ in run.epochs(epochs):
            model.train()
            for batch in run.batches(loader):
                loss, _, _ = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.step(loss=loss)
                on_step(run)
            if run.epoch_is_complete:
                run.end_epoch(val=run.global_step / 7)
    return run


def train_quietly(run_dir: str | Path, **arguments: Any) -> Ended:
    """As `train`; what the run says is returned."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        run = train(run_dir, **arguments)
    return Ended(run, output.getvalue())


class LeaveError(Exception):
    """Ends a loop from outside, as a bug in a notebook cell would."""


def leave_at(step: int) -> Callable[[Run], None]:
    """An `on_step` that raises after that update."""

    def leave(run: Run) -> None:
        if run.global_step == step:
            raise LeaveError(f"left at step {step}")

    return leave


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--max-failed-saves", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep after each update but the first 4")
    args = parser.parse_args()
    policy = CheckpointPolicy(every_steps=2, every_epochs=1, max_failed_saves=args.max_failed_saves)

    def pause(run: Run) -> None:
        time.sleep(args.pause if run.global_step > 4 else 0)

    run = train(args.run_dir, resume=args.resume, max_steps=args.updates, policy=policy, on_step=pause)
    assert run.reason is StopReason.DONE
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
