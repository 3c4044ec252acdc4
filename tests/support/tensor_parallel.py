"""A loop of its own with a tensor-parallel model, alone or under FSDP2; each function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dist_train as dt
from tests.support.fsdp_parts import whole
from tests.support.small_run import Numbered, squared_error


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(3, 7), nn.LayerNorm(7), nn.Linear(7, 1)
        self.up, self.down = nn.Linear(7, 10), nn.Linear(10, 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        inner = self.norm(self.inner(inputs))
        out: torch.Tensor = self.outer(inner + self.down(torch.tanh(self.up(inner))))
        return out


def train(folder: str, data_parallel: int, max_steps: int | None) -> dict[str, Any]:
    """
    Args:
        data_parallel: how many groups of ranks share the batches out; the ranks of one compute one model together.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    model, own = Network(), ranks // data_parallel
    if own > 1:
        mesh = init_device_mesh("cpu", (data_parallel, own), mesh_dim_names=("data", "model"))
        parallelize_module(model, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if data_parallel > 1:
            fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = dt.data_loader(
        Numbered(20), global_batch_size=8, micro_batch_size=2, rank=rank // own, world_size=data_parallel
    )
    options = dt.RunOptions(max_steps=max_steps, own_gradients=True)
    samples = []
    with dt.Run(folder, model=model, optimizer=optimizer, loader=loader, options=options) as run:
        for epoch in run.epochs(3):
            for batch in run.batches(loader):
                samples += [(epoch, index) for index in batch[2].tolist()]
                if data_parallel > 1 and own > 1:
                    model.set_requires_gradient_sync(run.updates_now)  # type: ignore[operator]
                loss = squared_error(model, batch)
                (loss * run.loss_weight).backward()
                if run.updates_now:
                    optimizer.step()
                    optimizer.zero_grad()
                run.step(loss=loss.detach())
            run.end_epoch()
    state = model.state_dict()
    return {
        "weights": {name: whole(value).tolist() for name, value in state.items()},
        "sharded": sorted(name for name, value in state.items() if isinstance(value, DTensor)),
        "samples": samples,
        "step": run.global_step,
    }
