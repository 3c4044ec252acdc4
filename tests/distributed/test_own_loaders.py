"""A DataLoader of the user's with worker processes, and on two ranks: killed runs end as those that were not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forked import run_script
from tests.support.launch import ROOT
from tests.support.own_loaders import UPDATES_PER_EPOCH, assert_same, plain, train, train_bare


def with_workers() -> Any:
    return plain(num_workers=2)


def with_persistent_workers() -> Any:
    return plain(num_workers=2, persistent_workers=True)


@pytest.mark.distributed
def test_shuffled_and_augmented_by_two_workers_the_run_ends_as_the_bare_loop(tmp_path: Path) -> None:
    straight = train_bare(with_workers, epochs=2)
    train(tmp_path, with_workers, leave_at=3, epochs=2)
    train(tmp_path, with_workers, leave_at=UPDATES_PER_EPOCH + 4, epochs=2)
    assert_same(train(tmp_path, with_workers, epochs=2), straight)


@pytest.mark.slow
@pytest.mark.distributed
def test_persistent_workers_keep_the_order_and_augmentation_is_what_the_caveat_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train_bare(with_persistent_workers, epochs=2)
    train(tmp_path / "first", with_persistent_workers, leave_at=3, epochs=1)
    within_the_first = train(tmp_path / "first", with_persistent_workers, epochs=1)
    for step, batch in within_the_first.seen.items():  # the workers are as young as they were
        assert torch.equal(batch, straight.seen[step])
    train(tmp_path / "second", with_persistent_workers, leave_at=UPDATES_PER_EPOCH + 4, epochs=2)
    resumed = train(tmp_path / "second", with_persistent_workers, epochs=2)
    assert min(resumed.seen) == UPDATES_PER_EPOCH + 4
    for step, batch in resumed.seen.items():
        assert torch.equal(batch[:, 0], straight.seen[step][:, 0]), "the samples"
        assert not torch.equal(batch[:, 1:], straight.seen[step][:, 1:]), "the caveat would be idle talk"
    assert "persistent_workers=True keeps the workers' random state" in capsys.readouterr().err


@pytest.mark.distributed
def test_on_two_ranks_an_order_and_loaders_of_the_user_s_resume_exactly(tmp_path: Path) -> None:
    run_script(2, str(ROOT / "tests/support/two_rank_loops.py"), str(tmp_path), deadline_seconds=120)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for loop in ("ordered", "distributed", "stateful"):
        assert [rank[loop]["differs"] for rank in ranks] == [[], []], loop
        assert ["batch 0" in rank[loop]["batches"] for rank in ranks] == [False, False], "it began again"
        assert ranks[0][loop]["first"] != ranks[1][loop]["first"], "the ranks have the same data"
