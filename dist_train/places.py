"""Which samples are a rank's: its place among those that take different ones.

    mesh (dp 2, tp 2)      tp 0     tp 1         ranks of one row hold one copy of the model between them, and
                    dp 0   rank 0   rank 1       train it on the same samples: place 0 of 2
                    dp 1   rank 2   rank 3       place 1 of 2; the first rank of a row counts them

Invariant: each sample belongs to one place, and is counted by one rank of it. It is computed from the mesh alone, and
nothing here is collective.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_train.agreement import first_unlike
from dist_train.errors import ConfigError

Json = Any
DATA_DIMS = ("dp", "dp_replicate", "dp_shard")
"""What Accelerate, torchtitan and torch's tutorials call the dimensions of a mesh over which samples are divided."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's part of the data: part `index` of `count`."""

    index: int = 0
    count: int = 1
    counts: bool = True
    """Whether this rank counts the place's samples in losses and metrics: one rank of each place does."""
    ranks: tuple[int, ...] | None = None
    """Who is at this place; None where the data is divided over ranks and not over a mesh."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"rank {self.index} is outside a world of {self.count}; ranks count from 0")

    def to_json(self) -> dict[str, Json]:
        """For what a checkpoint keeps of each rank; nothing where a place is a rank."""
        return {} if self.ranks is None or self.ranks == (self.index,) else {"place": [self.index, self.count]}


def find_place(
    rank: int | None, world_size: int | None, mesh: Any | None = None, data_dims: str | Sequence[str] | None = None
) -> Place:
    """This rank's place: on a mesh, as it is told, of torch.distributed, or of RANK and WORLD_SIZE.

    Args:
        mesh: a `DeviceMesh` with names, of all ranks.
        data_dims: the names of the dimensions over which samples are divided; None for those of `DATA_DIMS`.

    Raises:
        ConfigError: they contradict, or the mesh leaves ranks or names out.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank and world_size belong together, found rank={rank}, world_size={world_size}")
    if mesh is not None:
        if rank is not None:
            raise ConfigError("mesh tells each rank its samples: leave out rank and world_size.")
        return _place_on(mesh, data_dims)
    if data_dims is not None:
        raise ConfigError(f"data_dims={data_dims!r} names dimensions of a mesh: give mesh=, too.")
    if rank is not None and world_size is not None:
        return Place(rank, world_size)
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def row_of(rows: Sequence[Mapping[str, Json]], rank: int, world_size: int, place: Place) -> int | None:
    """Which of the ranks of a checkpoint this one is, None where they stood otherwise."""
    is_same = len(rows) == world_size and rows[rank].get("place") == place.to_json().get("place")
    return rank if is_same else None


def row_like(rows: Sequence[Mapping[str, Json]], place: Place) -> int:
    """Whose random numbers a rank goes on with where ranks stand otherwise now: those of one place have the same, or
    what they drop of a layer that they share would differ.
    """
    places = [row.get("place", [index])[0] for index, row in enumerate(rows)]
    return places.index(min(place.index, max(places)))


def describe_ranks(world_size: int, place: Sequence[int] | None) -> str:
    """ "4 ranks", or on a mesh "4 ranks in 2 places"."""
    if place is None:
        return f"{world_size} rank{'s' if world_size > 1 else ''}"
    return f"{world_size} ranks in {place[1]} place{'s' if place[1] > 1 else ''}"


def require_shared_out(places: Sequence[Sequence[int]], world_size: int) -> None:
    """Raises ConfigError unless each part of the data has one rank that counts it.

    Args:
        places: (index, count, whether it counts) of each rank.
    """
    counting = sorted(index for index, _, counts in places if counts)
    if len({count for _, count, _ in places}) == 1 and counting == list(range(places[0][1])):
        return
    told = ", ".join(f"{index} of {count}" for index, count, _ in places)
    raise ConfigError(
        f"The training loader does not give each sample to one rank: the {world_size} ranks take the parts {told}. "
        f"Leave rank and world_size out of dist_train.data_loader; where ranks share a copy of the model (tensor "
        f"parallel) and take the same samples, give it mesh= instead, the mesh of all ranks."
    )


def require_one_order(orders: Sequence[Mapping[str, Json]]) -> None:
    """Raises ConfigError where ranks would make different numbers of passes and wait for each other, or lose samples.

    Args:
        orders: of each rank, what decides its loader's order.
    """
    if unlike := first_unlike(orders):
        raise ConfigError(
            f"The training loaders of the ranks differ: {unlike}. Give dist_train.data_loader the same dataset and the "
            f"same settings on every rank; it shares the samples out by itself."
        )


def _place_on(mesh: Any, data_dims: str | Sequence[str] | None) -> Place:
    names = tuple(mesh.mesh_dim_names or ())
    chosen = _choose(names, data_dims, tuple(mesh.shape))
    ranks: torch.Tensor = mesh.mesh
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    coordinate = mesh.get_coordinate()
    if sorted(ranks.reshape(-1).tolist()) != list(range(world_size)) or coordinate is None:
        raise ConfigError(
            f"mesh has the ranks {ranks.reshape(-1).tolist()}, and there are {world_size}: give the mesh of all ranks "
            f"(not mesh['dp']), and name the dimensions over which samples are divided: data_dims={list(chosen)!r}."
        )
    index, count = 0, 1
    mine = ranks
    for dim, name in reversed(list(enumerate(names))):
        if name in chosen:
            index, count = index + coordinate[dim] * count, count * ranks.shape[dim]
            mine = mine.narrow(dim, coordinate[dim], 1)
    here = tuple(mine.reshape(-1).tolist())
    return Place(index, count, counts=here[0] == dist.get_rank() if dist.is_initialized() else True, ranks=here)


def _choose(names: tuple[str, ...], data_dims: str | Sequence[str] | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    asked = (data_dims,) if isinstance(data_dims, str) else DATA_DIMS if data_dims is None else tuple(data_dims)
    unknown = sorted(set(asked) - set(names))
    chosen = tuple(name for name in names if name in asked)
    if (unknown and data_dims is not None) or (not chosen and data_dims is None):
        called = ", ".join(names) or "nothing (it was made without mesh_dim_names)"
        missing = f", and data_dims names {', '.join(unknown)}" if data_dims is not None else ""
        raise ConfigError(
            f"The dimensions of the mesh of {list(shape)} are called {called}{missing}. Say over which of them samples "
            f"are divided, data_dims=('dp',) for instance, or () for none; ranks along the others take the same ones."
        )
    return chosen
