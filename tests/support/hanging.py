"""A loop in which one rank hangs in a way of its own in each attempt, and that then finishes; run under torchrun.

    hanging.py --run-dir DIR --hang-timeout 3s [--hangs python:1:3 collective:0:6 ...]

`how:rank:step`: in the first attempt that gets there, and only in that. Every update is saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

import dist_train as dt
from tests.support.specimen import Augmented, build_model, build_optimizer


class Claims:
    """Which hangs were done already, over all attempts."""

    def __init__(self, folder: Path, hangs: list[str]) -> None:
        self._folder = folder
        self._hangs = [hang.split(":") for hang in hangs]

    def claim(self, rank: int, step: int) -> str:
        """How this rank is to hang now; "" for not at all."""
        for how, whose, when in self._hangs:
            marker = self._folder / f"done-{how}-{whose}-{when}"
            if int(whose) == rank and int(when) == step and not marker.exists():
                marker.touch()
                return how
        return ""


def stuck_in_python() -> None:
    while True:
        time.sleep(0.01)


def alone_in_a_collective() -> None:
    dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1], use_local_synchronization=True))


def holding_the_lock() -> None:
    """In C, and no other thread of Python runs."""
    import ctypes

    ctypes.PyDLL(None).sleep(600)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class NeverAnswers(Augmented):
    """A data set of which one sample never comes, when it is asked for in the attempt that claims it."""

    hangs = False

    def __getitem__(self, index: int) -> Any:
        while self.hangs:
            time.sleep(0.01)
        return super().__getitem__(index)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--hang-timeout", default="3s")
    parser.add_argument("--hangs", nargs="*", default=[])
    parser.add_argument("--slow", type=float, default=0.0, help="seconds of one step in the middle")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    given = parser.parse_args()
    dt.init_distributed()
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    claims = Claims(Path(given.run_dir).parent, given.hangs)
    data = NeverAnswers(noisy=False)
    loader = dt.data_loader(data, global_batch_size=24, micro_batch_size=12, shuffle=True, seed=7)
    plain = build_model()
    optimizer, scheduler = build_optimizer(plain)
    model, optimizer = accelerator.prepare(plain, optimizer)
    policy = dt.CheckpointPolicy(every_steps=1, keep_last=2)
    options = dt.RunOptions(hang_timeout=given.hang_timeout, max_steps=given.steps, log_every_steps=1)
    with dt.Run(
        given.run_dir, accelerator=accelerator, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader,
        policy=policy, options=options,
    ) as run:  # fmt: skip
        for _ in run.epochs(1000):
            for inputs, targets, _ in run.batches(loader):
                with accelerator.accumulate(model):
                    how = claims.claim(rank, run.global_step)
                    if how in WAYS:
                        WAYS[how]()
                    is_slow = run.global_step == given.steps // 2
                    time.sleep(given.slow if is_slow else given.step_seconds)
                    loss = torch.nn.functional.mse_loss(model(inputs).squeeze(1), targets)
                    accelerator.backward(loss * run.loss_weight)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    scheduler.step()
                data.hangs = how == "data"
                run.step(loss=loss.detach())


WAYS = {
    "python": stuck_in_python,
    "collective": alone_in_a_collective,
    "lock": holding_the_lock,
    "stopped": stopped,
}

if __name__ == "__main__":
    main()
