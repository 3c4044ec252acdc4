"""Objects that were given to `run.register` <-> named tensors and JSON, by their state_dict alone.

Invariant: a module's tensors are filled where they lie; any other object gets new tensors, laid out over the ranks as
the ones that its state_dict() shows now. No rank ever holds the whole of what was sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.capture import Capture
from dist_train.each_rank import OF_EACH_RANK, EachRank
from dist_train.optimizer_state import CPU, TensorSource
from dist_train.tied import storage_key
from dist_train.tree import decode, encode, tensor_names

Json = Any


class Stateful(Protocol):
    """Anything that can be registered with a run; torch.distributed.checkpoint's protocol of this name is the same."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


def tie_registered(registered: Mapping[str, Any], capture: Capture) -> None:
    """A registered module's buffers are the main rank's; what it shares with a model is stored once."""
    models = {storage_key(value): name for name, value in capture.tensors.items() if name.startswith("model/")}
    for name in [name for name in capture.tensors if name.startswith("user/")]:
        if first := models.get(storage_key(capture.tensors[name])):
            capture.aliases[name] = first
            del capture.tensors[name]
    for name, one in registered.items():
        if isinstance(one, nn.Module):
            capture.main_only |= {f"user/{name}/{key}" for key, _ in one.named_buffers()} & capture.tensors.keys()


def is_of_each_rank(json: Json) -> bool:
    """Whether that is what a checkpoint holds of an object of which each rank has its own state."""
    return bool(json == OF_EACH_RANK)


def compare_registered(one: Any, place: str, json: Json, source: TensorSource) -> list[str]:
    """What keeps the checkpoint's values from being loaded: sharded ones of which nothing says where they belong."""
    if isinstance(one, EachRank) != is_of_each_rank(json):
        was = "each rank's own (each_rank=True)" if is_of_each_rank(json) else "one for all ranks"
        return [f"the registered {place.removeprefix('user/')!r} was {was} in the run that saved: register it so again"]
    if isinstance(one, EachRank):
        return []
    live = _templates(one, place, json)
    problems = []
    for name in tensor_names(json):
        mine, shape = live.get(name), source.describe(name)[0]
        fits = mine is not None and tuple(mine.shape) == shape
        if not fits and (isinstance(mine, DTensor) or source.is_sharded(name)):
            now = "shows no tensor there yet" if mine is None else f"shows one of shape {list(mine.shape)}"
            problems.append(
                f"{name}, of shape {list(shape)}, is sharded, and the state_dict() of the registered "
                f"{place.removeprefix('user/')!r} {now}, so nothing says which rank holds which part of it. Build the "
                f"object's state from the sharded model before run.register, as in the run that saved"
            )
    return problems


def load_registered(one: Any, place: str, json: Json, source: TensorSource, here: torch.device) -> None:
    """Of an object that `compare_registered` has nothing against.

    Args:
        json: what the checkpoint holds of it.
        here: the device of the models, on which plain tensors are that were on one of its type.
    """

    def create(name: str, device: str) -> torch.Tensor:
        return source.create(name, here if device == here.type else CPU)

    if isinstance(one, EachRank):
        one.restore(place, source, here)
        return
    live = _templates(one, place, json)
    made: dict[str, torch.Tensor] = {}

    def load(name: str, device: str) -> torch.Tensor:
        if name not in made:
            made[name] = make(name, device)
        return made[name]

    def make(name: str, device: str) -> torch.Tensor:
        mine = live.get(name)
        if mine is None or tuple(mine.shape) != source.describe(name)[0]:
            return create(name, device)
        if isinstance(one, nn.Module) and source.describe(name)[1] == mine.dtype:
            source.fill(name, mine)
            return mine
        return (
            source.create(name, mine.to_local().device, like=mine)
            if isinstance(mine, DTensor)
            else create(name, device)
        )

    one.load_state_dict(decode(json, load))


def _templates(one: Any, place: str, json: Json) -> dict[str, torch.Tensor]:
    """The object's own tensors, by the names that a capture gives them; only if any were saved."""
    live: dict[str, torch.Tensor] = {}
    if tensor_names(json):
        encode(one.state_dict(), place, live)
    return live
