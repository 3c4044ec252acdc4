"""Trains a `fully_shard`ed model, or restores it at another world size; run under torchrun (or python for one rank).

sharded.py --run-dir DIR --out FILE --mode save      trains two steps, saves; FILE-rank.pt: the local parts
sharded.py --run-dir DIR --out FILE --mode load      restores what was saved; FILE-rank.pt: the local parts
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_train as dt
from dist_train.run import Run

WIDTH = 301
"""Divides by neither 2 nor 3: shards are uneven."""


def build(*, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [nn.Linear(16, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)]
    model = nn.Sequential(*layers)
    if sharded:
        for layer in (model[0], model[3]):
            fully_shard(layer)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--mode", choices=("save", "load"), required=True)
    args = parser.parse_args()
    dt.init_distributed()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model, optimizer = build(sharded=world_size > 1)
    resume = "never" if args.mode == "save" else "must"
    policy = dt.CheckpointPolicy(at_end=False)
    with Run(args.run_dir, model=model, optimizer=optimizer, resume=resume, policy=policy) as run:
        for _ in run.epochs(1 if args.mode == "save" else 0):
            for step in range(2):
                train_step(model, optimizer, step)
                run.step()
            with no_gathering():
                run.save(wait=True)
            assert run.committed_step == 2 or not run.world.is_main
        torch.save(local_parts(model, optimizer), f"{args.out}-{run.world.rank}.pt")


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def no_gathering() -> Any:
    """Nobody may put a sharded tensor together while this is entered; the control group's small messages pass."""
    from contextlib import ExitStack

    stack = ExitStack()
    for owner, name in (
        (DTensor, "full_tensor"),
        (DTensor, "redistribute"),
        (dist, "all_gather_into_tensor"),
        (dist, "gather"),
        (dist, "gather_object"),
        (dist, "all_gather_object"),
    ):
        stack.enter_context(patch.object(owner, name, refuse(name)))
    stack.enter_context(patch.object(dist, "all_gather", only_small(dist.all_gather)))
    return stack


def refuse(name: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} was called in a save")

    return refused


def only_small(collective: Callable[..., Any]) -> Callable[..., Any]:
    def gathered(outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert tensor.nbytes < 16384, f"all_gather of {tensor.nbytes} bytes in a save"
        return collective(outputs, tensor, *args, **kwargs)

    return gathered


def local_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """name -> (this rank's values, offsets in the whole tensor)."""
    parts: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        tensors = {f"model/{name}": parameter.detach()}
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        for full, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                chunks = tensor.__create_chunk_list__()
                parts[full] = (tensor.to_local().clone(), list(chunks[0].offsets), list(tensor.shape))
            else:
                parts[full] = (tensor.clone(), [0] * tensor.dim(), list(tensor.shape))
    return parts


if __name__ == "__main__":
    main()
