"""The launcher's parts without processes: causes, the exchange between nodes, options, grace, signals, the summary."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dist_train import launched
from dist_train.cli import main
from dist_train.cluster import folder as folder_module
from dist_train.cluster import grace as grace_module
from dist_train.cluster import launch as launch_module
from dist_train.cluster.attempts import describe, merge, report_of_node
from dist_train.cluster.folder import Folder, where
from dist_train.cluster.gpus import Gpu
from dist_train.cluster.grace import Grace, find_grace
from dist_train.cluster.launch import LaunchOptions, _require_possible
from dist_train.cluster.peers import SILENT_SECONDS, Peers
from dist_train.cluster.restart_policy import Cause, Ended
from dist_train.cluster.signals import AGAIN_SECONDS, Signals, StopAskedError
from dist_train.cluster.summary import Attempt, Conclusion, summary_json, summary_lines
from dist_train.cluster.worker import Program
from dist_train.cluster.workers import Exit
from dist_train.errors import ConfigError

RANKS = {0: 4, 1: 5}


def exits(*codes: int) -> dict[int, Exit]:
    return {local_rank: Exit(pid=100 + local_rank, code=code) for local_rank, code in enumerate(codes)}


def error(kind: str, message: str = "no", **more: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "traceback": f"Traceback of {kind}", **more}


def causes(report: dict[str, Any]) -> list[Cause]:
    return [Cause(**one) for one in report["causes"]]


# What became of an attempt


def test_workers_that_ended_well_are_no_cause() -> None:
    notes = {rank: {"begun": True, "outcome": "done", "global_step": 9, "committed_step": 9} for rank in (4, 5)}
    report = report_of_node(exits(0, 0), notes, RANKS)
    assert (report["causes"], report["begun"], report["committed_step"], report["step"]) == ([], True, 9, 9)


def test_a_worker_that_left_with_0_in_the_middle_of_its_run_is_one() -> None:
    (cause,) = causes(report_of_node(exits(0), {4: {"begun": True, "global_step": 3}}, RANKS))
    assert describe(cause) == "rank 4 left with exit code 0 in the middle of its run at step 3"


def test_a_killed_worker_is_where_the_others_were() -> None:
    notes = {4: {"global_step": 7}, 5: {"global_step": 12, "error": error("DeadlineError", secondary=True)}}
    report = {**report_of_node(exits(-9, 1), notes, RANKS), "stop_asked": False}
    ended = merge([report], seconds=1.0)
    assert [describe(cause) for cause in ended.causes] == [
        "rank 4 was killed by SIGKILL at step 12",
        "rank 5 failed with DeadlineError: no at step 12",
    ]
    assert [cause.secondary for cause in ended.causes] == [False, True]


@pytest.mark.parametrize("message", ["Connection closed by peer [127.0.0.1]:64715", "Connection reset by peer"])
def test_who_lost_a_peer_in_a_collective_of_torch_did_not_fail_first(message: str) -> None:
    notes = {4: {"error": error("RuntimeError", message)}, 5: {"error": error("ValueError")}}
    report = {**report_of_node(exits(1, 1), notes, RANKS), "stop_asked": False}
    assert [cause.rank for cause in merge([report], seconds=1.0).causes] == [5, 4]


def test_who_was_ended_by_the_launcher_did_not_fail_but_who_was_stopped_did() -> None:
    report = report_of_node(exits(-9, -9), {}, RANKS, stopped={1}, ended_by_us={0, 1})
    assert [(cause.secondary, cause.stopped) for cause in causes(report)] == [(True, False), (False, True)]
    assert "was stopped (SIGSTOP)" in describe(causes(report)[1])


def test_what_was_noted_before_a_signal_is_not_what_ended_it() -> None:
    (cause,) = causes(report_of_node(exits(-9), {4: {"error": error("ValueError")}}, RANKS))
    assert (cause.error, cause.traceback) == ("", "")


def test_a_node_that_left_is_no_failure_unless_somebody_else_failed_too() -> None:
    lost = {**report_of_node(exits(1), {4: {"error": error("DeadlineError", secondary=True)}}, RANKS)}
    failed = {**report_of_node(exits(1), {4: {"error": error("ValueError")}}, RANKS)}
    told = {"stop_asked": False}
    assert merge([{**lost, **told}], seconds=1.0, node_left=True).membership
    assert not merge([{**failed, **told}], seconds=1.0, node_left=True).membership


def test_notes_tell_the_runs_that_were_entered_and_how_far_back_the_last_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setattr(launched, "_noted", {})
    launched.note_run("a", global_step=0, committed_step=-1)
    launched.note_roll_back(3, global_step=3)
    launched.note_run("b", global_step=60, committed_step=60)
    launched.note_roll_back(40, global_step=40)
    launched.note_roll_back(50, global_step=50)
    report = {**report_of_node(exits(-9), launched.read_notes(tmp_path), RANKS), "stop_asked": False}
    ended = merge([report, {**report_of_node({}, {}, RANKS), "stop_asked": False}], seconds=1.0)
    assert (ended.run_dirs, ended.rolled_back_to, ended.committed_step) == (["a", "b"], 40, 50)


# Several nodes


class FakeStore(dict[str, bytes]):
    """As much of a store as the agents use."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        assert expected == ""
        return self.setdefault(key, desired.encode())


class Clock:
    """Goes on by itself, a little at each look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.2
        return self.now


def test_the_first_reason_to_end_is_believed_by_all() -> None:
    store = FakeStore()
    one, other = Peers(store, 0, 2), Peers(store, 1, 2)
    assert other.why_ended() == ""
    one.end("failure")
    other.end("membership")
    assert [one.why_ended(), other.why_ended()] == ["failure", "failure"]


def test_reports_are_exchanged_and_a_silent_node_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store, clock = FakeStore(), Clock()
    Peers(store, 2, 3).beat()  # and never again
    Peers(store, 1, 3, clock=clock)._store.set("report/1", '{"node": 1}')
    reports, lost = Peers(store, 0, 3, clock=clock).exchange({"node": 0}, 1e9)
    assert (reports, lost) == ([{"node": 0}, {"node": 1}], {2})
    assert SILENT_SECONDS < clock.now < 5 * SILENT_SECONDS


def test_all_take_the_leaders_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    store, clock = FakeStore(), Clock()
    assert Peers(store, 0, 2, clock=clock).agree({"exit_code": 93}, leads=True, seconds=9.0) == {"exit_code": 93}
    assert Peers(store, 1, 2, clock=clock).agree({"pause": 0}, leads=False, seconds=9.0) == {"exit_code": 93}


def test_without_a_leader_the_first_decision_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert Peers(FakeStore(), 1, 2, clock=Clock()).agree({"pause": 0}, leads=False, seconds=9.0) == {"pause": 0}


def test_a_node_alone_asks_nobody() -> None:
    alone = Peers(None, 0, 1)
    alone.beat()
    alone.part(9.0)
    assert alone.agree(1, leads=True, seconds=9.0) == 1
    assert alone.why_ended() == ""
    alone.end("membership")  # of a node that waits to be taken in
    assert (alone.why_ended(), alone.exchange({}, 9.0)) == ("membership", ([{}], set()))


# Options


def options(**settings: Any) -> LaunchOptions:
    return LaunchOptions(program=Program(name=__file__), **settings)


def test_without_an_option_there_is_a_process_a_gpu_and_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "find_gpus", lambda: (Gpu("Tesla T4", (7, 5)),) * 2)
    assert options().count_workers() == 2
    monkeypatch.setattr(launch_module, "find_gpus", lambda: ())
    assert options().count_workers() == 1
    assert options(nproc_per_node="cpu").count_workers() == os.cpu_count()
    assert options(nproc_per_node="3").count_workers() == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nproc_per_node": "gpu"}, "nvidia-smi shows none"),
        ({"nproc_per_node": "0"}, "give a number, gpu, cpu or auto"),
        ({"nnodes": "4:2"}, "give a number of nodes, 4, or a range"),
        ({"nnodes": "2"}, "--rdzv-endpoint HOST:PORT"),
        ({"nnodes": "2", "standalone": True}, "--standalone is one node"),
        ({"nnodes": "1:2", "rdzv_backend": "static", "rdzv_endpoint": "a:1"}, "is elastic, which the static"),
        ({"max_restarts": -1}, "must be 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "find_gpus", lambda: ())
    with pytest.raises(ConfigError, match=said):
        one = options(**settings)
        one.count_workers()
        _require_possible(one)


def test_the_command_line_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["launch", str(tmp_path / "none.py")]) == 2
    assert "none.py is not there: give the path of a script" in capsys.readouterr().err
    assert main(["launch", "--rdzv-conf", "last_call_timeout", __file__]) == 2
    assert "give KEY=VALUE pairs" in capsys.readouterr().err


def test_a_nodes_address_is_where_the_way_to_the_endpoint_leaves_it() -> None:
    assert options().address is None
    assert options(nnodes="2", rdzv_endpoint="127.0.0.1:1").address is None
    assert options(nnodes="2", rdzv_endpoint="no.such.host.invalid:1").address is None
    assert options(nnodes="2", rdzv_endpoint="127.0.0.1:1", local_addr="10.0.0.7").address == "10.0.0.7"


# Grace


def test_the_platforms_grace_is_taken_from_whoever_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (grace_module.VARIABLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert find_grace(None).seconds is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'KillOnBadExit           = 0'\necho 'KillWait                = 45 sec'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_grace(None) == Grace(45.0, "SLURM's KillWait")
    monkeypatch.setenv(grace_module.VARIABLE, "20")
    assert find_grace(None) == Grace(20.0, "DIST_TRAIN_GRACE")
    assert find_grace("2min") == Grace(120.0, "--grace")
    with pytest.raises(ConfigError):
        find_grace("0")


def test_a_grace_shorter_than_a_save_is_warned_of() -> None:
    assert "a save takes 25 s, and DIST_TRAIN_GRACE gives 30 s" in Grace(30.0, "DIST_TRAIN_GRACE").why_too_short(25.0)
    assert Grace(30.0, "DIST_TRAIN_GRACE").why_too_short(10.0) == ""
    assert Grace(None).why_too_short(1000.0) == ""


# Signals


def test_a_signal_is_told_once_and_counted_again_only_when_it_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dist_train.cluster.signals.time.monotonic", lambda: now)
    with Signals() as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        assert (signals.fresh(), signals.fresh(), signals.count[signal.SIGUSR1]) == ([signal.SIGUSR1], [], 1)
        assert signals.exit_code == 128 + signal.SIGUSR1
        now += AGAIN_SECONDS
        signal.raise_signal(signal.SIGUSR1)
        assert (signals.fresh(), signals.count[signal.SIGUSR1]) == ([signal.SIGUSR1], 2)


def test_a_signal_ends_a_wait_that_is_not_for_workers() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(StopAskedError), signals.interrupting():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopAskedError):
            signals.rest(600.0)
    assert signal.getsignal(signal.SIGTERM) is former


# The folder and the summary


def test_the_folders_of_dead_launches_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, foreign = tmp_path / f"dist-train-launch-{where()}-4194303-x", tmp_path / "dist-train-else"
    alive = tmp_path / f"dist-train-launch-{where()}-{os.getpid()}-x"
    elsewhere = tmp_path / f"dist-train-launch-{'0' * len(where())}-4194303-x"
    for path in (dead, foreign, alive, elsewhere):
        path.mkdir()
    folder = Folder()
    assert [path.exists() for path in (dead, foreign, alive, elsewhere)] == [False, True, True, True]
    assert folder.path.name.startswith(f"dist-train-launch-{where()}-{os.getpid()}-")
    assert folder.renew(3).is_dir()
    folder.remove()
    assert not folder.path.exists()


def test_shared_memory_of_dead_processes_is_removed_and_none_of_who_has_their_ids_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "SHARED_MEMORY", tmp_path)
    dead, other, alive = (tmp_path / f"torch_{pid}_1_0" for pid in (4194303, 4194302, os.getpid()))
    for path in (dead, other, alive):
        path.touch()
    folder_module.remove_shared_memory([4194303, os.getpid()])
    assert [path.exists() for path in (dead, other, alive)] == [False, True, True]


def test_a_full_disk_costs_the_notes_of_an_attempt_and_not_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Folder()
    former = folder.renew(1)
    monkeypatch.setattr(Path, "mkdir", is_full)
    assert launched.read_notes(folder.renew(2)) == {}
    assert not former.exists()


def conclude(*attempts: Attempt, **more: Any) -> Conclusion:
    return Conclusion(attempts=list(attempts), seconds=75.0, **more)


def attempt(number: int, step: int, committed: int, *found: Cause) -> Attempt:
    ended = Ended(seconds=30.0, begun=True, committed_step=committed, causes=found)
    return Attempt(number=number, world_size=2, ended=ended, step=step, why="")


def test_a_launch_without_trouble_is_one_line() -> None:
    lines = summary_lines(conclude(attempt(1, 20, 20), exit_code=0))
    assert lines == ["ended well after 1 attempt in 1 min 15 s"]


def test_the_summary_names_causes_and_lost_steps_and_goodput() -> None:
    first = attempt(1, 12, 9, Cause(rank=1, exit_code=-9, step=12), Cause(rank=0, exit_code=1, secondary=True))
    lines = summary_lines(conclude(first, attempt(2, 20, 20), exit_code=0), 0.914)
    assert lines == [
        "ended well after 2 attempts in 1 min 15 s, 3 steps done again or lost, goodput of the run 91%",
        "  attempt 1: 30 s, 2 ranks: rank 1 was killed by SIGKILL at step 12; committed step 9",
        "  attempt 2: 30 s, 2 ranks: ended well; committed step 20",
    ]


def test_the_summary_of_a_failure_ends_with_the_first_failures_traceback() -> None:
    cause = Cause(rank=3, exit_code=1, error="ValueError: no", traceback="Traceback:\n  line 7\nValueError: no\n")
    lines = summary_lines(conclude(attempt(1, 12, 9, cause), exit_code=93, why="it would fail for ever"))
    assert lines[0].endswith(": it would fail for ever")
    assert lines[-4:] == ["  rank 3:", "    Traceback:", "      line 7", "    ValueError: no"]
    assert summary_json(conclude(attempt(1, 12, 9, cause)))["attempts"][0]["lost_steps"] == 3
