"""A process that is to leave does, whatever it hangs in: its script, an exit handler, or its own destructors."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

START = """
import atexit, time
from dist_train.health import leaving
def hang(*nothing, time=time):
    end = time.monotonic() + 40
    while time.monotonic() < end:
        time.sleep(0.05)
class HangsWhenItDies:
    __del__ = hang
    hang = hang
"""
HANGS = [
    pytest.param("leaving.leave_by(0.2, 'in the test', 7); hang()", 7, id="script"),
    pytest.param("atexit.register(hang); leaving.leave_by(60, 'in the test', 7)", -signal.SIGALRM, id="exit handler"),
    pytest.param("kept = HangsWhenItDies(); leaving.leave_by(60, 'in the test', 7)", -signal.SIGALRM, id="destructor"),
    pytest.param("leaving.leave_by(0.2, 'in the test', 7).cancel(); time.sleep(0.4)", 0, id="cancelled"),
]


@pytest.mark.parametrize(("last_lines", "exit_code"), HANGS)
def test_a_process_that_is_to_leave_does(last_lines: str, exit_code: int) -> None:
    script = f"{START}\nleaving.SHUTDOWN_SECONDS = 1\n{last_lines}\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert ended.returncode == exit_code, ended.stderr
    assert ("did not end within 0 s (in the test)" in ended.stderr) == (exit_code == 7)


def test_where_it_hung_is_shown() -> None:
    script = f"{START}\nleaving.leave_by(0.2, 'in the test', 7); hang()\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert "in hang" in ended.stderr
