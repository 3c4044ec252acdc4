"""An optimizer's state <-> named tensors and JSON. Which settings its groups get back is `rates`' business.

    state    of each parameter, and under other keys
    own      attributes of an optimizer that is not torch's: counters, tables
    inner    optimizers inside of it (SAM, Lookahead): each as one of its own

Invariant: capturing reads `optimizer.state` and steps nothing (torch's own get_state_dict would step a fresh one);
restoring sets it as it was, dtypes included; a tensor that several places share is stored once and shared again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from dist_train.errors import UnsaveableStateError
from dist_train.tagged import text_of
from dist_train.tree import decode, encode, holds_only, share

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
    def own_name(self, name: str) -> str: ...


_OF_TORCH = frozenset(
    {"param_groups", "state", "defaults", "fused", "grad_scale", "found_inf", "_numel_cache", "_opt_called", "_params"}
    | {"_step_count", "_need_device_dtype_check_for_fused", "_step_supports_amp_scaling", "_zero_grad_profile_name"}
    | {"_warned_capturable_if_run_uncaptured"}
)
"""Attributes that torch's optimizers, schedulers and GradScaler set; they follow from the rest."""


_OF_RANKS = {
    "ZeroRedundancyOptimizer": "keeps on each rank the state of other parameters, under no name that all ranks have. "
    "Use FSDP2, which spreads it over the ranks, too: TrainConfig(sharding='fsdp'), or "
    "FullyShardedDataParallelPlugin(fsdp_version=2); or give the Run the optimizer that it was made of, whole on each "
    "rank.",
    "PostLocalSGDOptimizer": "lets ranks train apart between its averages: each has other weights then, and a "
    "checkpoint holds one copy. Use DistributedDataParallel with a plain optimizer.",
}
"""Optimizers of torch whose ranks do not hold the same."""


def innermost_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper, which calls itself an optimizer, and such as tell of no state of their own."""
    while type(optimizer).__name__ == "AcceleratedOptimizer" or (
        not isinstance(optimizer, torch.optim.Optimizer)
        and not hasattr(type(optimizer), "state_dict")
        and hasattr(optimizer, "optimizer")
    ):
        optimizer = optimizer.optimizer
    kind = type(optimizer).__name__
    if kind in _OF_RANKS:
        raise UnsaveableStateError(f"{kind} {_OF_RANKS[kind]}")
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    inside = next((key for key, _ in _optimizers_in(getattr(optimizer, "__dict__", {}))), None)
    if inside is None:
        raise UnsaveableStateError(f"{kind} is not a torch.optim.Optimizer and cannot be saved.")
    raise UnsaveableStateError(
        f"{kind} is not a torch.optim.Optimizer and wraps one: what it keeps itself would be lost. Give the Run the "
        f"one inside, optimizer=that.{inside}, and go on stepping yours. Where it has state of its own (slow weights, "
        f"counters), call run.register with an object whose state_dict() returns just that; or derive it from "
        f"torch.optim.Optimizer, and give it as it is."
    )


def with_inner(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
    """Those given and those inside of them, called `NAME.ATTRIBUTE`."""
    found = dict(optimizers)
    waiting = list(optimizers.items())
    while waiting:
        name, outer = waiting.pop(0)
        for key, inner in _optimizers_in(vars(outer)):
            if any(inner is known for known in found.values()):
                continue
            full = f"{name}.{key}" if name else key
            if full in found:
                raise UnsaveableStateError(
                    f"Two optimizers are called {full!r}; give the one in optimizer= another name."
                )
            found[full] = inner
            waiting.append((full, inner))
    return found


def _optimizers_in(members: Mapping[str, Any]) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    for key, value in members.items():
        if isinstance(value, torch.optim.Optimizer):
            yield key, value
        elif isinstance(value, Mapping) and key not in _OF_TORCH:
            yield from _optimizers_in({f"{key}.{inner}": one for inner, one in value.items()})
        elif isinstance(value, (list, tuple)) and key not in _OF_TORCH:
            yield from _optimizers_in({f"{key}.{index}": one for index, one in enumerate(value)})


def shares_groups(optimizer: torch.optim.Optimizer, others: Mapping[str, torch.optim.Optimizer]) -> bool:
    """Whether each of its groups is one of another optimizer, which then sets their values."""
    known = {id(group) for other in others.values() if other is not optimizer for group in other.param_groups}
    return all(id(group) in known for group in optimizer.param_groups)


def has_groups_of(optimizer: torch.optim.Optimizer, other: Any) -> bool:
    """Whether another one, or a wrapper of it, moves the same groups."""
    mine = {id(group) for group in optimizer.param_groups}
    return bool(mine) and any(id(group) in mine for group in getattr(other, "param_groups", ()))


def own_values(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes that a class of the user's keeps beside its state: tensors, arrays and plain values, and dictionaries,
    lists and the like of these.
    """
    if type(optimizer).__module__.startswith("torch."):
        return {}
    return {key: value for key, value in vars(optimizer).items() if key not in _OF_TORCH and holds_only(value, _is_own)}


def _is_own(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, torch.nn.Parameter) and not value.requires_grad
    plain = (bool, int, float, str, bytes, bytearray, np.ndarray, np.generic)
    return value is None or isinstance(value, plain) or text_of(value) is not None


def own_settings(optimizer: torch.optim.Optimizer, place: str) -> dict[str, Json]:
    """Those of the attributes that may be settings, in plain JSON: a tensor never is."""
    plain = {key: value for key, value in own_values(optimizer).items() if not _has_tensor(value)}
    return {key: encode(value, f"{place}/~own/{key}", {}) for key, value in plain.items()}


def _has_tensor(value: Any) -> bool:
    return not holds_only(value, lambda leaf: not isinstance(leaf, (torch.Tensor, np.ndarray)))


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
    """Groups and state in JSON; tensors go into `tensors`, where one that is there already is used."""
    mine: dict[str, torch.Tensor] = {}
    own = encode(own_values(optimizer), f"{place}/~own", mine)
    groups, state, known = [], {}, set()
    for index, group in enumerate(optimizer.param_groups):
        members = member_names(index, group, names)
        hyper = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": members, "settings": encode(hyper, f"{place}/~groups/{index}", mine)})
        for name, parameter in zip(members, group["params"], strict=True):
            known.add(id(parameter))
            if parameter in optimizer.state:
                state[name] = encode(_plain(optimizer.state[parameter]), f"{place}/{name}", mine)
    loose = {key: _plain(value) for key, value in optimizer.state.items() if id(key) not in known}
    for key in loose:
        if isinstance(key, torch.Tensor):
            shape = f"{list(key.shape)} {key.dtype}"
            raise UnsaveableStateError(
                f"{place} ({type(optimizer).__name__}) keeps state for a tensor ({shape}) that is in none of its "
                f"groups, so nothing tells which it is after a restart. Leave it in a group (with lr=0 where it "
                f"is not to be trained), or take its state out: `del optimizer.state[tensor]`."
            )
    json = {"groups": groups, "state": state, "loose": encode(loose, f"{place}/~loose", mine)}
    more = {"own": own, "told": encode(_told(optimizer), f"{place}/~told", mine)}
    return share(json | {key: value for key, value in more.items() if value}, mine, tensors)


def _told(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a class of the user's adds to its state_dict."""
    kind = type(optimizer)
    if kind.__module__.startswith("torch.") or kind.state_dict is torch.optim.Optimizer.state_dict:
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def _plain(state: Any) -> Any:
    """A parameter's state without a dictionary's kind: that of a `defaultdict(dict)` and the like."""
    return dict(state) if isinstance(state, Mapping) else state


class Shared:
    """The tensors of a checkpoint as they are handed out: the same name gives the same tensor.

    Args:
        live: tensors that are filled where they lie, by name: those of the models.
    """

    def __init__(self, source: TensorSource, live: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._made = dict(live)

    def give(self, name: str, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor:
        if name not in self._made:
            self._made[name] = self._source.create(name, device, like=like)
        return self._made[name]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[int, str], source: Shared, json: Json, *, fresh: bool = False
) -> None:
    """Sets `optimizer.state` itself: `load_state_dict` casts state to the parameter's dtype (bf16 loses fp32
    moments).

    Args:
        fresh: its state is what its constructor made (Adagrad): a parameter that the checkpoint does not know keeps it.
    """
    saved: list[tuple[Mapping[str, Any], torch.Tensor, str]] = []
    left: dict[torch.Tensor, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        for place_in_group, (name, parameter) in enumerate(
            zip(member_names(index, group, names), group["params"], strict=True)
        ):
            saved_name = name if name in json["state"] else positional_name(index, place_in_group)
            if saved_name in json["state"]:
                saved.append((group, parameter, saved_name))
            elif fresh and json["state"] and parameter in optimizer.state:
                left[parameter] = optimizer.state[parameter]
    optimizer.state.clear()
    optimizer.state.update(left)
    for settings, parameter, saved_name in saved:
        loader = _state_loader(source, parameter, step_device(optimizer, settings, parameter))
        optimizer.state[parameter] = decode(json["state"][saved_name], loader)
    for key, value in decode(json["loose"], loader_beside(optimizer, source)).items():
        optimizer.state[key] = value
    if any(isinstance(one, dict) and isinstance(one.get("step"), (int, float)) for one in optimizer.state.values()):
        # torch's own repair of what an older torch has saved: a count that is no tensor would never move.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def restore_told(optimizer: torch.optim.Optimizer, source: Shared, json: Json) -> None:
    """Through the class's own load_state_dict, which takes a whole one: before the state is set as it was."""
    if told := json.get("told"):
        optimizer.load_state_dict({**optimizer.state_dict(), **decode(told, loader_beside(optimizer, source))})


def restore_own(
    optimizer: torch.optim.Optimizer, place: str, source: Shared, json: Json, then: Mapping[str, Json] | None
) -> dict[str, tuple[Json, Json]]:
    """Sets the attributes beside the state but for those that the script constructs otherwise now, which it returns."""
    today = own_settings(optimizer, place)
    before = today if then is None else then
    changes = {}
    for key, value in json.get("own", {}).items():
        if before.get(key) != today.get(key):
            changes[f"{place}.{key}"] = (before.get(key), today.get(key))
        else:
            setattr(optimizer, key, decode(value, loader_beside(optimizer, source)))
    return changes


def loader_beside(optimizer: torch.optim.Optimizer, source: Shared) -> Any:
    """For tensors that belong to no parameter: on the device that they were on, as far as there is one here."""
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    here = CPU if first is None else first.device
    return lambda name, device: source.give(name, here if device == here.type else CPU)


def step_device(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: torch.Tensor
) -> torch.device | None:
    """Where torch's optimizers want a parameter's count of steps to lie; None where it lies as it did.

    It follows from how the optimizer is made now: a fused kernel, or a captured graph, reads it on the device; a plain
    step reads it on the host, and would wait for the device once a parameter.
    Source: `Optimizer._process_value_according_to_param_policy`, and what Adam's first step makes (torch 2.13).
    """
    flags = [group[key] for key in ("fused", "capturable") if key in group]
    if any(flags):
        return parameter.device
    return CPU if flags and type(optimizer).__module__.startswith("torch.optim") else None


def _state_loader(source: Shared, parameter: torch.Tensor, step: torch.device | None) -> Any:
    """Optimizer state lies where its parameter lies, but for counters that were kept on the CPU.

    Args:
        step: where the count of steps is to lie; None for where it lay.
    """

    def load(name: str, device: str) -> torch.Tensor:
        here = CPU if device == "cpu" and parameter.device.type != "cpu" else parameter.device
        if step is not None and name.rsplit("/", 1)[-1] == "step":
            here = step
        return source.give(name, here, like=parameter)

    return load


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
