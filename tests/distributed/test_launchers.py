"""The launchers that people use, each restarting a killed run: accelerate launch, and torchrun on two nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.background import Background
from tests.support.chaos import ChaosPlan
from tests.support.launch import ROOT, environment, run_command, torchrun
from tests.support.twins import assert_same_run

SPECIMEN = str(ROOT / "tests/support/specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two uninterrupted ranks."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_command(torchrun(2, SPECIMEN, "--run-dir", str(run_dir)), deadline_seconds=120).require_success()
    return run_dir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("rendezvous", [[], pytest.param(["--rdzv_backend", "c10d"], marks=pytest.mark.slow)], ids=str)
def test_accelerate_launch_starts_two_processes_and_restarts_them(
    rendezvous: list[str], tmp_path: Path, twin: Path
) -> None:
    plan = ChaosPlan(str(tmp_path / "chaos"), seed=15, kills=2)
    flags = ["--multi_gpu", "--num_processes", "2", "--max_restarts", "4", *rendezvous]
    flags += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--num_machines", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--dynamo_backend", "no"]
    script = [CHAOS, SPECIMEN, "--run-dir", str(tmp_path / "run")]
    run_command([*command, *script], deadline_seconds=240, extra=plan.to_environment()).require_success()
    assert len(plan.fired()) == 2
    assert_same_run(twin, tmp_path / "run")


def test_workers_whose_launcher_was_killed_end_and_the_same_command_goes_on(tmp_path: Path, twin: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [SPECIMEN, "--run-dir", str(run_dir)]
    with Background(torchrun(2, *arguments, "--pause", "0.05"), tmp_path / "log") as launch:
        launch.wait_until(lambda: (run_dir / "checkpoints/step-00000006").exists(), "the commit of step 6")
        workers = psutil.Process(launch.pid).children(recursive=True)
        launch.send(signal.SIGKILL)
        gone, alive = psutil.wait_procs(workers, timeout=30)
        assert (len(gone), alive) == (2, [])
    assert "LauncherLostError" in launch.output
    run_command(torchrun(2, *arguments), deadline_seconds=120).require_success()
    assert_same_run(twin, run_dir)


def test_two_agents_restart_together_when_a_worker_of_one_of_them_dies(tmp_path: Path, twin: Path) -> None:
    """The restart count differs between the agents: the ranks agree on a generation instead."""
    plan = ChaosPlan(str(tmp_path / "chaos"), seed=15, kills=2)
    flags = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "4",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "job",
    ]
    flags += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    script = [CHAOS, SPECIMEN, "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *script]
    other = subprocess.Popen(
        command,
        env=environment(plan.to_environment()),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        run_command(command, deadline_seconds=300, extra=plan.to_environment()).require_success()
        assert other.wait(timeout=60) == 0
    finally:
        if other.poll() is None:
            os.killpg(other.pid, signal.SIGKILL)
            other.wait()
    assert len(plan.fired()) == 2
    assert_same_run(twin, tmp_path / "run")
