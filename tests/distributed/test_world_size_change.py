"""Law 5: samples, updates and learning rates do not depend on the number of ranks, also when it changes in
mid-epoch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.specimen import EPOCHS, NUM_SAMPLES
from tests.support.twins import consumed_samples

SPECIMEN = str(ROOT / "tests/support/specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
pytestmark = pytest.mark.distributed


def test_two_ranks_then_one_then_two_train_the_same_samples_updates_and_losses(tmp_path: Path) -> None:
    options = ["--loop", "own", "--plain"]
    run_script(2, SPECIMEN, *options, "--run-dir", str(tmp_path / "twin"), deadline_seconds=120)

    changing = [CHAOS, SPECIMEN, *options, "--run-dir", str(tmp_path / "run"), "--samples", str(tmp_path / "samples")]
    plan = ChaosPlan(str(tmp_path / "chaos"), seed=17, kills=2)  # after 33 and 35 micro-steps
    for command in (torchrun(2, *changing), [sys.executable, *changing]):
        assert run_command(command, deadline_seconds=120, extra=plan.to_environment()).returncode != 0
    last = run_command(torchrun(2, *changing), deadline_seconds=120, extra=plan.to_environment()).require_success()

    assert "saved by 1 rank and is continued by 2 ranks" in last.output
    assert len(plan.fired()) == 2
    consumed = consumed_samples(tmp_path / "run", tmp_path / "samples")
    assert consumed == {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}
    ours, twin = read_metrics(Store(tmp_path / "run")), read_metrics(Store(tmp_path / "twin"))
    assert [record.get("lr") for record in ours] == [record.get("lr") for record in twin]
    assert [record["global_step"] for record in ours] == [record["global_step"] for record in twin]
    for mine, other in zip(ours, twin, strict=True):
        key = "loss" if mine["kind"] == "step" else "train_loss"
        assert mine[key] == pytest.approx(other[key], rel=1e-5)
