"""Trains a large model for a few updates and reports its peaks of memory, as one JSON line.

    memory_run.py --run-dir DIR --megabytes N --updates N [--save]

Peaks are watched by a thread that reads /proc/self/status each few milliseconds, from before the model is built on:
RssAnon (what only this process has), RssShmem (the image of a save lies in shared memory) and RssFile (pages of mapped
files, which the kernel takes back at will), at the same moment each. VmHWM is the kernel's own peak of all three.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

import torch
from torch import nn

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.run import Run, RunOptions

PERIOD_SECONDS = 0.002


class Watch:
    """The highest sums that were seen, in kB."""

    def __init__(self) -> None:
        self.peaks = {"anon": 0, "anon_shmem": 0, "all": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            now = status()
            anon, shmem, file = now["RssAnon"], now["RssShmem"], now["RssFile"]
            for name, value in (("anon", anon), ("anon_shmem", anon + shmem), ("all", anon + shmem + file)):
                self.peaks[name] = max(self.peaks[name], value)

    def end(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return {**self.peaks, "hwm": status()["VmHWM"]}


def status() -> dict[str, int]:
    pairs = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(value.split()[0]) for key, value in pairs if key.startswith(("Rss", "VmRSS", "VmHWM"))}


def build(megabytes: int) -> nn.Module:
    """Layers of just below 1 MiB, hundreds of them, and one of a sixteenth of the whole, as an embedding is."""
    torch.manual_seed(0)
    large = nn.Linear(512, megabytes * 30, bias=False)
    return nn.Sequential(large, *(nn.Linear(512, 511) for _ in range(megabytes * 15 // 16)))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--save", action="store_true", help="save in the end; otherwise never")
    args = parser.parse_args()
    model = build(args.megabytes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    policy = CheckpointPolicy(every_epochs=1, at_end=args.save) if args.save else CheckpointPolicy(at_end=False)
    watch = Watch()
    with Run(args.run_dir, model=model, optimizer=optimizer, policy=policy, options=RunOptions()) as run:
        restored = status()
        first = run.global_step
        for _ in run.epochs(run.epochs_completed + 1):
            for _ in range(args.updates):
                loss = sum((parameter * parameter).sum() for parameter in model.parameters())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
            run.end_epoch()
    print(json.dumps({**watch.end(), "first_step": first, "restored_hwm": restored["VmHWM"]}))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
