"""A NaN in one batch on one of two ranks: the run goes back, leaves that window out and finishes, over kills too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_train.drill import FaultPlan
from dist_train.history import read_metrics
from dist_train.order import sample_order
from tests.support.bad_batch import EPOCH, GLOBAL_BATCH
from tests.support.damage import events
from tests.support.forked import run_script
from tests.support.launch import ROOT, Outcome, run_again_until_done, torchrun
from tests.support.twins import read_checkpoint, same_bits

SCRIPT = str(ROOT / "tests/support/bad_batch.py")
LIFE_SECONDS = 150.0
FIRST = 16
"""The fifth window of the second epoch: update 15."""
BAD = int(sample_order(40, seed=0, epoch=EPOCH, shuffle=True)(FIRST + GLOBAL_BATCH - 1))  # type: ignore[arg-type]
"""Its last sample: rank 1 has it."""

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that knew from the start what to leave out."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run_script(2, SCRIPT, str(run_dir), "--left-out", str(FIRST), deadline_seconds=LIFE_SECONDS)
    return run_dir


def assert_same_end(run_dir: Path, reference: Path) -> None:
    (one, first), (other, second) = read_checkpoint(run_dir), read_checkpoint(reference)
    assert one.progress == other.progress
    assert one.progress.global_step == 29
    assert one.rank_state == other.rank_state
    assert first.keys() == second.keys()
    assert [name for name in first if not same_bits(first[name], second[name])] == []
    assert read_metrics(run_dir) == read_metrics(reference)
    (event,) = events(run_dir, "rolled_back")
    assert (event["global_step"], event["back_to"]) == (15, 10)
    assert (event["epoch"], event["first"], event["last"]) == (EPOCH, FIRST, FIRST + GLOBAL_BATCH - 1)


def test_a_bad_batch_on_one_rank_is_gone_back_from_and_left_out(tmp_path: Path, reference: Path) -> None:
    run_dir = tmp_path / "run"
    run_script(2, SCRIPT, str(run_dir), "--bad", str(BAD), deadline_seconds=LIFE_SECONDS)
    assert_same_end(run_dir, reference)


def test_a_sharded_model_goes_back_from_a_bad_batch_of_one_rank(tmp_path: Path) -> None:
    for name, option, value in (("knew", "--left-out", FIRST), ("run", "--bad", BAD)):
        arguments = [str(tmp_path / name), option, str(value), "--sharding", "fsdp"]
        run_script(2, SCRIPT, *arguments, deadline_seconds=LIFE_SECONDS)
    assert_same_end(tmp_path / "run", tmp_path / "knew")


def test_kills_between_the_decision_and_the_end_forget_nothing(tmp_path: Path, reference: Path) -> None:
    """Of one rank while the checkpoint is being loaded that is gone back to, and of the other one later."""
    run_dir = tmp_path / "run"
    plan = FaultPlan(tmp_path / "faults", in_order=True).kill(0, at_phase="load", nth=2).kill(1, at_step=19)
    command = torchrun(2, "-m", "dist_train.drill.victim", SCRIPT, str(run_dir), "--bad", str(BAD))
    lives: list[Outcome] = run_again_until_done(command, deadline_seconds=LIFE_SECONDS, extra=plan.environment())
    assert len(lives) == 3
    plan.require_all_fired()
    assert_same_end(run_dir, reference)


def test_what_one_rank_holds_of_a_sharded_model_is_judged_by_both(tmp_path: Path) -> None:
    run_script(2, str(ROOT / "tests/support/sharded_guard.py"), str(tmp_path), deadline_seconds=LIFE_SECONDS)
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one.pop("norm") == pytest.approx(one.pop("expected"), rel=1e-6)
    assert one == {"bad": [[3, "not_finite"]], "kept": True, "sound": [], "ruined": ["2.weight"]}
