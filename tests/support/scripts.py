"""What a training script holds, as small as it can be: the objects, and one step of its loop.

`everything` tells all that there is to it, so that two scripts can be compared: it asks no `state_dict`, which would
leave out what the library may have lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import dist_train as dt
from dist_train.model_state import clean_name
from dist_train.run import Run

WIDTH = 6


@dataclass(kw_only=True)
class Script:
    """The objects as a Run is given them, and a step of the loop."""

    model: Any
    optimizer: Any = ()
    step: Callable[[int], Any]
    """Takes the number of the update; returns its loss."""
    scheduler: Any = ()
    registered: dict[str, Any] = field(default_factory=dict)
    accelerator: Any = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One thing that scripts hold."""

    build: Callable[[], Script]
    kept: str
    """What a checkpoint holds of it, for people."""
    sharded: Callable[[], Script] | None = None
    """The same under `fully_shard`."""


def batch(update: int, width: int = 4) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(update))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Tanh(), nn.Linear(WIDTH, 1))


def loss_of(model: nn.Module, update: int) -> torch.Tensor:
    return model(batch(update)).float().square().mean()


def train_step(model: nn.Module, optimizer: Any, update: int, *, windows: int = 1) -> torch.Tensor:
    """Forward, backward and update; `windows` micro-batches are accumulated."""
    loss = torch.zeros(())
    for part in range(windows):
        loss = loss_of(model, update * windows + part) / windows
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def simple(
    make_model: Callable[[], nn.Module] = network,
    make_optimizer: Callable[[nn.Module], Any] = lambda model: torch.optim.AdamW(model.parameters(), lr=0.05),
    make_scheduler: Callable[[Any], Any] | None = None,
    *,
    windows: int = 1,
    registered: Callable[[nn.Module, Any], dict[str, Any]] | None = None,
    after: Callable[[Script, int], None] = lambda script, update: None,
) -> Callable[[], Script]:
    """A builder of a script with one model and one optimizer."""

    def build() -> Script:
        model = make_model()
        optimizer = make_optimizer(model)
        scheduler = make_scheduler(optimizer) if make_scheduler else ()

        def step(update: int) -> torch.Tensor:
            loss = train_step(model, optimizer, update, windows=windows)
            if make_scheduler:
                scheduler.step()
            after(script, update)
            return loss

        given = registered(model, optimizer) if registered else {}
        script = Script(model=model, optimizer=optimizer, scheduler=scheduler, registered=given, step=step)
        return script

    return build


def train(script: Script, run_dir: Path, updates: int, *, at_start: list[Any] | None = None) -> list[Any]:
    """Goes on to so many updates in a Run; the losses of those that were made.

    Args:
        at_start: receives everything that the script holds when its first update begins.
    """
    parts = {"model": script.model, "optimizer": script.optimizer, "scheduler": script.scheduler}
    losses = []
    policy = dt.CheckpointPolicy(every_epochs=100, keep_last=1)
    with Run(str(run_dir), **parts, accelerator=script.accelerator, policy=policy) as run:
        for name, one in script.registered.items():
            run.register(name, one)
        for update in run.epochs(updates):
            if at_start is not None and not losses:
                at_start.append(everything(script))
            losses.append(script.step(update))
            run.step()
    return losses


def train_bare(script: Script, updates: Iterable[int]) -> list[Any]:
    """The same loop without the library."""
    return [script.step(update) for update in updates]


# What there is to a script


def everything(script: Script) -> Any:
    """All that it holds, in values that compare."""
    seen: dict[int, str] = {}
    parts = {"model": script.model, "optimizer": script.optimizer, "scheduler": script.scheduler}
    return observe({**parts, "registered": script.registered}, seen, "")


def observe(value: Any, seen: dict[int, str], place: str) -> Any:
    """A value with all that hangs on it; an object that was seen before is named by its first place."""
    if isinstance(value, (torch.Tensor, nn.Module, Optimizer)) or hasattr(value, "__dict__"):
        if (first := seen.setdefault(id(value), place)) != place:
            return ("seen", first)
        _kept_alive.append(value)
    if isinstance(value, torch.Tensor):
        return observe_tensor(value)
    if isinstance(value, nn.Module):
        return {"class": type(value).__name__, **dict(observe_module(value, seen, place))}
    if isinstance(value, Optimizer):
        return observe_optimizer(value, seen, place)
    return observe_plain(value, seen, place)


_kept_alive: list[Any] = []
"""An id means an object only as long as that lives."""


def observe_tensor(value: torch.Tensor) -> Any:
    kind = (type(value).__name__, value.dtype, tuple(value.shape), value.device.type, value.requires_grad)
    if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
        inner = {name: observe_tensor(getattr(value, name)) for name in value.__tensor_flatten__()[0]}
        return (*kind, tuple(inner.items()))
    local = value.to_local() if isinstance(value, DTensor) else value
    strides = tuple(step for step, size in zip(local.stride(), local.shape, strict=True) if size > 1)
    flat = local.detach().contiguous().reshape(-1).view(torch.uint8)
    return (*kind, strides if local.numel() else (), flat.numpy().tobytes())


def observe_module(module: nn.Module, seen: dict[int, str], place: str) -> Iterator[tuple[str, Any]]:
    for name, one in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        clean = clean_name(name)
        yield clean, observe(one, seen, f"{place}.{clean}")
    yield "training", module.training
    for name, part in module.named_modules():
        if hasattr(part, "watched"):  # what get_extra_state tells
            yield f"{name}.watched", observe(part.watched, seen, f"{place}.{name}.watched")


def observe_optimizer(optimizer: Optimizer, seen: dict[int, str], place: str) -> Any:
    members = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        next((index for index, one in enumerate(members) if one is key), key): observe(
            value if isinstance(value, torch.Tensor) else dict(value), seen, f"{place}.state"
        )
        for key, value in optimizer.state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    own = {key: value for key, value in vars(optimizer).items() if key not in _OF_EVERY_OPTIMIZER}
    return {
        "class": type(optimizer).__name__,
        "state": dict(sorted(state.items(), key=lambda item: str(item[0]))),
        "groups": observe(groups, seen, f"{place}.groups"),
        "own": observe_plain(own, seen, f"{place}.own"),
    }


_OF_EVERY_OPTIMIZER = {
    *vars(torch.optim.SGD([torch.zeros(())], lr=0.1)),
    "step",
    "_opt_called",
    "_params",
    "_numel_cache",
}


def observe_plain(value: Any, seen: dict[int, str], place: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
        return (type(value).__name__, value.hex() if type(value) is float else value)
    if isinstance(value, Mapping):
        items = {key: observe(one, seen, f"{place}.{key}") for key, one in value.items()}
        extra = (getattr(value, "default_factory", None),) if hasattr(value, "default_factory") else ()
        return (type(value).__name__, *extra, list(items.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value).__name__, sorted(value, key=repr))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, np.random.Generator):
        return observe(value.bit_generator.state, seen, place)
    if isinstance(value, np.random.RandomState):
        return observe(value.get_state(), seen, place)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.amp.GradScaler):  # made at the first use, of what was loaded
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return observe_tensor(value.get_state())
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return value.__qualname__
    if isinstance(value, Iterable):
        inner = [observe(one, seen, f"{place}.{index}") for index, one in enumerate(value)]
        return (type(value).__name__, getattr(value, "maxlen", None), inner)
    if hasattr(value, "__dict__"):
        own = {key: one for key, one in vars(value).items() if key not in ("optimizer", "_opt")}
        return (type(value).__name__, {key: observe(one, seen, f"{place}.{key}") for key, one in own.items()})
    return (type(value).__name__, value)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """The places where two of them differ."""
    if isinstance(one, (dict, list, tuple)) and type(one) is type(other) and len(one) == len(other):
        if isinstance(one, dict):
            if one.keys() != other.keys():
                return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))} only on one side"]
            pairs = [(f"{place}.{key}", one[key], other[key]) for key in one]
        else:
            pairs = [(f"{place}.{index}", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
        return [text for name, a, b in pairs for text in differences(a, b, name)]
    return [] if type(one) is type(other) and one == other else [f"{place}: {one!r:.60} and {other!r:.60}"]
