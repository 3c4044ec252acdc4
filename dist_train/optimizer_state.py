"""An optimizer's state <-> named tensors and JSON. Which settings its groups get back is `rates`' business.

Invariant: capturing reads `optimizer.state` and steps nothing (torch's own get_state_dict would step a fresh one);
restoring sets it as it was, dtypes included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from dist_train.errors import UnsaveableStateError
from dist_train.tree import decode, encode

Json = Any
CPU = torch.device("cpu")


class TensorSource(Protocol):
    """Where a restore takes tensors from: a verified checkpoint."""

    def names(self, prefix: str) -> list[str]: ...
    def own_names(self, name: str) -> list[str]: ...
    def fill(self, name: str, target: torch.Tensor) -> None: ...
    def create(self, name: str, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor: ...
    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...
    def is_sharded(self, name: str) -> bool: ...


def innermost_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper, which calls itself an optimizer."""
    while type(optimizer).__name__ == "AcceleratedOptimizer" or (
        not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer")
    ):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsaveableStateError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer and cannot be saved.")
    return optimizer


def positional_name(group: int, place: int) -> str:
    """Name of a parameter that belongs to no model, or whose name an imported optimizer state does not tell."""
    return f"~group{group}.{place}"


def is_positional(name: str) -> bool:
    return name.startswith("~group")


def member_names(index: int, group: Mapping[str, Any], names: dict[int, str]) -> list[str]:
    """Names of a group's parameters; those of no model by their place."""
    return [names.get(id(p), positional_name(index, i)) for i, p in enumerate(group["params"])]


def names_in_order(saved: list[str], live: list[list[str]], index: int) -> list[str]:
    """A saved group's names, with the live name at the same place for one that is known by its place only."""
    here = live[index] if index < len(live) and len(live[index]) == len(saved) else saved
    return [
        mine if name == positional_name(index, place) else name
        for place, (name, mine) in enumerate(zip(saved, here, strict=True))
    ]


def capture_optimizer(
    optimizer: torch.optim.Optimizer, place: str, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> Json:
    """Groups and state in JSON; tensors go into `tensors`."""
    groups, state = [], {}
    for index, group in enumerate(optimizer.param_groups):
        members = member_names(index, group, names)
        hyper = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": members, "settings": encode(hyper, f"{place}/~groups/{index}", tensors)})
        for name, parameter in zip(members, group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = encode(dict(optimizer.state[parameter]), f"{place}/{name}", tensors)
    loose = {str(key): value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    return {"groups": groups, "state": state, "loose": encode(loose, f"{place}/~loose", tensors)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[int, str], source: TensorSource, json: Json
) -> None:
    """Sets `optimizer.state` itself: `load_state_dict` casts state to the parameter's dtype (bf16 loses fp32
    moments).
    """
    optimizer.state.clear()
    for index, group in enumerate(optimizer.param_groups):
        for place_in_group, (name, parameter) in enumerate(
            zip(member_names(index, group, names), group["params"], strict=True)
        ):
            saved_name = name if name in json["state"] else positional_name(index, place_in_group)
            if saved_name in json["state"]:
                optimizer.state[parameter] = decode(json["state"][saved_name], _state_loader(source, parameter))
    for key, value in decode(json["loose"], lambda name, device: source.create(name, CPU)).items():
        optimizer.state[key] = value
    if any(isinstance(one, dict) and isinstance(one.get("step"), (int, float)) for one in optimizer.state.values()):
        # torch's own repair of what an older torch has saved: a count that is no tensor would never move.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _state_loader(source: TensorSource, parameter: torch.Tensor) -> Any:
    """Optimizer state lies where its parameter lies, but for counters that were kept on the CPU."""
    return lambda name, device: source.create(
        name, CPU if device == "cpu" and parameter.device.type != "cpu" else parameter.device, like=parameter
    )


def compare_groups(
    optimizer: torch.optim.Optimizer, place: str, names: dict[int, str], saved_groups: list[Json]
) -> list[str]:
    """What keeps saved parameter groups from fitting the live ones."""
    live = [member_names(index, group, names) for index, group in enumerate(optimizer.param_groups)]
    saved = [names_in_order(group["params"], live, index) for index, group in enumerate(saved_groups)]
    if [len(group) for group in live] != [len(group) for group in saved]:
        sizes = f"{[len(group) for group in saved]} parameters, here {[len(group) for group in live]}"
        return [f"{place}: the groups hold {sizes}"]
    if strangers := {n for g in live for n in g} ^ {n for g in saved for n in g}:
        return [f"{place}: only there or only here are the parameters {', '.join(sorted(strangers))}"]
    return []
