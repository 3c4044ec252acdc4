"""A log that nobody watches has no carriage returns and one line a thing; a terminal has a live line."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch import ROOT, environment, run_command

pytestmark = pytest.mark.distributed
SOLO = [sys.executable, str(ROOT / "tests/support/solo.py"), "--pause", "0.05", "--run-dir"]
DEADLINE_SECONDS = 60.0


def on_a_terminal(command: list[str]) -> str:
    """What a person's terminal receives."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT)
    os.close(theirs)
    received, deadline = b"", time.monotonic() + DEADLINE_SECONDS
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            assert time.monotonic() < deadline, received
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    received += os.read(ours, 1 << 16)
                except OSError:  # Linux's end of a terminal
                    break
        assert process.wait(10) == 0, received
    finally:
        process.kill()
        os.close(ours)
    return received.decode().replace("\r\n", "\n")


def plain_lines(text: str) -> list[str]:
    return [line.split("\r")[-1] for line in text.splitlines()]


def test_a_file_gets_whole_lines_only_and_a_terminal_a_live_one(tmp_path: Path) -> None:
    written = run_command([*SOLO, str(tmp_path / "a")], deadline_seconds=DEADLINE_SECONDS).require_success().output
    assert "\r" not in written
    assert len(written.splitlines()) < 30
    shown = on_a_terminal([*SOLO, str(tmp_path / "b")])
    assert "\rEpoch 1/3 - step" in shown
    for number in (1, 2, 3):
        start = f"Epoch {number}/3 - Train Loss: "
        for lines in (written.splitlines(), plain_lines(shown)):
            assert sum(line.startswith(start) and "Val: " in line for line in lines) == 1, lines
