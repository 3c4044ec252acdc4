"""Optimizer state that each rank has of its own: of an optimizer that works on the local part of a sharded parameter
(`p.to_local()`, blocks of 8 bits), in plain tensors. They look as if they were equal on all ranks, and are not.

Invariant: such a tensor is kept for every rank, under a name of each rank's own, and given back to the same rank of the
same layout only. What is not cut by the layout (a counter, a copy of the whole) goes to any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dist_train.capture import Capture
from dist_train.optimizer_state import CPU, TensorSource, member_names

Json = Any


def set_apart(capture: Capture, place: str, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
    """Moves such tensors from what is equal on all ranks to what differs; `apart` in the optimizer's JSON tells which,
    and of what layout.
    """
    json = capture.state[place]
    apart: dict[str, Json] = {}
    for name, parameter in _members(optimizer, names):
        if not _is_cut(parameter) or name not in json["state"]:
            continue
        found = [one for one in _tensor_names(json["state"][name]) if _is_apart(capture, place, one)]
        for one in found:
            if one in capture.tensors:
                capture.per_rank[one] = capture.tensors.pop(one)
        if found:  # of what is seldom: asking torch for a mesh's ranks takes as long as all the rest of a capture
            apart[name] = {"layout": layout_of(parameter), "shape": list(parameter.shape), "tensors": found}
    if apart:
        json["apart"] = apart


def compare_apart(
    optimizer: torch.optim.Optimizer, place: str, names: dict[int, str], source: TensorSource, json: Json
) -> list[str]:
    """What keeps state of ranks from being given back."""
    live = dict(_members(optimizer, names))
    problems = []
    for name, saved in json.get("apart", {}).items():
        parameter = live.get(name)
        layout = None if parameter is None else layout_of(parameter)
        if parameter is None or layout == saved["layout"]:
            continue
        cut = [one for one in saved["tensors"] if not _is_for_any_layout(source, one, saved["shape"])]
        if cut:
            here = "whole on every rank" if layout is None else _text(layout)
            problems.append(
                f"{place}: {cut[0]} (and what else the optimizer keeps for {name}) is plain values of each rank, for "
                f"its own part of a parameter that was {_text(saved['layout'])} and is {here} now; nothing tells how "
                f"to cut them anew. Continue on the same ranks and mesh, or start the optimizer afresh"
            )
    return problems


def layout_of(parameter: torch.Tensor) -> Json:
    """How a parameter is spread, in words that are the same on all ranks; None where every rank holds all of it."""
    if not isinstance(parameter, DTensor) or not _is_cut(parameter):
        return None
    mesh, placements = parameter.device_mesh, [_placement_text(one) for one in parameter.placements]
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return {"world_size": world_size, "mesh": list(mesh.shape), "strides": _strides(mesh), "placements": placements}


def _is_cut(parameter: torch.Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    if not isinstance(parameter, DTensor):
        return False
    sizes = parameter.device_mesh.shape
    pairs = zip(parameter.placements, sizes, strict=True)
    return any(not isinstance(placement, Replicate) and size > 1 for placement, size in pairs)


def _strides(mesh: DeviceMesh) -> list[int]:
    """How far apart in rank neighbours are along each dimension of a mesh."""
    ranks = mesh.mesh
    first = ranks.reshape(-1)[0]
    return [int(ranks.select(dim, min(1, size - 1)).reshape(-1)[0] - first) for dim, size in enumerate(ranks.shape)]


def _placement_text(placement: Any) -> str:
    if isinstance(placement, Replicate):
        return "replicate"
    strips = getattr(placement, "split_factor", 1)
    return f"shard {placement.dim}" + (f" in {strips} strips" if strips > 1 else "")


def _text(layout: Json) -> str:
    where = f"a mesh of {layout['mesh']} (ranks {layout['strides']} apart) of {layout['world_size']} ranks"
    return f"spread by [{', '.join(layout['placements'])}] over {where}"


def _members(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        yield from zip(member_names(index, group, names), group["params"], strict=True)


def _tensor_names(json: Json) -> Iterator[str]:
    """Of the tensors that a nested value holds."""
    if isinstance(json, Mapping):
        if json.get("$") == "tensor":
            yield json["name"]
        else:
            for value in json.values():
                yield from _tensor_names(value)
    elif isinstance(json, list):
        for value in json:
            yield from _tensor_names(value)


def _is_apart(capture: Capture, place: str, name: str) -> bool:
    """A plain tensor with a dimension, of the optimizer's own."""
    if name in capture.per_rank:
        return True
    tensor = capture.tensors.get(name)
    return tensor is not None and not isinstance(tensor, DTensor) and tensor.dim() > 0 and name.startswith(f"{place}/")


def _is_for_any_layout(source: TensorSource, name: str, shape: list[int]) -> bool:
    """Whether all ranks have the same, and it is one number, or has the shape of the whole parameter."""
    first, *others = [source.create(one, CPU) for one in source.own_names(name)]
    if first.numel() != 1 and list(first.shape) != shape:
        return False
    bits = first.reshape(-1).view(torch.uint8)
    alike = [one for one in others if (one.shape, one.dtype) == (first.shape, first.dtype)]
    return len(alike) == len(others) and all(torch.equal(one.reshape(-1).view(torch.uint8), bits) for one in alike)
