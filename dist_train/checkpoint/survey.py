"""What a rank cannot see of the others and a plan depends on: copies of sharded tensors on other meshes, and tensors of
which each rank has one of its own size.

Invariant: nothing is exchanged but one small vector where every mesh covers the world and no such tensor is there;
never a list of all ranks' boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_train.capture import Capture
from dist_train.checkpoint.manifest import digest_of
from dist_train.checkpoint.tensor_file import DTYPE_NAMES
from dist_train.errors import DisagreementError
from dist_train.world import World

Json = Any


@dataclass(frozen=True, slots=True)
class Survey:
    """What the ranks have told each other. The default is right for one rank, and where all meshes cover the world."""

    copies: Mapping[DeviceMesh, tuple[int, int]] = field(default_factory=dict)
    """Of a mesh that does not cover the world: which of the meshes that hold the same tensors it is, of how many."""
    apart: Mapping[str, list[Json]] = field(default_factory=dict)
    """Each rank's [shape, dtype] of what has no common value, by name."""


def take_survey(capture: Capture, world: World) -> Survey:
    """Collective.

    Raises:
        DisagreementError: the ranks lay the tensors out on meshes that do not correspond to each other.
    """
    meshes, used = _small_meshes(capture, world.world_size)
    apart = {name: value for name, value in capture.per_rank.items() if name not in capture.tensors}
    most = world.max([len(meshes), len(apart)], "whether ranks hold what others do not see")
    return Survey(
        copies=_find_copies(meshes, used, world) if most[0] else {}, apart=_exchange(apart, world) if most[1] else {}
    )


def _small_meshes(capture: Capture, world_size: int) -> tuple[list[DeviceMesh], Json]:
    """Meshes that do not cover the world, in the order of the first tensor's name, and which tensors lie on each."""
    meshes: dict[DeviceMesh, list[str]] = {}
    for name, tensor in sorted(capture.tensors.items(), key=lambda item: item[0]):
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() < world_size:
            meshes.setdefault(tensor.device_mesh, []).append(name)
    return list(meshes), list(meshes.values())


def _find_copies(meshes: list[DeviceMesh], used: Json, world: World) -> dict[DeviceMesh, tuple[int, int]]:
    """Each mesh stands for its lowest rank, so that a vector of one number a rank tells them all."""
    world.require_equal(digest_of(used), "device meshes (which tensors lie on which mesh)")
    leaders = [int(mesh.mesh.min()) for mesh in meshes]
    marks = [[rank == leader for rank in range(world.world_size)] for leader in leaders]
    told = world.max([int(mark) for row in marks for mark in row], "which meshes hold copies of the same tensors")
    found = {}
    for place, (mesh, leader) in enumerate(zip(meshes, leaders, strict=True)):
        row = told[place * world.world_size : (place + 1) * world.world_size]
        others = [rank for rank, mark in enumerate(row) if mark]
        found[mesh] = (others.index(leader), len(others))
    return found


def _exchange(apart: Mapping[str, torch.Tensor], world: World) -> dict[str, list[Json]]:
    try:
        world.require_equal(digest_of(list(apart)), "names of tensors of which each rank has its own")
    except DisagreementError as error:
        rows = world.gather(list(apart), "names of tensors of which each rank has its own")
        rank = next(rank for rank, row in enumerate(rows) if row != rows[0])
        told = only_one_has(rows[0], rows[rank], rank)
        raise DisagreementError(f"The ranks do not hold the same state: {told}.") from error
    mine = [[list(value.shape), DTYPE_NAMES.get(value.dtype, "")] for value in apart.values()]
    rows = world.gather(mine, "the shapes of tensors of which each rank has its own")
    return {name: [row[place] for row in rows] for place, name in enumerate(apart)}


def only_one_has(main: Collection[str], other: Collection[str], rank: int) -> str:
    """The first name that the main rank has and another has not, or the reverse, for people; of two orders of the same
    names that.
    """
    ours, theirs = set(main), set(other)
    missing = [name for name in main if name not in theirs]
    strange = [name for name in other if name not in ours]
    if not missing and not strange:
        return f"rank {rank} has the same tensors as rank 0 in another order"
    having, lacking, name = (0, rank, missing[0]) if missing else (rank, 0, strange[0])
    skips = " (does the optimizer pass over parts without elements? It must keep empty state for them, too)"
    return f"rank {having} has {name} and rank {lacking} has not{skips if name.startswith('optimizer/') else ''}"
