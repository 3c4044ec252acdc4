"""Signals under real launchers: what is saved, which exit codes come out, and that the next start goes on exactly."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from tests.support.forked import run_script
from tests.support.launch import ROOT, Outcome, environment, run_command, torchrun
from tests.support.signalled import SignalPlan
from tests.support.small_run import events_of, status_of
from tests.support.twins import assert_same_run

SPECIMEN = str(ROOT / "tests/support/specimen.py")
SIGNALLED = str(ROOT / "tests/support/signalled.py")
LIFE_SECONDS = 120.0
pytestmark = pytest.mark.distributed


def script(run_dir: Path, *more: str) -> list[str]:
    """No save but at the stop: what is there afterwards was made by the signal."""
    return [SIGNALLED, SPECIMEN, "--run-dir", str(run_dir), "--epochs", "2", "--every-steps", "1000", *more]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks to which nothing ever happened."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_script(2, *script(run_dir), deadline_seconds=LIFE_SECONDS)
    return run_dir


def run_signalled(command: list[str], plan: SignalPlan) -> Outcome:
    ended = run_command(command, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
    assert plan.has_fired, ended.output
    assert "KeyboardInterrupt" not in ended.output
    return ended


def require_stopped(run_dir: Path, name: str, reason: str, *, most: int = 13) -> dict[str, Any]:
    """Saved where it was told to stop, in the middle; returns the checkpoint's progress."""
    status = status_of(run_dir)
    assert status["status"] == reason
    (event,) = events_of(run_dir, "preempted")
    assert event["signal"] == name
    assert 0 < event["global_step"] == status["global_step"] <= most
    newest = max((run_dir / "checkpoints").glob("step-*"))
    progress: dict[str, Any] = json.loads((newest / "manifest.json").read_text())["progress"]
    assert progress["global_step"] == status["global_step"]
    return progress


HANDLED = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
AGENT_TOLD = [
    pytest.param("SIGTERM", "preempted", [], id="SIGTERM"),
    pytest.param("SIGUSR1", "preempted", HANDLED, id="SIGUSR1", marks=pytest.mark.slow),
    pytest.param("SIGINT", "interrupted", [], id="SIGINT", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "reason", "flags"), AGENT_TOLD)
def test_a_signal_to_torchrun_saves_on_both_ranks_with_workers_alive_and_is_gone_on_from(
    name: str, reason: str, flags: list[str], tmp_path: Path, twin: Path
) -> None:
    """Its agent signals each worker's whole process group: the DataLoader's workers get it, too."""
    run_dir, plan = tmp_path / "run", SignalPlan(str(tmp_path / "fired"), signal=name, to="launcher")
    command = torchrun(2, *script(run_dir, "--workers", "1"), max_restarts=3)
    at = command.index("--max-restarts")
    command[at:at] = flags
    ended = run_signalled(command, plan)
    assert ended.returncode != 0  # the agent's own
    assert f"{name}: saving at the next step boundary and stopping." in ended.output
    assert "DataLoader worker" not in ended.output
    require_stopped(run_dir, name, reason)
    run_script(2, *script(run_dir, "--workers", "1"), deadline_seconds=LIFE_SECONDS)
    assert_same_run(twin, run_dir)


@pytest.mark.parametrize(("count", "evaluation"), [(1, "done"), pytest.param(2, "pending", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_in_an_evaluation_stops_both_and_nothing_is_lost(
    count: int, evaluation: str, tmp_path: Path, twin: Path
) -> None:
    """The first one of a process is finished, as nobody knows whether ranks wait for each other further on in it; the
    second one is cut, and made again. Plain torchrun must not restart what was told to stop: exit code 0.
    """
    run_dir = tmp_path / "run"
    plan = SignalPlan(str(tmp_path / "fired"), rank=1, at="evaluation", count=count)
    ended = run_signalled(torchrun(2, *script(run_dir), max_restarts=3), plan).require_success()
    progress = require_stopped(run_dir, "SIGTERM", "preempted", most=7 * count)
    assert (progress["evaluation"], progress["epochs_completed"]) == (evaluation, 1)
    assert "Run the same command (or notebook) again" in ended.output
    assert "Epoch 2/2" not in ended.output
    run_script(2, *script(run_dir), deadline_seconds=LIFE_SECONDS)
    assert_same_run(twin, run_dir)


def test_ctrl_c_in_a_terminal_reaches_the_whole_group_and_ends_with_130_saved(tmp_path: Path) -> None:
    """The DataLoader's workers get it, too. Going on from there: `tests/unit/test_preemption.py`."""
    run_dir, plan = tmp_path / "run", SignalPlan(str(tmp_path / "fired"), signal="SIGINT", to="group", count=18)
    ended = run_signalled([sys.executable, *script(run_dir, "--workers", "2")], plan)
    assert ended.returncode == 128 + signal.SIGINT
    assert "DataLoader worker" not in ended.output
    require_stopped(run_dir, "SIGINT", "interrupted")


def test_survivors_of_a_dead_rank_that_hang_leave_long_before_torchrun_would_kill_them(tmp_path: Path) -> None:
    """Rank 2 sleeps, rank 1 waits for it in a collective, rank 0 dies: no error ever comes to rank 2."""
    run_dir = tmp_path / "run"
    plan = SignalPlan(str(tmp_path / "fired"), signal="SIGKILL", rank=0, hanging_rank=2, count=6)
    ended = run_signalled(torchrun(3, *script(run_dir, "--epochs", "1"), max_restarts=1), plan).require_success()
    assert "Rank 2 is ended now: SIGTERM came" in ended.output
    assert "Unable to shutdown process" not in ended.output
    assert "tick" in ended.output  # the stack says where it hung
    assert status_of(run_dir)["status"] == "done"


CELL = """
from pathlib import Path
import time
from tests.support.small_run import SmallRun

def wait(run):
    Path(r"{told}").write_text(str(run.global_step))
    time.sleep(0.05)

run = SmallRun(run_dir=Path(r"{run_dir}"), epochs=10_000, at_batch=wait).train()
print("the cell goes on:", run.reason, run.exit_code, run.committed_step == run.global_step)
"""


def test_interrupting_a_cell_saves_and_gives_the_notebook_back(tmp_path: Path) -> None:
    manager = KernelManager()
    manager.start_kernel(env=environment(), cwd=str(ROOT))
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        told = tmp_path / "told"
        cell = client.execute(CELL.format(told=told, run_dir=tmp_path / "run"))
        deadline = time.monotonic() + 60
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert told.exists()
        manager.interrupt_kernel()
        reply: dict[str, Any] = {}
        while reply.get("parent_header", {}).get("msg_id") != cell:  # the first ones answer who the kernel is
            reply = client.get_shell_msg(timeout=60)
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    status = status_of(tmp_path / "run")
    assert (status["status"], status["exit_code"], status["error"]) == ("interrupted", 130, "")
    newest = max((tmp_path / "run/checkpoints").glob("step-*"))
    assert newest.name == f"step-{status['global_step']:08d}"
