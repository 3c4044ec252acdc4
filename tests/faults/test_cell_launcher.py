"""The launcher of a cell: exit codes and one line for what torchrun tells at length."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import environment, run_command

pytestmark = pytest.mark.distributed
LAUNCHER = [sys.executable, "-m", "dist_train.cluster.launcher", "--nproc-per-node=2"]
DEADLINE_SECONDS = 90


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("print('well')", 0, "well"),
        ("sys.exit(93)", 93, ""),
        ("raise ValueError('no such thing')", 1, "ValueError: no such thing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Rank 0 was ended by SIGKILL"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(ending: str, code: int, told: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    other = "if os.environ['RANK'] == '1': sys.exit()"
    script.write_text(f"import os, signal, sys\n{other}\n{ending}\n")
    ended = run_command([*LAUNCHER, str(script)], deadline_seconds=DEADLINE_SECONDS)
    assert ended.returncode == code, ended.output
    assert told in ended.output
    assert "ChildFailedError" not in ended.output
    assert "torch/distributed" not in ended.output


def test_an_interrupt_ends_the_workers_and_is_told_by_the_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    begun = "os.write(1, b'begun\\n')"  # one write: the ranks' lines share a pipe
    script.write_text(f"import os, time\n{begun}\ntime.sleep(600)\n")
    command = [*LAUNCHER, str(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "SignalException" not in said
