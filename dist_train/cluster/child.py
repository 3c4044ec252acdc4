"""A process that a notebook cell waits for: its lines appear as they are written, and it never outlives the cell.

    interrupt of the cell -> SIGINT to the child -> it ends by itself, else it is killed after a grace
    second interrupt, deadline and grace over, death of the notebook's kernel -> nothing of it is left

Invariant: one signal reaches the child for one interrupt (it has a session of its own, so that the terminal's or
Jupyter's signal to the whole process group does not reach it as well).
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

GRACE_SECONDS = 90.0
"""How long an interrupted child may take; torchrun itself gives its workers 30."""
DRAIN_SECONDS = 5.0
"""How long the pipe is read on after the child's end, where something that it started still holds it."""
_POLL_SECONDS = 0.2
_OF_A_TRACEBACK = re.compile(
    r"(?:\[rank\d+\]: ?)?"
    r"(?:$|\s|Traceback |During handling |The above exception |(?:[\w.]+\.)?[A-Z]\w*(?:Error|Interrupt)\b)"
)
"""A line of a traceback, or an empty one."""
# Linux tells the child when its parent dies, however that happens; the setting survives the exec.
_ENDS_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def run_child(
    command: Sequence[str],
    say: Callable[[str], None],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = float("inf"),
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Runs a command to its end.

    Args:
        command: its first word is the path of a program.
        say: gets each line of its output, both streams, without carriage returns: of a progress bar the last state.
        seconds: after that it is interrupted.

    Returns:
        Its exit code; 128 + n where signal n ended it, as a shell says it.

    Raises:
        KeyboardInterrupt: the cell was interrupted; the child has ended.
    """
    child = _Child(command, environment, seconds, grace_seconds)
    interrupt: KeyboardInterrupt | None = None
    try:
        while True:
            try:
                child.stream(say)
                break
            except KeyboardInterrupt as error:
                if interrupt is not None:
                    raise
                interrupt = error
                say("Interrupted: the training ends now; once more kills it.")
                child.interrupt()
                say = _without_tracebacks(say)
    finally:
        child.end()
    if interrupt is not None:
        raise interrupt
    return child.exit_code


def _without_tracebacks(say: Callable[[str], None]) -> Callable[[str], None]:
    """An end that was asked for is no error: what the training itself says of it is enough."""
    return lambda line: None if _OF_A_TRACEBACK.match(line) else say(line)


class _Child:
    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None, seconds: float, grace_seconds: float
    ) -> None:
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command]
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._end = time.monotonic() + seconds
        self._grace = grace_seconds
        self._kill_at = float("inf")
        self._process = subprocess.Popen(
            command,
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read, name="dist_train-child-output", daemon=True).start()

    @property
    def exit_code(self) -> int:
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def stream(self, say: Callable[[str], None]) -> None:
        """Until the child has ended and all that it wrote is said."""
        drained_at = float("inf")
        while True:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=_POLL_SECONDS)
                if line is None:
                    break
                say(line)
            now = time.monotonic()
            if now >= self._end:
                self._end = float("inf")
                say("The session is nearly over: the training is interrupted, so that what it saved can be kept.")
                self.interrupt()
            if now >= self._kill_at:
                self._kill_at = float("inf")
                say(f"It did not end within {self._grace:.0f} s: killed.")
                self._kill()
            if self._process.poll() is not None:
                drained_at = min(drained_at, now + DRAIN_SECONDS)
                if now >= drained_at:
                    break
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=DRAIN_SECONDS)  # a child that closes its output and goes on is killed in `end`

    def interrupt(self) -> None:
        """Asks it to end, and starts the grace."""
        self._kill_at = min(self._kill_at, time.monotonic() + self._grace)
        self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Nothing of it is left when this returns."""
        self._kill()
        self._process.wait(timeout=DRAIN_SECONDS)

    def _kill(self) -> None:
        """The child, what else is in its session, and its descendants: torchrun gives each worker a session."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in io.TextIOWrapper(self._process.stdout, errors="replace", newline="\n"):
                self._lines.put(line.rstrip("\r\n").rpartition("\r")[2])
        self._lines.put(None)
