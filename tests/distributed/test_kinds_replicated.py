"""What scripts hold, under DistributedDataParallel on two ranks: resumed bit for bit, or refused by the save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_ranks
from tests.support.kinds_replicated import REPLICATED, save_all, unlike_buffers

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(run_ranks(save_all, 2, str(tmp_path_factory.mktemp("kinds")), deadline_seconds=120))


@pytest.mark.parametrize("name", REPLICATED)
def test_what_two_ranks_leave_and_resume_ends_as_the_bare_loop_does(name: str, saved: list[dict[str, Any]]) -> None:
    for rank in saved:
        assert "error" not in rank[name], rank[name]["error"]
        assert rank[name]["differences"] == []


def test_a_buffer_of_another_shape_on_each_rank_is_refused_by_the_save_and_named(tmp_path: Path) -> None:
    for told in run_ranks(unlike_buffers, 2, str(tmp_path / "run"), deadline_seconds=60):
        assert "model/moving is [1, 4] F32 on rank 0 and [2, 4] F32 on rank 1" in told
