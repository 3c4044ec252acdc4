"""The process that a notebook cell waits for: its lines, interrupts, deadlines, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dist_train.cluster.child import run_child
from tests.support.launch import environment

pytestmark = pytest.mark.distributed
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
PATIENCE_SECONDS = 30.0


def python(source: str) -> list[str]:
    return [sys.executable, "-u", "-c", source]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE_SECONDS:.0f} s until {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Cell:
    """Hears the lines; interrupts itself at some of them, as the stop button does."""

    def __init__(self, *interrupted_at: str) -> None:
        self.lines: list[str] = []
        self.pids: list[int] = []
        self._interrupted_at = interrupted_at

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith("pid "):
            self.pids.append(int(line.split()[1]))
        if line.startswith(self._interrupted_at or ("never",)):
            os.kill(os.getpid(), signal.SIGINT)

    def require_nothing_left(self) -> None:
        for pid in self.pids:
            wait_until(lambda pid=pid: not is_running(pid), f"process {pid} was gone")  # type: ignore[misc]


def test_lines_appear_as_they_are_written(tmp_path: Path) -> None:
    """The child goes on only when its first line has been heard."""
    heard = tmp_path / "heard"
    wait = "while not os.path.exists(sys.argv[1]): time.sleep(0.01)"
    command = [*python(f"import os, sys, time\nprint('one')\n{wait}\nprint('two', file=sys.stderr)"), str(heard)]
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        heard.touch()

    assert run_child(command, hear, seconds=PATIENCE_SECONDS) == 0
    assert lines == ["one", "two"]


def test_of_a_bar_only_the_last_state_is_said() -> None:
    cell = Cell()
    run_child(python("for n in range(1000): print(end=f'\\r{n} of 999')\nprint('\\ndone')"), cell)
    assert cell.lines == ["999 of 999", "done"]


def test_bytes_that_are_no_text_are_no_error() -> None:
    cell = Cell()
    assert run_child(python("import sys; sys.stdout.buffer.write(b'caf\\xe9')"), cell) == 0
    assert cell.lines == ["caf\ufffd"]


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_the_exit_code_is_that_of_a_shell(ending: str, code: int) -> None:
    assert run_child(python(f"import os, signal, sys; {ending}"), Cell()) == code


def test_the_child_gets_the_given_environment() -> None:
    cell = Cell()
    run_child(python("import os; print(os.environ['ANSWER'])"), cell, environment={**os.environ, "ANSWER": "42"})
    assert cell.lines == ["42"]


COUNTS_INTERRUPTS = """
import os, signal, sys, time
count = 0
def count_one(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, count_one)
print("pid", os.getpid())
while not count: time.sleep(0.01)
time.sleep(0.3)
print("interrupts", count)
"""
COMPLAINS = """
import os, sys, time
try:
    print("pid", os.getpid())  # the interrupt follows at once
    time.sleep(600)
except KeyboardInterrupt:
    print("saved step 7")
    print("[rank0]: ValueError: late")
    raise
"""
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("pid", worker.pid)
print("pid", os.getpid())
print("ready")
time.sleep(600)
"""


def test_an_interrupt_of_the_cell_reaches_the_child_once_and_is_raised_when_it_has_ended() -> None:
    cell = Cell("pid")
    with pytest.raises(KeyboardInterrupt):
        run_child(python(COUNTS_INTERRUPTS), cell)
    assert cell.lines[1:] == ["Interrupted: the training ends now; once more kills it.", "interrupts 1"]
    cell.require_nothing_left()


def test_of_an_end_that_was_asked_for_no_traceback_is_shown() -> None:
    cell = Cell("pid")
    with pytest.raises(KeyboardInterrupt):
        run_child(python(COMPLAINS), cell)
    assert cell.lines[1:] == ["Interrupted: the training ends now; once more kills it.", "saved step 7"]


def test_a_second_interrupt_kills_it_and_what_it_started() -> None:
    cell = Cell("ready", "Interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_child(python(DEAF), cell)
    assert len(cell.pids) == 2
    cell.require_nothing_left()


def test_a_child_that_ignores_an_interrupt_is_killed_after_a_grace() -> None:
    cell = Cell("ready")
    with pytest.raises(KeyboardInterrupt):
        run_child(python(DEAF), cell, grace_seconds=0.5)
    assert cell.lines[-1] == "It did not end within 0 s: killed."
    cell.require_nothing_left()


def test_a_child_that_outlasts_its_time_is_interrupted_and_then_killed() -> None:
    cell = Cell()
    assert run_child(python(DEAF), cell, seconds=1.5, grace_seconds=0.5) == 137
    assert any("The session is nearly over" in line for line in cell.lines)
    cell.require_nothing_left()


def test_what_a_child_leaves_behind_is_ended_with_it_although_it_holds_the_output() -> None:
    leaves = "import subprocess, sys; print('pid', subprocess.Popen(['sleep', '600']).pid)"
    cell = Cell()
    assert run_child(python(leaves), cell) == 0
    cell.require_nothing_left()


@LINUX
def test_the_death_of_the_kernel_ends_the_training(tmp_path: Path) -> None:
    source = (
        f"from dist_train.cluster.child import run_child\nrun_child({python(DEAF)!r}, lambda s: print(s, flush=True))"
    )
    kernel = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert kernel.stdout is not None
        pids = [int(kernel.stdout.readline().split()[1]) for _ in range(2)]
        assert is_running(pids[1])
    finally:
        kernel.kill()
        kernel.communicate(timeout=PATIENCE_SECONDS)
    wait_until(lambda: not is_running(pids[1]), "the training was gone")
    os.kill(pids[0], signal.SIGKILL)  # the stand-in's worker; torchrun ends its own when it is told to
