"""The loop of restart_time.py, the same but for who saves; marks on a clock where it stands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import dist_train as dt

STEPS, EVERY, WIDTH, BATCH = 40, 5, 256, 32
PAUSE_SECONDS = 0.02
"""A step's length: the kill comes in training, not in the launcher's own start."""


def mark(what: str) -> None:
    """One line, written at once."""
    line = json.dumps({"what": what, "at": time.time(), "pid": os.getpid(), "rank": int(os.environ["RANK"])}) + "\n"
    descriptor = os.open(args.folder / "marks.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def build() -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    mark("accelerator")
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    mark("prepared")
    return accelerator, model, optimizer


def update(accelerator: Accelerator, model: Any, optimizer: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = (model(batch) - batch).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(PAUSE_SECONDS)
    return loss.detach()


def train_with_dist_train() -> None:
    dt.init_distributed()
    mark("joined")
    accelerator, model, optimizer = build()
    data = torch.utils.data.TensorDataset(torch.randn(STEPS * BATCH * 2, WIDTH))
    loader = dt.data_loader(data, global_batch_size=BATCH * 2, micro_batch_size=BATCH, seed=0)
    policy = dt.CheckpointPolicy(every_steps=EVERY, keep_last=2)
    run_dir = str(args.folder / "run")
    with dt.Run(
        run_dir, accelerator=accelerator, model=model, optimizer=optimizer, loader=loader, policy=policy
    ) as run:
        mark("entered")
        for _ in run.epochs(1):
            for (batch,) in run.batches(loader):
                run.step(loss=update(accelerator, model, optimizer, batch))
                mark("step")


def train_with_torch_save() -> None:
    accelerator, model, optimizer = build()
    path, step = args.folder / "checkpoint.pth", 0
    if path.exists():
        with contextlib.suppress(OSError):
            state = torch.load(path, weights_only=True)
            model.module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    mark("loaded")
    for step in range(step + 1, STEPS + 1):  # noqa: B020
        update(accelerator, model, optimizer, torch.randn(BATCH, WIDTH))
        mark("step")
        if step % EVERY == 0 and accelerator.is_main_process:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    torch.distributed.destroy_process_group()


parser = argparse.ArgumentParser()
parser.add_argument("--folder", type=Path, required=True)
parser.add_argument("--save-with", choices=("dist_train", "torch"), required=True)
args = parser.parse_args()
mark("script")
train_with_dist_train() if args.save_with == "dist_train" else train_with_torch_save()
