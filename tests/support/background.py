"""A command that runs beside the test: signalled and awaited by its own id, and ended with its whole session."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.launch import ROOT, Outcome, end_session, environment


class Background:
    """A context manager; what the command says goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, extra: Mapping[str, str] | None = None) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env=environment(extra), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def send(self, what: signal.Signals) -> None:
        self._process.send_signal(what)

    def wait(self, deadline_seconds: float) -> Outcome:
        try:
            self._process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_seconds} s:\n{self.output[-6000:]}") from None
        return Outcome(self._process.returncode, self.output)

    def wait_until(self, happened: Callable[[], bool], what: str, deadline_seconds: float = 60.0) -> None:
        """Polls; the command must not end meanwhile."""
        deadline = time.monotonic() + deadline_seconds
        while not happened():
            assert self.is_running, f"ended before {what}:\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"{what} did not come in {deadline_seconds} s:\n{self.output[-6000:]}"
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_session(self._process)
        self._process.wait(20)
