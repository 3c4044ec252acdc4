"""Two launches at one directory: the second is refused while the first lives and takes over when it is dead."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.checkpoint.ownership import read_owner
from dist_train.checkpoint.store import Store
from tests.support.background import Background
from tests.support.damage import checkpoint_names, contents, events
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.solo import train_quietly
from tests.support.twins import assert_same_run

SOLO = str(ROOT / "tests/support/solo.py")
SPECIMEN = str(ROOT / "tests/support/specimen.py")
LIFE_SECONDS = 90.0
APPENDED = {"run.jsonl", "metrics.jsonl"}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever happened to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train_quietly(run_dir)
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def first(run_dir: Path, tmp_path: Path) -> Iterator[Background]:
    """A launch that takes its time, after its second commit: its links are set, so that it is in the pause."""
    with Background([*solo(run_dir), "--pause", "1.5"], tmp_path / "first.log") as process:
        latest = run_dir / "latest"
        process.wait_until(lambda: latest.resolve().name == "step-00000004", "the commit of step 4")
        yield process


def solo(run_dir: Path) -> list[str]:
    return [sys.executable, SOLO, "--run-dir", str(run_dir)]


def attempts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "attempts").glob("0*"))


def test_the_second_is_refused_while_the_first_lives(first: Background, run_dir: Path, twin: Path) -> None:
    second = run_command(solo(run_dir), deadline_seconds=LIFE_SECONDS)
    assert first.is_running
    assert second.returncode == 1
    assert f"RunInUseError: The run directory {run_dir} is in use" in second.output
    assert f"process {first.pid} on {socket.gethostname()} (attempt 1) is training there" in second.output
    first.wait(LIFE_SECONDS).require_success()
    assert attempts(run_dir) == ["000001"]
    assert_same_run(twin, run_dir)


def test_the_second_takes_over_at_once_when_the_first_is_dead(first: Background, run_dir: Path, twin: Path) -> None:
    first.send(signal.SIGKILL)
    first.wait(20)
    patient = {"DIST_TRAIN_OWNER_PATIENCE": "600"}  # any watching would break the deadline
    run_command(solo(run_dir), deadline_seconds=LIFE_SECONDS, extra=patient).require_success()
    assert attempts(run_dir) == ["000001", "000002"]
    assert_same_run(twin, run_dir)


def test_a_stopped_first_is_taken_over_and_harms_nothing_when_it_wakes_up(
    first: Background, run_dir: Path, twin: Path
) -> None:
    first.send(signal.SIGSTOP)
    impatient = {"DIST_TRAIN_OWNER_PATIENCE": "3"}
    started = time.monotonic()
    run_command(solo(run_dir), deadline_seconds=LIFE_SECONDS, extra=impatient).require_success()
    assert time.monotonic() - started > 3
    assert_same_run(twin, run_dir)
    before = contents(run_dir)
    first.send(signal.SIGCONT)
    woken = first.wait(LIFE_SECONDS)
    assert woken.returncode == 1
    assert re.search(r"RunInUseError: Attempt 2 has taken over .* from this one \(attempt 1, process \d+", woken.output)
    after = contents(run_dir)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= APPENDED
    owner = read_owner(Store(run_dir))
    assert owner is not None
    assert (owner.attempt, owner.released) == (2, True)
    assert json.loads((run_dir / "status.json").read_text())["status"] == "done"
    assert {event["attempt"] for event in events(run_dir, "committed") if event["global_step"] > 10} == {2}
    assert_same_run(twin, run_dir)


@pytest.mark.slow
def test_a_stopped_rank_of_a_dead_launch_harms_nothing_when_it_wakes_up(tmp_path: Path, run_dir: Path) -> None:
    """Rank 1 sleeps, its launcher and rank 0 die, the same command trains to the end, and then rank 1 goes on."""
    script = torchrun(2, SPECIMEN, "--run-dir", str(run_dir), "--epochs", "2")
    run_command(torchrun(2, SPECIMEN, "--run-dir", str(tmp_path / "twin"), "--epochs", "2"), deadline_seconds=90)
    slowed = [*script, "--pause", "0.1"]
    with Background(slowed, tmp_path / "first.log") as launcher:
        launcher.wait_until(lambda: "step-00000003" in checkpoint_names(run_dir), "the commit of step 3")
        ranks = {rank_of(pid): pid for pid in children(launcher.pid)}
        os.kill(ranks[1], signal.SIGSTOP)
        launcher.send(signal.SIGKILL)
        os.kill(ranks[0], signal.SIGKILL)
        launcher.wait(20)
        run_command(script, deadline_seconds=LIFE_SECONDS).require_success()
        before = contents(run_dir)
        os.kill(ranks[1], signal.SIGCONT)
        deadline = time.monotonic() + LIFE_SECONDS
        while is_alive(ranks[1]):
            assert time.monotonic() < deadline, "the rank that woke up does not leave"
            time.sleep(0.05)
        assert contents(run_dir) == before
    assert_same_run(tmp_path / "twin", run_dir)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(one.partition(b"=")[2]) for one in variables if one.startswith(b"RANK=")), -1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
