"""The signals that ask a launch to end, and to save first: TERM, INT, HUP, USR1.

Invariant: a handler notes and wakes, and does nothing else, but inside `interrupting`, where the launcher waits in a
library's loop that only an exception ends.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from dist_train.cluster.restart_policy import SIGNAL_BASE

TOLD_EARLY = "it was told to end while no worker ran"
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


AGAIN_SECONDS = 1.0
"""A platform that signals every process of a job, and a terminal, may deliver one and the same signal twice."""


class StopAskedError(Exception):
    """A signal came where the launcher waits for something else than its workers."""


class Signals:
    """Those that came, as a context manager of the main thread."""

    def __init__(self) -> None:
        self.count: Counter[signal.Signals] = Counter()
        self.wake, self._write_end = socket.socketpair()
        self.wake.setblocking(False)
        self._write_end.setblocking(False)
        self._fresh: list[signal.Signals] = []
        self._at: dict[signal.Signals, float] = {}
        self._interrupts = False

    @property
    def any(self) -> bool:
        return bool(self.count)

    @property
    def exit_code(self) -> int:
        """Of a process that the first of them ended, as a shell says it."""
        return SIGNAL_BASE + next(iter(self.count))

    def fresh(self) -> list[signal.Signals]:
        """Those that came since the last call, in order."""
        with contextlib.suppress(BlockingIOError):
            self.wake.recv(4096)
        fresh, self._fresh = self._fresh, []
        return fresh

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """A signal that came, or comes, raises StopAskedError here."""
        self._interrupts = True
        try:
            if self.count:
                raise StopAskedError
            yield
        finally:
            self._interrupts = False

    def rest(self, seconds: float) -> None:
        """Does nothing for so long; ends by StopAskedError."""
        with self.interrupting():
            time.sleep(seconds)

    def __enter__(self) -> Self:
        self._former: dict[signal.Signals, Any] = {}
        for one in HANDLED:
            if signal.getsignal(one) is not signal.SIG_IGN or one is signal.SIGTERM:  # `nohup` has made HUP deaf
                self._former[one] = signal.signal(one, self._note)
        self._former_wake = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._former_wake)
        for one, handler in self._former.items():
            signal.signal(one, handler)
        self.wake.close()
        self._write_end.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        one, now = signal.Signals(number), time.monotonic()
        if now - self._at.get(one, -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        self._at[one] = now
        self.count[one] += 1
        self._fresh.append(one)
        if self._interrupts:
            raise StopAskedError
