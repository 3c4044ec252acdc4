"""The loop that a user writes with torch and Accelerate alone: nothing of dist_train is imported.

It trains the specimen on micro-batches that were written to files beforehand and saves its final state with torch.save.
With three ranks DDP's buckets are rebuilt before the first step, by the three calls that anybody can make (see
`docs/design/0003-exact-resume.md`): without them the first step's order of summation is one that no restarted process
has.

    bare_loop.py --batches DIR --out FILE [--mixed-precision bf16]
"""

from __future__ import annotations

import argparse
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator

from tests.support.specimen import ACCUMULATION, build_model, build_optimizer, loss_fn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mixed-precision", default="no")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model = build_model()
    optimizer, scheduler = build_optimizer(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if world_size > 1:
        rebuild_buckets(model)
    for epoch in torch.load(Path(args.batches) / f"rank-{rank}.pt", weights_only=True):
        model.train()
        for batch, weight, ends_window in epoch:
            with nullcontext() if ends_window else accelerator.no_sync(model):
                loss, _, _ = loss_fn(model, batch)
                (loss * weight / ACCUMULATION).backward()
            if ends_window:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    torch.save(final_state(accelerator, model, optimizer, scheduler), f"{args.out}-{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rebuild_buckets(model: Any) -> None:
    parameters = list(model.parameters())
    model.reducer.prepare_for_backward([])
    torch.stack([(p * 0).sum() for p in parameters]).sum().backward()
    model.reducer._rebuild_buckets()
    for parameter in parameters:
        parameter.grad = None


def final_state(accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    inner = accelerator.unwrap_model(model)
    names = {id(p): name for name, p in inner.named_parameters()}
    plain = optimizer.optimizer
    return {
        "model": inner.state_dict(),
        "optimizer": {names[id(p)]: dict(state) for p, state in plain.state.items()},
        "lr": [group["lr"] for group in plain.param_groups],
        "last_epoch": scheduler.last_epoch,
        "torch_rng": torch.get_rng_state(),
        "python_rng": list(random.getstate()[1]),
        "numpy_rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
