"""What a worker inherits to the processes that it starts: they are no workers, whatever their environment says."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_train import launched, lost
from dist_train.cluster.agent import STOP_GRACE_SECONDS, Agent
from dist_train.cluster.folder import Folder
from dist_train.cluster.grace import Grace
from dist_train.cluster.workers import Exit
from dist_train.health.deadline import Deadline

ANOTHER = str(os.getppid())


def make_agent(*notes: dict[str, Any]) -> Agent:
    """With a worker that lives, process 7, and one that has ended, process 8."""
    folder = Folder()
    for rank, note in enumerate(notes):
        (folder.renew(1) / f"rank-{rank}.json").write_text(json.dumps({"rank": rank, **note}))
    agent = Agent.__new__(Agent)
    agent._folder, agent._attempt = folder, 1
    agent._workers = SimpleNamespace(pids={0: 7}, exits={1: Exit(pid=8, code=1)})  # type: ignore[assignment]
    return agent


def test_only_the_worker_itself_has_a_launcher_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.LAUNCHER_PID, str(os.getpid()))  # never the parent
    assert lost.launcher_is_gone()
    monkeypatch.setenv(launched.WORKER_PID, str(os.getpid()))
    assert lost.launcher_is_gone()
    monkeypatch.setenv(launched.WORKER_PID, ANOTHER)
    assert not lost.launcher_is_gone()


def test_a_process_forked_from_a_worker_of_torchrun_has_not_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launched.LAUNCHER_PID, raising=False)
    monkeypatch.setattr(lost, "_FIRST_PARENT", os.getpid())
    assert lost.launcher_is_gone()
    monkeypatch.setattr(lost, "_IMPORTER", int(ANOTHER))
    assert not lost.launcher_is_gone()


def test_what_a_worker_has_started_notes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launched, "_noted", {})
    monkeypatch.setenv(launched.WORKER_PID, ANOTHER)
    launched.note(begun=True)
    assert launched.read_notes(tmp_path) == {}
    monkeypatch.setenv(launched.WORKER_PID, str(os.getpid()))
    launched.note(begun=True)
    assert launched.read_notes(tmp_path)[0]["pid"] == os.getpid()


def test_a_note_that_cannot_be_written_leaves_no_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path))
    monkeypatch.setattr(launched, "_noted", {})
    launched.note(begun=True)
    monkeypatch.setattr(Path, "write_text", is_full)
    launched.note(outcome="done")
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_hears_its_workers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    agent = make_agent({"pid": 7}, {"pid": 8}, {"pid": 9})
    assert sorted(agent._notes()) == [0, 1]


@pytest.mark.parametrize(
    ("said", "noted", "seconds"),
    [
        (None, {}, STOP_GRACE_SECONDS),
        (None, {"save_seconds": 20.0}, 60.0),
        (None, {"save_seconds": 20.0, "longest_seconds": 45.0}, 150.0),
        (20.0, {"save_seconds": 20.0, "longest_seconds": 45.0}, 20.0),
    ],
)
def test_workers_may_end_the_step_that_they_are_in_unless_the_platform_kills_sooner(
    said: float | None, noted: dict[str, float], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    agent = make_agent({"pid": 7, **noted}, {"pid": 8, "save_seconds": 1.0})
    agent._grace = Grace(said)
    assert agent._stop_grace() == seconds


def test_the_slowest_step_or_evaluation_is_known() -> None:
    times = iter((0.0, 0.0, 3.0, 10.0, 11.0, 31.0))
    deadline = Deadline(clock=lambda: next(times))
    assert deadline.longest_seconds == 0.0
    for _ in range(3):
        deadline.step_done()
    assert deadline.longest_seconds == 7.0
    deadline.evaluation_done()
    assert deadline.longest_seconds == 20.0
