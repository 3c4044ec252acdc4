"""Averages of a sharded model, as people hold them: a dictionary of DTensors, a sharded module; and warm starts and
partial loads of sharded models. Every function runs on each rank (`forked.run_ranks`).
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_train as dt
from dist_train.checkpoint.reader import CheckpointReader
from tests.support.sharded import train_step

Json = Any
WIDTH = 37
"""Divides by none of 2, 3 and 4: shards are uneven, and the last layer's are fewer than the ranks."""


def network(seed: int = 0, *, sharded: bool | None = None, head: int = 1) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, WIDTH), nn.Tanh(), nn.Linear(WIDTH, head))
    model.register_buffer("count", torch.tensor(float(seed)))
    if dist.is_initialized() if sharded is None else sharded:
        fully_shard(model[0])
        fully_shard(model)
    return model


class Average(Stateful):
    """By the protocol of torch.distributed.checkpoint; nested as people nest."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.recent = [value.detach().clone() for value in model.parameters()]
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        self.recent = [value.detach().clone() for value in model.parameters()]
        for name, value in model.named_parameters():
            self.shadow[name] = self.shadow[name] * 0.5 + value.detach() * 0.5

    def state_dict(self) -> dict[str, Any]:
        pair = (self.updates, {"last": self.recent[-1], "first": self.recent[0]})
        return {"shadow": self.shadow, "recent": self.recent, "nested": {"pair": pair}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shadow, self.recent = state_dict["shadow"], state_dict["recent"]
        self.updates, ends = state_dict["nested"]["pair"]
        assert torch.equal(local(ends["last"]), local(self.recent[-1]))
        assert torch.equal(local(ends["first"]), local(self.recent[0]))


class Lazy(Average):
    """Whose tensors come with the first update: as it is made it says of none where it lies."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow, self.recent, self.updates = {}, [], 0

    def update(self, model: nn.Module) -> None:
        self.shadow = self.shadow or {name: value.detach().clone() for name, value in model.named_parameters()}
        super().update(model)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shadow = state_dict["shadow"]


class Shared(Average):
    """Which shows the model's own tensors: those are stored once. The last bias has no element on most ranks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": dict(self.model.named_parameters())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self.model.named_parameters():
            assert torch.equal(local(value), local(state_dict["shadow"][name]))


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> list[Any]:
    """Collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().tolist()


def train(run_dir: str, kind: str = "dictionary", steps: int = 3) -> Json:
    """What the average ends with, whole; of a run that is resumed with 0 steps what was loaded."""
    model, optimizer, average = _parts(kind, seed=0 if steps else 9)
    with dt.Run(run_dir, model=model, optimizer=optimizer, resume="auto" if steps else "must") as run:
        run.register("average", average)
        for epoch in run.epochs(steps):
            train_step(model, optimizer, epoch)
            _update(average, model)
            run.step()
        return _values(average)


def refused(run_dir: str) -> str:
    try:
        train(run_dir, "lazy", steps=0)
    except dt.DistTrainError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refused_before_entry(run_dir: str) -> tuple[str, bool]:
    """Registered before the run is entered; and whether the model is unchanged."""
    model, optimizer, average = _parts("lazy", seed=9)
    before = [local(p).detach().clone() for p in model.parameters()]
    run = dt.Run(run_dir, model=model, optimizer=optimizer, resume="must")
    run.register("average", average)
    try:
        run.__enter__()
    except dt.DistTrainError as error:
        same = all(torch.equal(local(p), then) for p, then in zip(model.parameters(), before, strict=True))
        return f"{type(error).__name__}: {error}", same
    return "nothing was refused", False


def _parts(kind: str, seed: int) -> tuple[Any, torch.optim.Optimizer, Any]:
    model = network(seed)
    make: Any = {"dictionary": Average, "lazy": Lazy, "shared": Shared, "module": lambda model: network(seed + 1)}[kind]
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), make(model)


def _update(average: Any, model: nn.Module) -> None:
    if not isinstance(average, nn.Module):
        average.update(model)
        return
    with torch.no_grad():
        for mine, value in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(value, 0.5)
        average.count += 1


def _values(average: Any) -> Json:
    if isinstance(average, nn.Module):
        return {name: whole(value) for name, value in average.state_dict().items()}
    laid = {type(value).__name__ for value in average.shadow.values()}
    assert laid == {"DTensor" if dist.is_initialized() else "Tensor"}, laid
    return {
        "shadow": {name: whole(value) for name, value in average.shadow.items()},
        "recent": [whole(value) for value in average.recent],
        "updates": average.updates,
    }


# Warm starts and partial loads of sharded models


def start_warm(run_dir: str, base: str, head: int = 1, steps: int = 0, **options: Any) -> dict[str, Any]:
    """The weights that a fresh run began with (or has after some updates), whole, and the bytes that each rank read."""
    model = network(9, head=head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    read = 0

    def fill(reader: CheckpointReader, name: str, target: torch.Tensor) -> None:
        nonlocal read
        read += local(target).nbytes
        original(reader, name, target)

    original = CheckpointReader.fill
    settings = dt.RunOptions(warm_start=base, **options)
    with (
        patch.object(CheckpointReader, "fill", fill),
        dt.Run(run_dir, model=model, optimizer=optimizer, options=settings) as run,
    ):
        for epoch in run.epochs(steps):
            train_step(model, optimizer, epoch)
            run.step()
        started = {name: whole(value) for name, value in model.state_dict().items()}
    return {"weights": started, "read": read}


def save_base(run_dir: str, head: int = 1) -> dict[str, Any]:
    model = network(head=head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with dt.Run(run_dir, model=model, optimizer=optimizer) as run:
        for epoch in run.epochs(2):
            train_step(model, optimizer, epoch)
            run.step()
    return {name: whole(value) for name, value in model.state_dict().items()}


def load_in_part(run_dir: str, head: int) -> dict[str, Any]:
    """After another head: the weights, and of which parameters the optimizer's state went on."""
    model = network(9, head=head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fresh = whole(model[2].weight)
    with dt.Run(
        run_dir, model=model, optimizer=optimizer, resume="must", options=dt.RunOptions(partial_load=("2.*",))
    ) as run:
        for _ in run.epochs(0):
            pass
        weights = {name: whole(value) for name, value in model.state_dict().items()}
        kept = [name for name, parameter in model.named_parameters() if parameter in optimizer.state]
    return {"weights": weights, "kept": kept, "fresh": fresh}
