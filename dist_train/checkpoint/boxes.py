"""Where the elements of a sharded tensor lie: its placements -> the boxes of it that one rank holds.

Invariant: over the ranks of a mesh that hold different parts each element is in one box, and a rank's boxes fill its
local tensor exactly. It is computed from numbers alone, as torch splits (`torch.chunk`, mesh dimension by mesh
dimension), and needs none of torch's own functions for it, which know one box a rank and no uneven strides.
Source: `Shard._split_tensor` and `_StridedShard._split_tensor` in torch/distributed/tensor/placement_types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import cast

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dist_train.errors import UnsaveableStateError

Interval = tuple[int, int]
"""First index and the one after the last, in the whole tensor."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What one dimension of a mesh does to a tensor."""

    dim: int
    """Of the tensor, which is cut along it."""
    count: int
    """Ranks of the mesh along that dimension."""
    index: int
    """This rank's place among them."""
    strips: int = 1
    """What is there is cut into so many strips first and each rank gets its part of each (a strided shard)."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a whole tensor, and where it lies in a rank's local tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]


def boxes_of(name: str, tensor: DTensor) -> tuple[Box, ...]:
    """What this rank holds of a tensor; nothing where it is not in the tensor's mesh.

    Raises:
        UnsaveableStateError: names a tensor whose elements lie on no rank, or whose local part is not what its
            placements say.
    """
    mesh = tensor.device_mesh
    shardings = [_sharding(name, tensor, dim) for dim in range(mesh.ndim)]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    cuts = [
        Cut(dim=sharding.dim % tensor.dim(), count=count, index=index, strips=_strips(sharding))
        for count, index, sharding in zip(mesh.shape, coordinate, shardings, strict=True)
        if sharding is not None
    ]
    lengths, boxes = lay(tuple(tensor.shape), tuple(cuts))
    local = local_part(tensor)
    if tuple(local.shape) != lengths:
        raise UnsaveableStateError(
            f"{name} is a DTensor of {list(tensor.shape)} placed {list(tensor.placements)} on a mesh of "
            f"{list(mesh.shape)}: at {list(coordinate)} a part of {list(lengths)} belongs to it, and there is one "
            f"of {list(local.shape)}. Is it padded? Give DTensor.from_local the part without padding, and with it "
            f"shape= and stride= of the whole tensor where the parts differ in size."
        )
    return boxes


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that lies on this rank."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def region_of(local: torch.Tensor, local_offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """A view of the part of a local tensor that a box lies in."""
    for dim, (offset, size) in enumerate(zip(local_offsets, sizes, strict=True)):
        if size != local.shape[dim]:
            local = local.narrow(dim, offset, size)
    return local


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    if not isinstance(tensor, DTensor):
        return False
    sizes = tensor.device_mesh.shape
    return any(not isinstance(one, Replicate) and size > 1 for one, size in zip(tensor.placements, sizes, strict=True))


def _sharding(name: str, tensor: DTensor, dim: int) -> Shard | _StridedShard | None:
    """What a mesh dimension does to the tensor; None where it holds replicas (or the only term of a sum)."""
    placement = tensor.placements[dim]
    if isinstance(placement, Replicate) or (type(placement) is Partial and tensor.device_mesh.size(dim) == 1):
        return None
    if type(placement) in (Shard, _StridedShard):
        sharding = cast(Shard | _StridedShard, placement)
        if not -tensor.dim() <= sharding.dim < tensor.dim():
            raise UnsaveableStateError(
                f"{name} is a DTensor of {list(tensor.shape)} placed {placement} on mesh dimension {dim}: it has no "
                f"dimension {sharding.dim}. Give DTensor.from_local the placement that says how the parts lie."
            )
        return sharding
    if placement.is_partial():
        raise UnsaveableStateError(
            f"{name} is a DTensor placed {placement} on mesh dimension {dim}: its values are the sum (or the like) of "
            f"what several ranks hold, and lie on none of them. Reduce it before it is saved, for instance with "
            f"tensor.redistribute(placements=[Replicate()]), or leave it out of the state."
        )
    raise UnsaveableStateError(
        f"{name} is a DTensor placed {placement} on mesh dimension {dim}, a {type(placement).__qualname__}: which "
        f"elements a rank holds then is not known here. Redistribute it to Shard or Replicate before it is saved."
    )


def _strips(placement: Shard | _StridedShard) -> int:
    return int(placement.split_factor) if isinstance(placement, _StridedShard) else 1


@lru_cache(maxsize=4096)
def lay(shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """Size of the local tensor, and its boxes in row-major order."""
    held: list[list[Interval]] = [[(0, size)] if size else [] for size in shape]
    for cut in cuts:
        strips = (_chunk(held[cut.dim], cut.strips, strip) for strip in range(cut.strips))
        held[cut.dim] = [interval for strip in strips for interval in _chunk(strip, cut.count, cut.index)]
    lengths = tuple(sum(high - low for low, high in intervals) for intervals in held)
    corners = product(*(_place(_join(intervals)) for intervals in held))
    boxes = (tuple(zip(*corner, strict=True)) if corner else ((), (), ()) for corner in corners)
    return lengths, tuple(Box(*box) for box in boxes)


def _chunk(intervals: list[Interval], count: int, index: int) -> list[Interval]:
    """The piece that `torch.chunk` gives to `index` of `count`: all of one size but the last ones, which may be
    empty.
    """
    length = sum(high - low for low, high in intervals)
    size = -(-length // count)
    start, stop = min(index * size, length), min((index + 1) * size, length)
    kept = []
    for low, high in intervals:
        first, last = max(start, 0), min(stop, high - low)
        if first < last:
            kept.append((low + first, low + last))
        start, stop = start - (high - low), stop - (high - low)
    return kept


def _join(intervals: list[Interval]) -> list[Interval]:
    """Neighbours that continue each other are one."""
    joined: list[Interval] = []
    for low, high in intervals:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _place(intervals: list[Interval]) -> list[tuple[int, int, int]]:
    """(first index, size, place in the local tensor) of each."""
    placed, position = [], 0
    for low, high in intervals:
        placed.append((low, high - low, position))
        position += high - low
    return placed
