"""`dist-train launch` with real workers: whatever is killed, the run ends as the one that never died, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_train.drill import FaultPlan
from dist_train.errors import ExitCode
from tests.support.background import Background
from tests.support.forked import run_script
from tests.support.launch import ROOT, Outcome, run_command
from tests.support.twins import assert_same_run

LAUNCH = [sys.executable, "-m", "dist_train.cli", "launch"]
SPECIMEN = str(ROOT / "tests/support/specimen.py")
UNRULY = str(ROOT / "tests/support/unruly.py")
VICTIM = ["-m", "dist_train.drill.victim"]
SECONDS = 180.0


def launch_specimen(ranks: int, run_dir: Path, *options: str) -> list[str]:
    """With the faults of the environment armed."""
    return [*LAUNCH, "--nproc-per-node", str(ranks), *VICTIM, SPECIMEN, "--run-dir", str(run_dir), *options]


def attempts_of(outcome: Outcome) -> list[str]:
    """The summary's line of each."""
    return [line.strip() for line in outcome.output.splitlines() if line.startswith("  attempt ")]


def summary(outcome: Outcome) -> dict[str, Any]:
    """What `--json` printed: the last line of the output that is one."""
    found: dict[str, Any] = json.loads([line for line in outcome.output.splitlines() if line.startswith('{"')][-1])
    return found


def nothing_is_left(outcome: Outcome, run_dir: Path) -> None:
    """No process that had to do with this run."""
    left = [one.pid for one in psutil.process_iter() if str(run_dir) in " ".join(_command_of(one))]
    assert left == [], outcome.output[-3000:]


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted, without the launcher."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_script(2, SPECIMEN, "--run-dir", str(run_dir), deadline_seconds=SECONDS)
    return run_dir


def test_a_run_survives_every_way_to_lose_a_worker(twin: Path, tmp_path: Path) -> None:
    plan = (
        FaultPlan(tmp_path / "faults", in_order=True)
        .kill(0, at_step=5)
        .kill(1, at_step=12)
        .kill("all", at_step=20)
        .raise_error(1, at_step=27)
        .exit(0, at_step=34, code=9)
        .stop(1, at_step=44)
    )
    run_dir = tmp_path / "run"
    outcome = run_command(launch_specimen(2, run_dir), deadline_seconds=SECONDS, extra=plan.environment())
    outcome.require_success()
    plan.require_all_fired()
    assert_same_run(run_dir, twin)
    causes = attempts_of(outcome)
    assert len(causes) == 7, outcome.output[-3000:]
    said = ["rank 0 was killed by SIGKILL", "rank 1 was killed by SIGKILL", "was killed by SIGKILL", "InjectedError"]
    said += ["rank 0 ended with exit code 9", "rank 1 was stopped (SIGSTOP)", "ended well"]
    assert [word for word, line in zip(said, causes, strict=True) if word not in line] == [], outcome.output[-3000:]
    nothing_is_left(outcome, run_dir)


def test_a_signal_to_the_launcher_saves_and_the_same_command_goes_on(twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    plan = FaultPlan(tmp_path / "faults").terminate_launcher(1, at_step=11)
    command = launch_specimen(2, run_dir, "--every-steps", "100")
    outcome = run_command(command, deadline_seconds=SECONDS, extra=plan.environment()).require_success()
    plan.require_all_fired()
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("preempted", 0)
    assert "SIGTERM: the workers save and end" in outcome.output
    assert len(attempts_of(outcome)) <= 1
    saved = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
    assert max(event["global_step"] for event in saved if event["event"] == "committed") >= 11
    run_command(command, deadline_seconds=SECONDS, extra=plan.environment()).require_success()
    assert_same_run(run_dir, twin)
    nothing_is_left(outcome, run_dir)


def test_a_script_that_always_fails_at_a_step_ends_with_93_after_three_attempts(tmp_path: Path) -> None:
    faults = FaultPlan(tmp_path / "faults")
    for _ in range(5):
        faults = faults.raise_error(0, at_step=50, message="of step 50")
    run_dir = tmp_path / "run"
    command = [*LAUNCH, "--json", *launch_specimen(1, run_dir)[len(LAUNCH) :]]
    outcome = run_command(command, deadline_seconds=SECONDS, extra=faults.environment())
    assert outcome.returncode == ExitCode.DO_NOT_REQUEUE, outcome.output[-3000:]
    assert len(faults.fired()) == 3
    told = summary(outcome)
    assert len(told["attempts"]) == 3
    assert {attempt["step"] for attempt in told["attempts"]} == {50}
    said = outcome.output
    assert "3 attempts in a row ended at committed step 49" in said
    assert "rank 0 failed with InjectedError" in said
    assert "at step 50; committed step 49" in said
    assert "Traceback (most recent call last)" in said[said.index("attempt 3:") :]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["import"], 1, "ModuleNotFoundError: No module named 'no_such_module'"),
        (["exit", "7"], 7, "ended with exit code 7"),
    ],
)
def test_an_error_of_the_first_seconds_ends_the_launch(arguments: list[str], code: int, said: str) -> None:
    command = [*LAUNCH, "--json", "--nproc-per-node", "2", UNRULY, *arguments]
    outcome = run_command(command, deadline_seconds=60)
    assert outcome.returncode == code, outcome.output
    assert len(summary(outcome)["attempts"]) == 1
    assert said in outcome.output


def test_a_worker_sees_what_a_fresh_interpreter_shows(tmp_path: Path) -> None:
    script = tmp_path / "folder" / "unruly.py"
    script.parent.mkdir()
    script.write_text(Path(UNRULY).read_text())
    seen = tmp_path / "seen"
    command = [*LAUNCH, "--nproc-per-node", "2", str(script), "look", str(seen)]
    run_command(command, deadline_seconds=SECONDS).require_success()
    first, second = (json.loads(seen.with_suffix(f".{rank}").read_text()) for rank in (0, 1))
    assert first["argv"] == [str(script), "look", str(seen)]
    assert (first["file"], first["main"], first["name"]) == (str(script), str(script), "__main__")
    assert (first["path"], first["cwd"]) == (str(script.parent), str(ROOT))
    assert first["stdin"] == ""
    assert first["session"]
    assert first["loaded"] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert first["threads"] == 1
    assert all(mine != other for mine, other in zip(first["seeds"], second["seeds"], strict=True))
    assert [one["environment"]["RANK"] for one in (first, second)] == ["0", "1"]
    assert [one["size"] for one in (first, second)] == ["2", "2"]
    wanted = {"LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"}
    assert wanted <= set(first["environment"])


@pytest.mark.slow
def test_the_process_that_forks_the_workers_may_be_killed(twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Background(launch_specimen(2, run_dir, "--pause", "0.05"), tmp_path / "log") as running:
        running.wait_until(lambda: len(list(run_dir.glob("checkpoints/step-*"))) > 1, "two checkpoints")
        (server,) = psutil.Process(running.pid).children()
        server.kill()
        outcome = running.wait(SECONDS).require_success()
    assert "the process that forks the workers has died" in outcome.output
    assert len(attempts_of(outcome)) == 2
    assert_same_run(run_dir, twin)
    nothing_is_left(outcome, run_dir)


def test_nothing_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    command = [*LAUNCH, "--nproc-per-node", "2", UNRULY, "late"]
    with Background(command, tmp_path / "log") as running:
        family: list[psutil.Process] = []

        def all_are_there() -> bool:
            family[:] = psutil.Process(running.pid).children(recursive=True)
            return len(family) == 3

        running.wait_until(all_are_there, "two workers and the process that forks them")
        running.send(signal.SIGKILL)
        running.wait(20)
        _, alive = psutil.wait_procs([one for one in family if one.pid != os.getpid()], timeout=20)
        assert [one.pid for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
