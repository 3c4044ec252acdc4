"""Accumulation over a sharded model, by hand and through Accelerate: a save within a window is that of its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.scripts import differences
from tests.support.sharded_windows import by_hand, told_at_each_micro_batch, with_accelerate

pytestmark = pytest.mark.distributed


def test_a_save_within_a_window_by_hand_is_made_at_its_end_and_resumes_as_the_bare_loop(tmp_path: Path) -> None:
    assert run_ranks(by_hand, 2, str(tmp_path / "run"), deadline_seconds=60) == [[], []]


def test_a_step_that_leaves_gradients_unreduced_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for told in run_ranks(told_at_each_micro_batch, 2, str(tmp_path / "run"), deadline_seconds=60):
        assert "wait for their reduction" in told
        assert "Call run.step() once an update" in told


def test_a_save_within_a_window_of_accelerate_resumes_as_the_run_that_was_not_left(tmp_path: Path) -> None:
    left = run_ranks(with_accelerate, 2, str(tmp_path / "left"), deadline_seconds=60)
    whole = run_ranks(with_accelerate, 2, str(tmp_path / "whole"), 1, deadline_seconds=60)
    for one, other in zip(left, whole, strict=True):
        assert differences(one, other) == []
