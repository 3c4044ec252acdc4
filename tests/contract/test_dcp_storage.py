"""What `torch.distributed.checkpoint` does with torch's own storage it does with ours, and the results are equal."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dcp_cases import ALONE, IN_PROCESSES, ON_A_GPU, RELAY, TOGETHER, run_all, run_case, run_relay
from tests.support.dcp_together import load_from_a_run
from tests.support.forked import run_ranks


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Types, bits and structure; a NaN is the same as a NaN."""
    assert type(one) is type(other), f"{place}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), place
        assert bits(one) == bits(other), place
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.tolist()) == (other.dtype, other.tolist()), place
    elif isinstance(one, dict):
        assert set(one) == set(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    else:
        assert one == other or (one != one and other != other), f"{place}: {one!r} and {other!r}"


def orders(value: Any) -> Any:
    """The order of every dictionary's keys; with several ranks torch's own follows from who wrote what."""
    if isinstance(value, dict):
        return [(key, orders(inner)) for key, inner in value.items()]
    return [orders(inner) for inner in value] if isinstance(value, (list, tuple)) else None


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch warns of every save without a process group, and of every checkpoint that it replaces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", ALONE)
def test_one_process_sees_no_difference(case: str, tmp_path: Path) -> None:
    results = run_case(case, str(tmp_path))
    assert_same(results["torch"], results["ours"], case)
    assert orders(results["torch"]) == orders(results["ours"])
    assert results["ours"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_a_gpu_sees_no_difference(case: str, tmp_path: Path) -> None:
    results = run_case(case, str(tmp_path))
    assert_same(results["torch"], results["ours"], case)


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow, id="2 ranks"), pytest.param(4, id="4 ranks")]
)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Case -> each rank's results, all from one world of ranks."""
    names = list(TOGETHER)
    root = str(tmp_path_factory.mktemp("together"))
    ranks = run_ranks(run_all, request.param, root, names, deadline_seconds=120)
    return {name: [torch.load(io.BytesIO(one[name]), weights_only=False) for one in ranks] for name in names}


@pytest.mark.distributed
@pytest.mark.parametrize("case", TOGETHER)
def test_several_ranks_see_no_difference(case: str, together: dict[str, list[Any]]) -> None:
    for rank, results in enumerate(together[case]):
        assert_same(results["torch"], results["ours"], f"{case} on rank {rank}")
        assert results["ours"]


@pytest.mark.distributed
def test_other_numbers_of_ranks_see_no_difference(tmp_path: Path) -> None:
    """FSDP2 over tensor parallel pairs, one such pair, then FSDP2 alone on three."""
    wholes = []
    for before, ranks, after in zip((None, *RELAY[:-1]), RELAY, (*RELAY[:-1], None), strict=True):
        names = [None if one is None else f"of-{one}" for one in (before, ranks if after else None)]
        answers = run_ranks(run_relay, ranks, str(tmp_path), *names, deadline_seconds=60)
        for rank, answer in enumerate(answers):
            results = torch.load(io.BytesIO(answer), weights_only=False)
            assert_same(results["torch"], results["ours"], f"rank {rank} of {ranks}")
            wholes.append(results["ours"][0])
    assert len(wholes) == sum(RELAY)
    for whole in wholes[1:]:
        assert_same(whole, wholes[0])


@pytest.mark.distributed
def test_dcp_loads_a_sharded_run_on_as_many_and_on_fewer_ranks(tmp_path: Path) -> None:
    """Tensor parallel pairs under FSDP2 on four; one pair on two, whose own first step gives the same values."""
    for ranks in (4, 2):
        for mine, loaded in run_ranks(load_from_a_run, ranks, str(tmp_path), ranks == 4):
            assert loaded == mine


@pytest.mark.slow
@pytest.mark.distributed
def test_a_save_in_another_process_sees_no_difference(tmp_path: Path) -> None:
    """`async_save` sends the writer there, and its planner and state."""
    for ranks in run_ranks(run_all, 2, str(tmp_path), list(IN_PROCESSES), deadline_seconds=120):
        for case in IN_PROCESSES:
            results = torch.load(io.BytesIO(ranks[case]), weights_only=False)
            assert_same(results["torch"], results["ours"], case)
