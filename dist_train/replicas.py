"""What models on several ranks need so that a restarted process computes the same bits as one that has been running.

Source: torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import ConfigError
from dist_train.fully_sharded import reshard
from dist_train.model_state import innermost_module, keeps_own_buffers
from dist_train.world import World


def fix_bucket_layout(model: nn.Module) -> None:
    """Makes DDP rebuild its buckets now, not after the first real backward pass. Collective.

    The rebuilt layout decides the order of summation on three and more ranks; a process that resumes must have the one
    that the killed process had. A synthetic backward of zeros needs neither batch nor loss and moves no BatchNorm or
    RNG.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters or model.static_graph:
        return
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    model.reducer.prepare_for_backward([])
    torch.stack([(p * 0).sum().to(torch.float32) for p in parameters]).sum().backward()
    model.reducer._rebuild_buckets()
    for parameter in parameters:
        parameter.grad = None


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Gives every rank the main rank's buffers (BatchNorm statistics differ by rank). Collective."""
    if world.world_size > 1:
        for buffer in innermost_module(model).buffers():
            if not isinstance(buffer, DTensor):
                world.broadcast_tensor(buffer)


def find_model(name: str | None, models: Mapping[str, nn.Module], registered: Mapping[str, Any]) -> nn.Module:
    """The model or the registered module of that name; None, or an empty name, is the only model.

    Raises:
        ConfigError: there is none of that name, or it takes one to tell which.
    """
    if not name and len(models) == 1:
        return next(iter(models.values()))
    modules = {key: one for key, one in registered.items() if isinstance(one, nn.Module)} | dict(models)
    if name and name in modules:
        return modules[name]
    known = ["the run's only model needs no name: run.evaluation()"] if len(models) == 1 else []
    known += [f"the names are {', '.join(repr(key) for key in modules if key)}"] if any(modules) else []
    what = "there is no such model" if name else "tell which model"
    raise ConfigError(f"run.evaluation({name!r}): {what}; {'; '.join(known) or 'the run has none'}.")


@contextmanager
def evaluating(model: nn.Module, world: World) -> Iterator[nn.Module]:
    """The unwrapped model in eval mode with the main rank's buffers, without gradients; put back afterwards.
    Collective; of a model after fully_shard each forward pass is, too.
    """
    inner = innermost_module(model)
    kept = [buffer.detach().clone() for buffer in inner.buffers()] if keeps_own_buffers(model) else []
    modes = {module: module.training for module in inner.modules()}
    broadcast_buffers(model, world)
    inner.eval()
    try:
        with torch.no_grad():
            yield inner
    finally:
        for module, training in modes.items():
            module.training = training
        for buffer, value in zip(inner.buffers(), kept, strict=False):
            buffer.detach().copy_(value)
        reshard([inner])
        if isinstance(model, DistributedDataParallel):
            # A forward without gradients leaves it off, and the next one would not take over the main rank's buffers;
            # a restarted process would.
            model.require_forward_param_sync = True
