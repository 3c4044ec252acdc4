"""The launchers that people use and the recipes in launch/, each restarting a killed run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.background import Background
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, environment, run_command, torchrun
from tests.support.twins import assert_same_run

SPECIMEN = str(ROOT / "tests/support/specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two uninterrupted ranks."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    run_script(2, SPECIMEN, "--run-dir", str(run_dir), deadline_seconds=120)
    return run_dir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerate_launch(*flags: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *flags]


def recipe(name: str, *flags: str) -> list[str]:
    return accelerate_launch("--config_file", str(ROOT / f"launch/accelerate/{name}.yaml"), *flags)


FLAGS = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
FLAGS += ["--dynamo_backend", "no", "--main_process_port", "0", "--max_restarts", "3"]
LAUNCHERS = [
    pytest.param(lambda: recipe("cpu_2", "--max_restarts", "3"), id="cpu_2.yaml"),
    pytest.param(lambda: ["bash", str(ROOT / "launch/torchrun.sh")], id="torchrun.sh", marks=pytest.mark.slow),
    pytest.param(lambda: accelerate_launch(*FLAGS), id="flags", marks=pytest.mark.slow),
    pytest.param(lambda: accelerate_launch(*FLAGS, "--rdzv_backend", "c10d"), id="c10d", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_recipe_starts_two_processes_and_restarts_them(
    launcher: Callable[[], list[str]], tmp_path: Path, twin: Path
) -> None:
    """The script itself asserts that it has two ranks."""
    plan = ChaosPlan(str(tmp_path / "chaos"), seed=15, kills=1)
    script = [CHAOS, SPECIMEN, "--world-size", "2", "--run-dir", str(tmp_path / "run")]
    extra = plan.to_environment() | {"NPROC": "2", "PYTHON": sys.executable}
    ended = run_command([*launcher(), *script], deadline_seconds=240, extra=extra).require_success()
    assert len(plan.fired()) == 1
    assert "[rank 0/2 attempt 2] WARNING" in ended.output
    assert "\r" not in ended.output
    assert_same_run(twin, tmp_path / "run")


def test_the_recipe_for_one_gpu_starts_one_process_on_a_machine_without(tmp_path: Path) -> None:
    script = [SPECIMEN, "--world-size", "1", "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    ended = run_command([*recipe("single_gpu"), *script], deadline_seconds=120).require_success()
    assert "Epoch 1/1" in ended.output
    failing = run_command([*recipe("single_gpu"), str(ROOT / "tests/support/no_such_script.py")], deadline_seconds=60)
    assert failing.returncode != 0


@pytest.mark.slow
def test_accelerates_recipe_serves_two_machines(tmp_path: Path, twin: Path) -> None:
    """As its header says; two agents on this machine, of which machine 0 must be the first to open the port."""
    plan = ChaosPlan(str(tmp_path / "chaos"), seed=15, kills=1)
    port = free_port()
    flags = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    flags += ["--rdzv_backend", "c10d", "--max_restarts", "3"]
    script = [CHAOS, SPECIMEN, "--world-size", "2", "--run-dir", str(tmp_path / "run")]
    first, second = ([*recipe("multi_gpu", *flags, "--machine_rank", rank), *script] for rank in "01")
    with Background(first, tmp_path / "log", plan.to_environment()) as machine:
        machine.wait_until(lambda: is_listening(port), "the rendezvous of machine 0")
        run_command(second, deadline_seconds=240, extra=plan.to_environment()).require_success()
        machine.wait(60).require_success()
    assert len(plan.fired()) == 1
    assert_same_run(twin, tmp_path / "run")


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
