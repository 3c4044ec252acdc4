"""Layouts and tensors that no framework makes and torch allows: each saved as one and loaded as others, bit for bit.

A case is a way to lay a tensor out on four ranks. The model of a case has a tensor of every kind (shapes that have
fewer rows than ranks, no elements, no dimensions; every dtype) laid out in that way, with the ranks' parts in odd
memory, too. Everything goes through `Run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import dist_train as dt
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.cycle import sample_tensor
from tests.support.layout_matrix import as_torch_splits, quietly, same_bits

RANKS = 4
Grid = list[int] | list[list[int]] | list[list[list[int]]]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    ranks: Grid
    placements: tuple[Placement, ...]
    """Dimension 9 stands for a tensor's last one, 1 for its second one where it has one."""


def _strided(dim: int, strips: int) -> Placement:
    return _StridedShard(dim, split_factor=strips)


LINE: Grid = [0, 1, 2, 3]
SQUARE: Grid = [[0, 1], [2, 3]]
CASES = [
    Case("rows", LINE, (Shard(0),)),
    Case("last dimension", LINE, (Shard(9),)),
    Case("whole", LINE, (Replicate(),)),
    Case("rows twice", SQUARE, (Shard(0), Shard(0))),
    Case("columns, then rows", SQUARE, (Shard(1), Shard(0))),
    Case("rows, then columns", SQUARE, (Shard(0), Shard(1))),
    Case("strided rows within rows", SQUARE, (_strided(0, 2), Shard(0))),
    Case("strips of three", LINE, (_strided(0, 3),)),
    Case("strided both ways", SQUARE, (_strided(9, 5), _strided(0, 3))),
    Case("copies of rows", SQUARE, (Replicate(), Shard(0))),
    Case("rows of copies", SQUARE, (Shard(0), Replicate())),
    Case("ranks in another order", [2, 0, 3, 1], (Shard(0),)),
    Case("a square in another order", [[3, 1], [0, 2]], (Shard(1), Shard(0))),
    Case("two of the ranks", [3, 1], (Shard(0),)),
    Case("three of the ranks", [2, 3, 0], (_strided(0, 2),)),
    Case("one of the ranks", [2], (Shard(0),)),
    Case("a line of a square", [[[0], [1], [2], [3]]], (Partial(), Shard(0), Shard(9))),
    Case("a cube", [[[0, 1]], [[2, 3]]], (Shard(0), Replicate(), Shard(0))),
]
SHAPES: dict[str, tuple[int, ...]] = {
    "number": (),
    "one": (1,),
    "three": (3,),
    "seven": (7,),
    "matrix": (13, 6),
    "low": (2, 3, 5),
    "none": (0, 4),
    "hollow": (5, 0),
    "kernel": (5, 4, 3, 3),
}
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool, torch.uint8),
    *(torch.int8, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)
MEMORIES = ("plain", "columns first", "every second")


class Model(nn.Module):
    """Of one case: tensors that are not trained, and one weight that is."""

    def __init__(self, case: Case, *, empty: bool) -> None:
        super().__init__()
        mesh = DeviceMesh("cpu", case.ranks)
        self.linear = nn.Linear(2, 2)
        for index, (name, shape, dtype) in enumerate(_kinds()):
            whole = expected(shape, dtype)
            value = _lay(torch.zeros_like(whole) if empty else whole, mesh, case, MEMORIES[index % len(MEMORIES)])
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _kinds() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Each shape in one dtype and each dtype in one shape."""
    shapes = [(name, shape, DTYPES[index % len(DTYPES)]) for index, (name, shape) in enumerate(SHAPES.items())]
    return shapes + [(f"of_{str(dtype).removeprefix('torch.')}", (7, 3), dtype) for dtype in DTYPES]


def expected(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return sample_tensor(dtype, shape)


def _lay(whole: torch.Tensor, mesh: DeviceMesh, case: Case, memory: str) -> DTensor:
    placements = [_fitting(one, whole.dim()) for one in case.placements]
    if whole.dim() == 0:  # of such from_local forgets the shape on ranks outside of the mesh
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    local = _in_memory(as_torch_splits(whole, mesh, placements).clone(), memory)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def _fitting(placement: Placement, dims: int) -> Placement:
    if not isinstance(placement, (Shard, _StridedShard)) or dims == 0:
        return placement if not isinstance(placement, (Shard, _StridedShard)) else Replicate()
    dim = min(placement.dim, dims - 1)
    return Shard(dim) if type(placement) is Shard else _strided(dim, placement.split_factor)


def _in_memory(local: torch.Tensor, memory: str) -> torch.Tensor:
    """The same values, laid out otherwise."""
    if memory == "columns first":
        turned = local.permute(*reversed(range(local.dim()))).contiguous()
        return turned.permute(*reversed(range(local.dim())))
    if memory == "every second" and local.dim():
        wide = torch.zeros((*local.shape[:-1], 2 * local.shape[-1]), dtype=local.dtype)
        wide[..., ::2] = local
        return wide[..., ::2]
    return local


def wrong_in(model: Model, case: Case) -> list[str]:
    """Names of what is not, bit for bit, what belongs on this rank; outside of the mesh nothing does."""
    mesh = DeviceMesh("cpu", case.ranks)
    if mesh.get_coordinate() is None:
        return []
    wrong = []
    for name, shape, dtype in _kinds():
        value = getattr(model, name)
        placements = [_fitting(one, len(shape)) for one in case.placements]
        if not same_bits(value.to_local(), as_torch_splits(expected(shape, dtype), mesh, placements)):
            wrong.append(name)
    return wrong


def open_run(run_dir: Path, model: nn.Module, resume: str) -> Run:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = RunOptions(own_gradients=True, hang_timeout="off")
    policy = dt.CheckpointPolicy(at_end=False)
    return Run(str(run_dir), model=model, optimizer=optimizer, policy=policy, resume=resume, options=options)


def save_cases(cases: Sequence[Case], folder: Path) -> None:
    """On every rank: a run of each case, saved once."""
    with quietly():
        for case in cases:
            with open_run(folder / case.name, Model(case, empty=False), "never") as run:
                for _ in run.epochs(1):
                    run.step()
                    run.save(wait=True)


def load_cases(pairs: Sequence[tuple[Case, Case]], folder: Path) -> dict[tuple[str, str], list[str]]:
    """On every rank: what is wrong after each second case has resumed from the run of the first."""
    found = {}
    with quietly():
        for source, target in pairs:
            model = Model(target, empty=True)
            with open_run(folder / source.name, model, "must") as run:
                for _ in run.epochs(0):
                    pass
            found[source.name, target.name] = wrong_in(model, target)
    return found
