"""A worker that has failed leaves, though a thread of its script does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit, threading, time
atexit.register(print, "exit handlers have run")
threading.Thread(target=time.sleep, args=({seconds},), name="of-the-script").start()
raise SystemExit(93)
"""
WORKER = """
import sys
from dist_train.cluster import worker
worker.THREADS_SECONDS = {patience}
worker.run_program(worker.Program(name=sys.argv[1]))
"""


def run_worker(tmp_path: Path, *, seconds: float, patience: float) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(seconds=seconds))
    command = [sys.executable, "-c", WORKER.format(patience=patience), str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_thread_that_stays_is_left_behind_and_named(tmp_path: Path) -> None:
    ended = run_worker(tmp_path, seconds=1000.0, patience=0.2)
    assert (ended.returncode, ended.stdout) == (93, "exit handlers have run\n")
    assert "leaves without its threads of-the-script, which did not end" in ended.stderr


def test_a_thread_that_ends_is_waited_for(tmp_path: Path) -> None:
    ended = run_worker(tmp_path, seconds=0.3, patience=50.0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (93, "exit handlers have run\n", "")
