"""Layouts that torch allows and no framework makes: saved as one and loaded as another, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from dist_train.errors import DisagreementError, UnsaveableStateError
from tests.support.forked import run_ranks
from tests.support.layout_matrix import quietly
from tests.support.odd_layouts import CASES, RANKS, Case, Model, load_cases, open_run, save_cases, wrong_in

pytestmark = pytest.mark.distributed


def neighbours(cases: list[Case]) -> list[tuple[Case, Case]]:
    """Each is loaded as the next one, the last as the first."""
    return list(zip(cases, cases[1:] + cases[:1], strict=True))


def test_odd_layouts_load_as_their_neighbour_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(save_cases, RANKS, CASES, tmp_path)
    pairs = neighbours(CASES)
    for rank in run_ranks(load_cases, RANKS, pairs, tmp_path):
        assert rank == {(source.name, target.name): [] for source, target in pairs}


@pytest.mark.slow
def test_every_odd_layout_loads_as_every_other(tmp_path: Path) -> None:
    run_ranks(save_cases, RANKS, CASES, tmp_path)
    for target in CASES:  # few loads a process: gloo keeps the threads of every mesh
        pairs = [(source, target) for source in CASES]
        for rank in run_ranks(load_cases, RANKS, pairs, tmp_path):
            assert rank == {(source.name, target.name): [] for source in CASES}


def missed(case: Case) -> list[str]:
    return wrong_in(Model(case, empty=True), case)


def test_the_comparison_sees_what_was_not_loaded() -> None:
    for rank, told in enumerate(run_ranks(missed, RANKS, CASES[0])):
        assert {"matrix", "of_bool"} <= set(told), f"rank {rank}"


# What is refused, on two ranks


def padded() -> torch.Tensor:
    return _of_parts(torch.ones(2, 2), Shard(0), (3, 2))


def of_no_such_dimension() -> torch.Tensor:
    return _of_parts(torch.ones(2, 2), Shard(3), (2, 2))


def strided_over_no_such_dimension() -> torch.Tensor:
    return _of_parts(torch.ones(2, 2), _StridedShard(3, split_factor=2), (2, 2))


def of_terms() -> torch.Tensor:
    return _of_parts(torch.ones(2, 2), Partial(), (2, 2))


def of_a_shape_of_each_rank() -> torch.Tensor:
    local = torch.ones(2 - dist.get_rank(), 2)
    return DTensor.from_local(local, _mesh([0, 1]), [Shard(0)], run_check=False)


def of_a_dtype_of_each_rank() -> torch.Tensor:
    return torch.ones(2, 2, dtype=(torch.float32, torch.float64)[dist.get_rank()])


def plain_on_one_rank() -> torch.Tensor:
    return _of_parts(torch.ones(2, 2), Shard(0), (4, 2)) if dist.get_rank() else torch.ones(4, 2)


def on_meshes_of_another_order() -> torch.Tensor:
    mesh = [_mesh([0, 1]), _mesh([1, 0])][dist.get_rank()]
    return DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)


def on_one_rank_only() -> torch.Tensor | None:
    return torch.ones(2) if dist.get_rank() else None


def _mesh(ranks: list[int]) -> DeviceMesh:
    return DeviceMesh("cpu", ranks)


def _of_parts(local: torch.Tensor, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    stride = torch.empty(shape).stride()
    return DTensor.from_local(
        local, _mesh([0, 1]), [placement], run_check=False, shape=torch.Size(shape), stride=stride
    )


def refusal(run_dir: Path, make: Callable[[], torch.Tensor | None]) -> str:
    """On each rank: what a run with such a tensor is told before its first update."""
    model = nn.Linear(2, 2)
    value = make()
    if value is not None:
        model.register_parameter("odd", nn.Parameter(value, requires_grad=False))
    with quietly():
        try:
            with open_run(run_dir, model, "never") as run:
                for _ in run.epochs(1):
                    return "it began"
        except (DisagreementError, UnsaveableStateError) as error:
            return str(error)
    return "it ended"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            padded,
            "On rank 1: model/odd is a DTensor of [3, 2] placed [Shard(dim=0)] on a mesh of [2]: at [1] a part of",
        ),
        (of_no_such_dimension, "model/odd is a DTensor of [2, 2] placed S(3) on mesh dimension 0: it has no dimension"),
        (strided_over_no_such_dimension, "on mesh dimension 0: it has no dimension 3"),
        (of_terms, "model/odd is a DTensor placed P(sum) on mesh dimension 0"),
        (of_a_shape_of_each_rank, "model/odd is [4, 2] F32 on rank 0 and [2, 2] F32 on rank 1"),
        (of_a_dtype_of_each_rank, "model/odd is [2, 2] F32 on rank 0 and [2, 2] F64 on rank 1"),
        (plain_on_one_rank, "model/odd is held whole on rank 0 and sharded on rank 1"),
        (on_meshes_of_another_order, "model/odd: the ranks would write some of its elements twice"),
        (on_one_rank_only, "rank 1 has model/odd and rank 0 has not"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_told_on_every_rank_before_the_first_update(
    tmp_path: Path, make: Callable[[], torch.Tensor | None], expected: str
) -> None:
    for told in run_ranks(refusal, 2, tmp_path / "run", make):
        assert expected in told
