"""The loop that a user writes with torch's `fully_shard` alone: nothing of dist_train is trained with.

It trains the sharded specimen on micro-batches that were written to files beforehand.

    fsdp_bare.py --batches DIR --out FILE [--sync-each]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.support.fsdp_specimen import ACCUMULATION, build_model, build_optimizer
from tests.support.specimen import loss_fn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--sync-each", action="store_true", help="reduce gradients at each micro-batch")
    args = parser.parse_args()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = build_model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer, scheduler = build_optimizer(model)
    for epoch in torch.load(Path(args.batches) / f"rank-{dist.get_rank()}.pt", weights_only=True):
        model.train()
        for batch, weight, ends_window in epoch:
            model.set_requires_gradient_sync(args.sync_each or ends_window)  # type: ignore[operator]
            loss, _, _ = loss_fn(model, batch)
            (loss * weight / ACCUMULATION).backward()  # type: ignore[no-untyped-call]
            if ends_window:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    torch.save(final_state(model, optimizer, scheduler), f"{args.out}-{dist.get_rank()}.pt")
    dist.barrier()


def final_state(model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    state = {names[id(p)]: {key: whole(one) for key, one in kept.items()} for p, kept in optimizer.state.items()}
    return {
        "model": {name: whole(value) for name, value in model.state_dict().items()},
        "optimizer": state,
        "lr": [group["lr"] for group in optimizer.param_groups],
        "last_epoch": scheduler.last_epoch,
        "torch_rng": torch.get_rng_state(),
        "python_rng": list(random.getstate()[1]),
        "numpy_rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # type: ignore[index, union-attr]
    }


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


if __name__ == "__main__":
    main()
