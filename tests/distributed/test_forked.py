"""The harness that forks ranks: what a rank returns comes back in order, and a failing or silent rank is named."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from dist_train.world import current_world
from tests.support.forked import run_ranks

pytestmark = pytest.mark.distributed


def rank_and_sum() -> tuple[int, int]:
    world = current_world()
    return world.rank, world.sum([world.rank], "ranks")[0]


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank one")
    dist.barrier()


def fall_silent() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(rank_and_sum, 3) == [(0, 3), (1, 3), (2, 3)]
    assert run_ranks(rank_and_sum, 1) == [(0, 0)]


def test_an_error_of_one_rank_is_raised_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2(?s:.*)fail_on_one(?s:.*)of rank one"):
        run_ranks(fail_on_one, 2)


def test_a_silent_rank_is_named_at_the_deadline() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] did not answer"):
        run_ranks(fall_silent, 2, deadline_seconds=3)
