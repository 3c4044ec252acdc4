"""The examples of own loops: killed, they end as the runs that never died, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, run_again_until_done, run_command, torchrun
from tests.support.twins import assert_same_run

EXAMPLES = ROOT / "examples"
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0

pytestmark = pytest.mark.distributed


def test_two_models_and_an_average_killed_on_two_ranks_equal_the_run_that_never_died(tmp_path: Path) -> None:
    options = ["--cpu", "--epochs", "6", "--samples", "1024", "--run-dir"]
    script = str(EXAMPLES / "gan.py")
    twin, run_dir = str(tmp_path / "twin"), str(tmp_path / "run")
    run_script(2, script, *options, twin, deadline_seconds=LIFE_SECONDS)

    plan = ChaosPlan(str(tmp_path / "chaos"), seed=5, kills=1, most_micro_steps=44)
    killed = torchrun(2, CHAOS, script, *options, run_dir, max_restarts=2)
    outcome = run_command(killed, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment()).require_success()
    assert len(plan.fired()) == 1
    assert "Resuming from" in outcome.output, f"{plan.fired()} came before the first checkpoint: take another seed"
    assert "step 24 is safe in" in outcome.output
    assert_same_run(twin, run_dir)
    state = json.loads((tmp_path / "run/latest/manifest.json").read_text())["state"]
    assert {"optimizer/critic", "optimizer/generator", "scheduler/critic", "user/average"} <= set(state)


def test_the_plain_loop_killed_and_started_again_equals_the_run_that_never_died(tmp_path: Path) -> None:
    script = [str(EXAMPLES / "plain_loop.py"), "--epochs", "4", "--run-dir"]
    twin, run_dir = str(tmp_path / "twin"), str(tmp_path / "run")
    straight = run_command([sys.executable, *script, twin], deadline_seconds=LIFE_SECONDS).require_success()

    plan = ChaosPlan(str(tmp_path / "chaos"), seed=5, kills=2, most_micro_steps=200)
    killed = [sys.executable, CHAOS, *script, run_dir]
    lives = run_again_until_done(killed, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
    assert (len(lives), len(plan.fired())) == (3, 2)
    assert "Resuming from" in lives[-1].output
    assert_same_run(twin, run_dir)
    told = "epochs were no better than one before"
    assert [line for line in lives[-1].output.splitlines() if told in line] == [
        line for line in straight.output.splitlines() if told in line
    ]
