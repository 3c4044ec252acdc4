"""What a worker inherits to the processes that it starts: they are no workers, whatever their environment says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_train import launched, lost
from dist_train.cluster.agent import Agent
from dist_train.cluster.folder import Folder
from dist_train.cluster.workers import Exit

ANOTHER = str(os.getppid())


def test_only_the_worker_itself_has_a_launcher_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lost.LAUNCHER_PID, str(os.getpid()))  # never the parent
    assert lost.launcher_is_gone()
    monkeypatch.setenv(launched.WORKER_PID, str(os.getpid()))
    assert lost.launcher_is_gone()
    monkeypatch.setenv(launched.WORKER_PID, ANOTHER)
    assert not lost.launcher_is_gone()


def test_a_process_forked_from_a_worker_of_torchrun_has_not_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lost.LAUNCHER_PID, raising=False)
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


def test_the_launcher_hears_its_workers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Folder()
    for rank, pid in enumerate((7, 8, 9)):
        (folder.renew(1) / f"rank-{rank}.json").write_text(f'{{"rank": {rank}, "pid": {pid}}}')
    agent = Agent.__new__(Agent)
    agent._folder, agent._attempt = folder, 1
    agent._workers = SimpleNamespace(pids={0: 7}, exits={1: Exit(pid=8, code=1)})  # type: ignore[assignment]
    assert sorted(agent._notes()) == [0, 1]
