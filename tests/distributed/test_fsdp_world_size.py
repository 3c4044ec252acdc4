"""Law 5 for sharded models: the number of ranks may change in mid-epoch, and every sample is used once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.fsdp_specimen import EPOCHS, NUM_SAMPLES
from tests.support.launch import ROOT
from tests.support.small_run import events_of
from tests.support.twins import consumed_samples

SPECIMEN = str(ROOT / "tests/support/fsdp_specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0
UPDATES_PER_EPOCH = 4

pytestmark = pytest.mark.distributed


def train_on(world_sizes: list[int], folder: Path, loop: str, seed: int) -> str:
    """Each life but the last is killed at a moment of training. Returns the run directory."""
    run_dir = str(folder / "run")
    options = ["--loop", loop, "--every-steps", "1", "--run-dir", run_dir, "--samples", str(folder / "used")]
    plan = ChaosPlan(str(folder / "chaos"), seed, len(world_sizes) - 1, most_micro_steps=12, most_operations=40)
    for life, world_size in enumerate(world_sizes):
        arguments = [CHAOS, SPECIMEN, *options]
        if life + 1 < len(world_sizes):
            with pytest.raises(AssertionError, match="died without an answer"):
                run_script(world_size, *arguments, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
            assert len(plan.fired()) == life + 1
        else:
            run_script(world_size, *arguments, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
    return run_dir


def require_each_sample_once(world_sizes: list[int], folder: Path, loop: str, seed: int) -> None:
    run_dir = train_on(world_sizes, folder, loop, seed)
    resumed = events_of(Path(run_dir), "resumed")
    assert len(resumed) == len(world_sizes) - 1, "a kill came before the first checkpoint: take another seed"
    assert any(event["global_step"] % UPDATES_PER_EPOCH for event in resumed), "no kill came in mid-epoch"
    each_once = {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}
    assert consumed_samples(run_dir, folder / "used") == each_once
    records = read_metrics(Store(run_dir))
    steps = [record["global_step"] for record in records if record["kind"] == "step"]
    assert steps == list(range(1, UPDATES_PER_EPOCH * EPOCHS + 1))


def test_two_ranks_then_one_then_two_use_each_sample_once(tmp_path: Path) -> None:
    require_each_sample_once([2, 1, 2], tmp_path, "trainer", seed=345)


@pytest.mark.slow
def test_two_ranks_then_one_then_two_use_each_sample_once_in_a_loop_of_its_own(tmp_path: Path) -> None:
    require_each_sample_once([2, 1, 2], tmp_path, "own", seed=345)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["trainer", "own"])
def test_four_ranks_then_two_then_three_use_each_sample_once(loop: str, tmp_path: Path) -> None:
    require_each_sample_once([4, 2, 3], tmp_path, loop, seed=345)
