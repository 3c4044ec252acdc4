"""What scripts hold, under DistributedDataParallel on forked ranks; and a buffer of another shape on each rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import DistTrainError
from tests.support import kinds_sharded
from tests.support.kinds_changing import Changing, Noisy, Registering, quantization_aware
from tests.support.kinds_models import Watching, adamw, spectral_normed
from tests.support.kinds_own import Own
from tests.support.kinds_sharded import grow
from tests.support.scripts import Script, network, simple, train


def ddp(make: Callable[[], nn.Module], optimizer: Any = adamw, **settings: Any) -> Callable[[], Script]:
    return simple(lambda: DistributedDataParallel(make(), **settings), optimizer)


REPLICATED: dict[str, Callable[[], Script]] = {
    "BatchNorm that nobody makes equal": ddp(network, broadcast_buffers=False),
    "extra state, hidden and late buffers": ddp(Watching),
    "buffer that grows": ddp(lambda: Changing(lambda: torch.zeros(0, 4), grow, True)),
    "buffers that a forward pass registers": ddp(Registering),
    "quantization-aware training": ddp(quantization_aware),
    "spectral_norm": ddp(spectral_normed),
    "generators in a module": ddp(Noisy),
    "generator in an optimizer": ddp(
        network,
        lambda model: Own(
            model.parameters(),
            lambda: torch.Generator().manual_seed(3),
            lambda optimizer: 1 + float(torch.rand((), generator=optimizer.mine)),
        ),
    ),
    "SGD without momentum": ddp(network, lambda model: optim.SGD(model.parameters(), lr=0.05)),
}


def save_all(folder: str) -> dict[str, Any]:
    """As `kinds_sharded.save_all`."""
    found = {}
    for index, (name, build) in enumerate(REPLICATED.items()):
        kinds_sharded.SHARDED[name] = build
        found[name] = kinds_sharded.save_one(name, Path(folder) / str(index))
    return found


def unlike_buffers(folder: str) -> str:
    """The message with which a buffer of another shape on each rank is refused; nothing may have been written."""

    def grow_by_rank(buffer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([buffer, values[: 1 + dist.get_rank()]])

    script = kinds_sharded.of(lambda: Changing(lambda: torch.zeros(0, 4), grow_by_rank, True))()
    try:
        train(script, Path(folder), 1)
    except DistTrainError as error:
        assert not list(Path(folder).glob("checkpoints/step-*"))
        return str(error)
    return "not refused"
