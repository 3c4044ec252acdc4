"""One model <-> named tensors: parameters, buffers (hidden ones too) and what modules return from get_extra_state.

Invariant: names are those of the innermost module's state_dict, whatever wraps it; a tied tensor is one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.capture import Capture
from dist_train.errors import UnsaveableStateError
from dist_train.fully_sharded import is_sharded, is_unit
from dist_train.optimizer_state import CPU, TensorSource
from dist_train.tied import compare_copies, group_tied, storage_key
from dist_train.tree import decode, encode, pack, unpack

Json = Any

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(slots=True, kw_only=True)
class Fit:
    """How the tensors of a checkpoint and of the models go together, by full name (`model/head.weight`)."""

    loaded: int = 0
    """How many are equal in name, shape and dtype."""
    missing: list[str] = field(default_factory=list)
    """In a model and not in the checkpoint."""
    unexpected: list[str] = field(default_factory=list)
    """In the checkpoint and not in a model."""
    reshaped: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of another shape or dtype -> what it is in the checkpoint, and in the model."""
    tied: dict[str, list[str]] = field(default_factory=dict)
    """Name of a tied tensor -> all of its names."""
    problems: list[str] = field(default_factory=list)
    """What cannot be loaded whatever may differ."""

    def add(self, other: Fit) -> None:
        self.loaded += other.loaded
        self.missing += other.missing
        self.unexpected += other.unexpected
        self.reshaped |= other.reshaped
        self.tied |= other.tied
        self.problems += other.problems


def innermost_module(model: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, DataParallel and torch.compile around it. A compiled module that fully_shard was
    called with (Accelerate does that) stays: it is what gathers the parameters.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod") and not is_unit(inner):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        else:
            return cast(nn.Module, inner)


def clean_name(name: str) -> str:
    """A parameter's name without the segments that torch.compile and checkpoint wrappers put in."""
    return _WRAPPERS.sub("", name).lstrip(".")


def keeps_own_buffers(model: nn.Module) -> bool:
    """Whether nobody makes buffers equal on all ranks: DDP does unless it is told not to, or found none when it was
    made (a forward pass may register them); fully_shard never does.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return is_sharded(model)
    return not getattr(model, "broadcast_buffers", True) or not getattr(model, "modules_buffers", True)


def capture_model(
    model: nn.Module,
    place: str,
    capture: Capture,
    own_buffers: bool,
    is_excluded: Callable[[str, Any], bool] = lambda full, value: False,
) -> None:
    """
    Args:
        is_excluded: told the full name and the value of each tensor: whether it is to be left out.
    """
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    seen: dict[Any, str] = {}
    extra: dict[str, Any] = {}
    for raw, value in _members(model):
        name = clean_name(raw)
        full = f"{place}/{name}"
        if is_excluded(full, value):
            continue
        if _is_extra(name, value):
            extra[name] = value
            continue
        if nn.parameter.is_lazy(value):
            raise UnsaveableStateError(f"{full} has no shape yet: call the model on one batch before the run is made.")
        if (first := seen.setdefault(storage_key(value), full)) != full:
            capture.aliases[full] = first
            continue
        capture.tensors[full] = _detached(value)
        if name in buffers and not isinstance(value, DTensor):
            capture.main_only.add(full)
            if own_buffers:
                capture.per_rank[full] = value.detach()
    if extra:  # what modules return from get_extra_state
        tensors: dict[str, torch.Tensor] = {}
        capture.state[f"{place}/~extra"] = encode(extra, f"{place}/~extra", tensors)
        capture.tensors |= tensors
        if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):  # each rank may have its own
            capture.main_only |= tensors.keys()
            capture.per_rank[f"buffer/{place}/~extra"] = pack(extra, f"{place}/~extra")
    for name, value in hidden_buffers(model):
        full = f"buffer/{place}/{name}"
        if not is_excluded(full, value):
            capture.tensors[full] = value.detach()
            capture.main_only.add(full)
            if own_buffers:
                capture.per_rank[full] = value.detach()


def hidden_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Non-persistent buffers: not in the state_dict, yet training may change them."""
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            value = module._buffers.get(name)
            if value is not None and not isinstance(value, DTensor):
                yield clean_name(f"{prefix}.{name}" if prefix else name), value


def _empty_buffers(model: nn.Module, place: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Buffers that are None here (full name, module, its name there): training may have made them in the run that
    saved.
    """
    for prefix, module in model.named_modules():
        for name, value in module._buffers.items():
            if value is None:
                full = f"{place}/{clean_name(f'{prefix}.{name}' if prefix else name)}"
                yield f"buffer/{full}" if name in module._non_persistent_buffers_set else full, module, name


def _make_buffers(model: nn.Module, place: str, source: TensorSource, own_buffers: bool) -> None:
    """Those that the checkpoint holds and that are None here."""
    here = next((p.device for p in model.parameters()), CPU)
    stored = {*source.names(f"{place}/"), *source.names(f"buffer/{place}/")}
    for full, module, name in list(_empty_buffers(model, place)):
        if full in stored:
            own = getattr(source, "own_name", lambda same: same)(full) if own_buffers else full
            setattr(module, name, source.create(own, here))


def _is_extra(name: str, value: Any) -> bool:
    """What a module returns from get_extra_state; a tensor from there is a new one at each call."""
    return not isinstance(value, torch.Tensor) or name.rpartition(".")[2] == "_extra_state"


def restore_model(
    model: nn.Module, place: str, source: TensorSource, own_buffers: bool, left_alone: Collection[str] = ()
) -> None:
    """
    Args:
        left_alone: full names of tensors that stay as they are.
    """
    _make_buffers(model, place, source, own_buffers)
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    with torch.no_grad():
        for name, value in tensors_as_stored(model, place, source):
            if (full := f"{place}/{name}") in left_alone:
                continue
            own = own_buffers and name in buffers and not isinstance(value, DTensor)
            source.fill(full, value) if not own else _fill_own(source, full, value)
        present = set(source.names(f"buffer/{place}/")) - set(left_alone)
        for name, value in hidden_buffers(model):
            full = f"buffer/{place}/{name}"
            if full in present and source.describe(full) == (tuple(value.shape), value.dtype):
                source.fill(full, value) if not own_buffers else _fill_own(source, full, value)


def restore_extra(
    model: nn.Module, place: str, state: Mapping[str, Json], source: TensorSource, here: torch.device
) -> None:
    """What this rank's modules returned from get_extra_state; the main rank's where the checkpoint does not know it.

    Args:
        here: the device on which tensors are that were on one of its type.
    """
    if not (json := state.get(f"{place}/~extra")):
        return
    own = source.own_name(f"buffer/{place}/~extra")
    if own != f"buffer/{place}/~extra":
        extra = unpack(source.create(own, CPU), here)
    else:
        extra = decode(json, lambda name, device: source.create(name, here if device == here.type else CPU))
    raw_names = {clean_name(raw): raw for raw in model.state_dict()}
    model.load_state_dict({raw_names.get(name, name): value for name, value in extra.items()}, strict=False)


def _fill_own(source: TensorSource, name: str, value: torch.Tensor) -> None:
    own = getattr(source, "own_name", lambda same: same)(name)
    source.fill(own, value)


def tensors_as_stored(model: nn.Module, place: str, source: TensorSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once. Which name of a tied one is stored is for its writer to choose: that one, or the first."""
    stored = set(source.names(f"{place}/"))
    for names, value in tied_names(model):
        yield next((name for name in names if f"{place}/{name}" in stored), names[0]), value


def tied_names(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    return group_tied((clean_name(raw), value) for raw, value in _members(model) if not _is_extra(raw, value))


def _members(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """The state_dict with the parameters themselves; see `_detached`."""
    members: Iterable[tuple[str, Any]] = model.state_dict(keep_vars=True).items()
    return members


def _detached(value: torch.Tensor) -> torch.Tensor:
    """On a rank that its mesh leaves out a DTensor is made anew by `detach`, and no longer shows what it is."""
    is_elsewhere = isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None
    return value if is_elsewhere else value.detach()


def fit_model(model: nn.Module, place: str, source: TensorSource, excluded: Collection[str] = ()) -> Fit:
    """
    Args:
        excluded: full names of tensors that the checkpoint need not hold.
    """
    live = {f"{place}/{name}": value for name, value in tensors_as_stored(model, place, source)}
    late = {full for full, _, _ in _empty_buffers(model, place)}
    saved = {name for name in source.names(f"{place}/") if not name.startswith(f"{place}/~extra/")} - late
    groups = [[f"{place}/{name}" for name in names if f"{place}/{name}" in saved] for names, _ in tied_names(model)]
    copies, problems = compare_copies(groups, lambda name: source.create(name, CPU))
    if void := sorted(name for name, value in live.items() if value.is_meta and name not in excluded):
        problems.append(
            f"{void[0]}{f' and {len(void) - 1} more' if len(void) > 1 else ''} of the model on the meta device have "
            f"no memory to load anything into: call model.to_empty(device=...) first"
        )
    here, there = set(live) - set(excluded), saved - copies - set(excluded)
    fit = Fit(missing=sorted(here - there), unexpected=sorted(there - here), problems=problems)
    for names, _ in tied_names(model):
        for full in [f"{place}/{name}" for name in names if len(names) > 1]:
            fit.tied[full] = [f"{place}/{name}" for name in names]
    for name in sorted(here & there):
        shape, dtype = source.describe(name)
        if (shape, dtype) == (tuple(live[name].shape), live[name].dtype):
            fit.loaded += 1
        else:
            fit.reshaped[name] = (f"{list(shape)} {dtype}", f"{list(live[name].shape)} {live[name].dtype}")
    return fit
