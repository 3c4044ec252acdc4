"""What scripts hold, sharded over two ranks: resumed there bit for bit, and loaded whole by one and by three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_ranks
from tests.support.kinds_sharded import SHARDED, load_all, save_all, torch_refuses
from tests.support.kinds_torch_refuses import TORCH_REFUSES
from tests.support.scripts import differences

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return list(run_ranks(save_all, 2, str(folder), deadline_seconds=180))


@pytest.fixture(scope="module", params=[1, 3])
def loaded(request: pytest.FixtureRequest, saved: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    results = run_ranks(load_all, request.param, str(folder), deadline_seconds=180)
    return dict(results[0])


@pytest.mark.parametrize("name", SHARDED)
def test_what_two_ranks_leave_and_resume_ends_as_the_bare_loop_does(name: str, saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        assert "error" not in rank[name], rank[name]["error"]
        assert rank[name]["differences"] == []


@pytest.mark.parametrize("name", SHARDED)
def test_another_number_of_ranks_loads_it_whole(name: str, saved: list[dict[str, Any]], loaded: dict[str, Any]) -> None:
    assert "error" not in loaded[name], loaded[name]["error"]
    assert differences(saved[0][name]["whole"], loaded[name]["whole"]) == []


def test_what_the_page_says_torch_refuses_is_refused_by_torch_alone() -> None:
    for told in run_ranks(torch_refuses, 2, deadline_seconds=60):
        assert {name for name, words in told.items() if TORCH_REFUSES[name][1] not in words} == set(), told
