"""Two real ranks that hang in every way there is: noticed in time, told where, restarted, and nothing is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.background import Background
from tests.support.damage import events
from tests.support.launch import ROOT, Outcome, run_command, torchrun
from tests.support.twins import assert_same_run

HANGING = str(ROOT / "tests/support/hanging.py")
LIFE_SECONDS = 280.0
DEADLINE = 3.0

pytestmark = pytest.mark.distributed


def train(run_dir: Path, *arguments: str, max_restarts: int = 0) -> Outcome:
    script = [HANGING, "--run-dir", str(run_dir), "--hang-timeout", f"{DEADLINE}s", *arguments]
    return run_command(torchrun(2, *script, max_restarts=max_restarts), deadline_seconds=LIFE_SECONDS)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happens but a step that is ten times slower than the others and shorter than allowed."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train(run_dir, "--slow", str(DEADLINE / 2)).require_success()
    assert not (run_dir / "hangs").exists()
    assert events(run_dir, "hung") == []
    return run_dir


def stacks_of(run_dir: Path, attempt: int) -> dict[int, str]:
    paths = (run_dir / "hangs" / f"a{attempt:06d}").glob("rank-*.txt")
    return {int(path.stem.removeprefix("rank-")): path.read_text() for path in paths}


def require_noticed_in_time(event: dict[str, Any]) -> None:
    assert event["deadline"] == DEADLINE
    assert DEADLINE <= event["seconds"] <= DEADLINE + 2.0


def test_hangs_of_every_kind_are_noticed_named_restarted_and_lose_nothing(twin: Path, tmp_path: Path) -> None:
    """One launch, in which each attempt hangs in another way: in Python, in a collective that the others did not enter,
    in a data set, and stopped.
    """
    run_dir = tmp_path / "run"
    hangs = ["python:1:3", "collective:0:5", "data:1:7", "stopped:0:9"]
    ended = train(run_dir, "--hangs", *hangs, max_restarts=6).require_success()
    found = events(run_dir, "hung")
    assert [event["attempt"] for event in found] == [1, 2, 3, 4]
    assert [event["global_step"] for event in found] == [3, 5, 8, 9]
    for event in found:
        require_noticed_in_time(event)
        assert json.loads((run_dir / "hangs" / f"a{event['attempt']:06d}" / "hung.json").read_text())["rank"] in (0, 1)
    python, collective, data, stopped = (stacks_of(run_dir, attempt) for attempt in range(1, 5))
    assert set(python) == set(collective) == set(data) == {0, 1}
    assert "in stuck_in_python\n" in python[1]
    assert "main thread in a collective, at " in python[0]
    assert "in alone_in_a_collective\n" in collective[0]
    assert "hanging.py" in collective[1]
    assert "in __getitem__\n" in data[1]
    assert "phase data" in data[1]
    assert set(stopped) == {1}
    assert "beside it: rank 0" in stopped[1]
    assert "stopped by a signal" in stopped[1]
    assert ended.output.count("All ranks end now, to be restarted.") == 4
    assert_same_run(twin, run_dir)


@pytest.mark.slow
def test_a_rank_in_which_no_python_runs_is_shown_by_c_and_ended_by_the_others(twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    ended = train(run_dir, "--hangs", "lock:1:5", max_restarts=1).require_success()
    (event,) = events(run_dir, "hung")
    require_noticed_in_time(event)
    assert set(stacks_of(run_dir, 1)) == {0}
    assert "No stacks came from rank 1" in ended.output
    assert "in holding_the_lock" in ended.output
    assert_same_run(twin, run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_false_alarm_in_five_minutes_with_a_step_ten_times_slower_than_usual(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--step-seconds", "0.8", "--slow", "8", "--steps", "360", "--hang-timeout", "10s"]
    started = time.monotonic()
    run_command(torchrun(2, HANGING, "--run-dir", str(run_dir), *arguments), deadline_seconds=800.0).require_success()
    assert time.monotonic() - started >= 290.0
    assert events(run_dir, "hung") == []
    assert not (run_dir / "hangs").exists()


@pytest.mark.slow
def test_a_group_that_was_suspended_goes_on_when_it_wakes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--run-dir", str(run_dir), "--hang-timeout", f"{DEADLINE}s", "--step-seconds", "0.3", "--steps", "30"]
    with Background(torchrun(2, HANGING, *arguments), tmp_path / "log") as group:
        log = run_dir / "run.jsonl"
        group.wait_until(lambda: log.exists() and len(events(run_dir, "committed")) >= 5, "the fifth checkpoint")
        workers = psutil.Process(group.pid).children()
        assert len(workers) == 2
        for worker in workers:
            worker.suspend()
        time.sleep(3 * DEADLINE)  # what the test is about
        for worker in workers:
            worker.resume()
        group.wait(LIFE_SECONDS).require_success()
    assert events(run_dir, "hung") == []
    assert not (run_dir / "hangs").exists()
