"""Faults of a plan come where it says, once, and a run that met them ends as the one that did not."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from dist_train.drill import FaultPlan
from dist_train.phases import Phase, Point
from tests.support.background import Background
from tests.support.launch import ROOT, Outcome, run_again_until_done, run_command, torchrun
from tests.support.twins import assert_same_run

VICTIM = ["-m", "dist_train.drill.victim", str(ROOT / "tests/drill_scripts/sound.py")]
LIFE_SECONDS = 120.0


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_command(
        [sys.executable, *VICTIM[2:], "--run-dir", str(run_dir)], deadline_seconds=LIFE_SECONDS
    ).require_success()
    return run_dir


def suffer(plan: FaultPlan, run_dir: Path, *more: str) -> list[Outcome]:
    command = [sys.executable, *VICTIM, "--run-dir", str(run_dir), *more]
    return run_again_until_done(command, deadline_seconds=LIFE_SECONDS, extra=plan.environment())


def test_deaths_at_steps_and_phases_come_in_their_order_and_change_nothing(tmp_path: Path, twin: Path) -> None:
    plan = (
        FaultPlan(tmp_path / "faults", in_order=True)
        .kill(0, at_step=4)
        .exit(0, at_phase=Phase.LOAD, code=41)
        .raise_error(0, at_phase=Phase.EVALUATION, message="of the evaluation")
        .kill(0, at_phase=Point.AFTER_COMMIT, at_step=12)
    )
    lives = suffer(plan, tmp_path / "run")
    assert [life.returncode for life in lives] == [-signal.SIGKILL, 41, 1, -signal.SIGKILL, 0]
    assert "InjectedError: of the evaluation (rank 0, step 10)" in lives[2].output
    came = [(one.kind, one.attempt, one.global_step, one.phase) for one in plan.require_all_fired().fired()]
    assert came[0] == ("kill", 1, 4, "step_done")
    assert came[1][0::3] == ("exit", "load")
    assert came[2][0] == "raise_error"
    assert came[3][0::3] == ("kill", "after_commit")
    assert_same_run(twin, tmp_path / "run")


def test_failing_operations_and_a_corrupted_checkpoint_change_nothing(tmp_path: Path, twin: Path) -> None:
    plan = (
        FaultPlan(tmp_path / "faults")
        .fail_io(errno.ENOSPC, kind="write", path="checkpoints/", at_step=2, times=2)
        .corrupt_newest(at_step=10)
    )
    lives = suffer(plan, tmp_path / "run")
    assert [life.returncode for life in lives] == [-signal.SIGKILL, 0]
    assert "no space left" in lives[0].output
    assert "corrupt" in lives[1].output
    plan.require_all_fired()
    assert_same_run(twin, tmp_path / "run")


def test_a_killed_data_worker_is_noticed(tmp_path: Path, twin: Path) -> None:
    plan = FaultPlan(tmp_path / "faults").kill_data_worker(0, at_step=3)
    lives = suffer(plan, tmp_path / "run", "--workers", "1")
    assert [life.returncode for life in lives[1:]] == [0]
    assert lives[0].returncode == 1
    assert "DataLoader worker" in lives[0].output or "ConnectionResetError" in lives[0].output  # whichever is first
    assert_same_run(twin, tmp_path / "run")


def test_a_stopped_process_stands_still_and_its_run_goes_on_afterwards(tmp_path: Path, twin: Path) -> None:
    plan = FaultPlan(tmp_path / "faults").stop(0, at_step=6)
    command = [sys.executable, *VICTIM, "--run-dir", str(tmp_path / "run")]
    with Background(command, tmp_path / "log", extra=plan.environment()) as life:
        life.wait_until(lambda: bool(plan.fired()), "the stop")
        life.wait_until(lambda: psutil.Process(life.pid).status() == psutil.STATUS_STOPPED, "standing still")
        life.send(signal.SIGCONT)
        life.wait(LIFE_SECONDS).require_success()
    assert_same_run(twin, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_meet_one_kill_under_torchrun(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path / "faults").kill("all", at_phase=Phase.CAPTURE, at_step=5)
    command = torchrun(2, *VICTIM, "--run-dir", str(tmp_path / "run"), max_restarts=1)
    run_command(command, deadline_seconds=LIFE_SECONDS, extra=plan.environment()).require_success()
    (fired,) = plan.require_all_fired().fired()
    assert fired.phase == "capture"
    assert {path.name for path in plan.folder.glob("pid-*")} == {"pid-0", "pid-1"}
    events = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("started", "resumed")] == ["started", "resumed"]


def test_the_script_sees_what_it_would_see_without_us(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "seen = [sys.argv[1:], sys.path[0], __name__, 'torch' in sys.modules, sys.modules['__main__'].__file__]\n"
        "print(json.dumps(seen))\n"
        "sys.exit(3)\n"
    )
    plan = FaultPlan(tmp_path / "faults").kill(0, at_step=1)
    outcomes = [
        run_command([sys.executable, *front, str(script), "a", "-m"], deadline_seconds=30.0, extra=plan.environment())
        for front in ([], VICTIM[:2])
    ]
    assert [one.returncode for one in outcomes] == [3, 3]
    assert outcomes[0].output == outcomes[1].output
    assert os.path.basename(json.loads(outcomes[0].output)[4]) == "script.py"
