"""The specimen, with its own account of useful time: what each update and evaluation took, by another clock than the
ledger's.

soaked.py FOLDER OPTIONS OF THE SPECIMEN...      FOLDER/a000001.jsonl: useful seconds; FOLDER/pid-R: who is there
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


def keep_account(folder: Path) -> None:
    """Innermost around `run.batches`, `run.step` and `run.end_epoch`: from a batch in hand to its end."""
    from dist_train.run import Run

    batches, step, end_epoch = Run.batches, Run.step, Run.end_epoch
    since = writing = 0.0

    def note(run: Any) -> None:
        """What the writing of a line takes is the step's, too; the next line has it."""
        nonlocal writing
        if run.world.is_main:
            now = time.perf_counter()
            line = {"step": run.global_step, "seconds": now - since + writing}
            with (folder / f"a{run.attempt:06d}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            writing = time.perf_counter() - now

    def timed_batches(run: Any, loader: Any) -> Iterator[Any]:
        nonlocal since
        is_training = run._intake.is_training(loader)
        for batch in batches(run, loader):
            since = time.perf_counter() if is_training else since
            yield batch
        since = time.perf_counter() if is_training else since

    def timed_step(run: Any, loss: Any = None) -> None:
        note(run)
        step(run, loss)

    def timed_end_epoch(run: Any, **metrics: float) -> None:
        if run.epoch_is_complete and metrics:
            note(run)
        end_epoch(run, **metrics)

    Run.batches, Run.step, Run.end_epoch = timed_batches, timed_step, timed_end_epoch  # type: ignore[method-assign]


def useful_seconds(folder: Path, kept: dict[int, int]) -> float:
    """Of the updates that were kept: attempt -> the step up to which the run goes back to it."""
    total = 0.0
    for attempt, limit in kept.items():
        path = folder / f"a{attempt:06d}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        total += sum(line["seconds"] for line in lines if line["step"] < limit)
    return total


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    folder.mkdir(parents=True, exist_ok=True)
    own = psutil.Process()
    draft = folder / f"{os.getpid()}.tmp"
    draft.write_text(json.dumps([own.pid, own.create_time()]))
    draft.replace(folder / f"pid-{os.environ.get('RANK', '0')}")
    keep_account(folder)
    from tests.support.specimen import main

    sys.exit(main())
