"""The examples that shard: killed, one ends as the run that never died, bit for bit; the other learns as one rank."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.twins import assert_same_run

EXAMPLES = ROOT / "examples"
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0

pytestmark = pytest.mark.distributed


@pytest.mark.slow
def test_the_sharded_loop_killed_under_torchrun_equals_the_run_that_never_died(tmp_path: Path) -> None:
    script, options = str(EXAMPLES / "own_loop_fsdp.py"), ["--cpu", "--epochs", "2", "--samples", "1024", "--run-dir"]
    twin, run_dir = str(tmp_path / "twin"), str(tmp_path / "run")
    run_script(2, script, *options, twin, deadline_seconds=LIFE_SECONDS)

    plan = ChaosPlan(str(tmp_path / "chaos"), seed=5, kills=1, most_micro_steps=30)  # before the 23rd
    killed = torchrun(2, CHAOS, script, *options, run_dir, max_restarts=2)
    extra = {**plan.to_environment(), "PYTHONPATH": f"{ROOT}:{EXAMPLES}"}
    outcome = run_command(killed, deadline_seconds=LIFE_SECONDS, extra=extra).require_success()
    assert len(plan.fired()) == 1
    assert "Resuming from" in outcome.output, f"{plan.fired()} came before the first checkpoint: take another seed"
    assert_same_run(twin, run_dir)


def test_the_sharded_loop_learns(tmp_path: Path) -> None:
    options = ["--cpu", "--epochs", "2", "--samples", "1024", "--run-dir", str(tmp_path / "run")]
    run_script(2, str(EXAMPLES / "own_loop_fsdp.py"), *options, deadline_seconds=LIFE_SECONDS)
    losses = [record["train_loss"] for record in read_metrics(Store(tmp_path / "run")) if record["kind"] == "epoch"]
    assert losses[1] < losses[0] / 2


def test_the_sharded_language_model_learns_what_one_rank_learns(tmp_path: Path) -> None:
    script = str(EXAMPLES / "language_model/train.py")
    options = shlex.split(
        "--cpu --dropout 0 --steps 4 --epochs 1 --corpus-mb 0.3 --block 16 --global-batch-size 8 "
        "--micro-batch-size 2 --eval-windows 9 --log-every 1 --sharding fsdp --run-dir"
    )
    ends = []
    for world_size in (1, 2):
        run_dir = str(tmp_path / f"{world_size}")
        run_script(world_size, script, *options, run_dir, deadline_seconds=LIFE_SECONDS)
        ends.append(read_metrics(Store(run_dir))[-1])
    assert ends[1]["val_bits_per_byte"] == pytest.approx(ends[0]["val_bits_per_byte"], rel=1e-4)
    assert ends[1]["train_loss"] == pytest.approx(ends[0]["train_loss"], rel=1e-4)
