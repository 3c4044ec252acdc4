"""From a signal to the end: a process that was told to leave and reaches no boundary is not waited for without end.

    signal -> (in C, also while the main thread hangs in a collective) wakeup descriptor -> this thread
    the grace is over                                 end
    several ranks of plain torchrun, stuck in a step: another worker of this machine is gone        end
                                                      much longer than ever before                  end

Under torchrun the same SIGTERM means "save and leave" and "the others are dead, you will be restarted"; what tells them
apart is whether training still moves. Its SIGKILL comes after 30 s, whatever the flags say. `dist-train launch` knows
which of the two it is, and how long a save takes: it does the waiting there.

Invariant: a process that was told nothing is never ended, nor one whose ranks have agreed on the stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from signal import Signals
from typing import Final

import psutil

from dist_train import launched, phases
from dist_train.errors import ConfigError
from dist_train.health.leaving import leave_now
from dist_train.phases import Phase
from dist_train.units import parse_seconds

GRACE: Final = "DIST_TRAIN_GRACE"
"""Environment variable: time from a signal to SIGKILL (90, "5min"), if the platform gives more or less than usual."""
TORCHRUN_GRACE_SECONDS: Final = 28.0
"""torchrun gives 30 s: leaving before that shows where each rank stood."""
OTHER_GRACE_SECONDS: Final = 600.0
"""Whoever started the script directly will say it again, or kill; so does `dist-train launch`."""
LONELY_SECONDS: Final = 2.0
"""A worker of this machine is gone, and this one hangs: its own error, if there is to be one, comes at once."""
STUCK_SECONDS: Final = 10.0
STUCK_TIMES: Final = 3.0
"""Nothing moves: longer than this, and than so many times the longest that it ever took."""
_POLL_SECONDS: Final = 0.2
_IDLE_SECONDS: Final = 1.0
URGENT: Final = ("SIGTERM", "SIGINT")
WARNINGS: Final = ("SIGUSR1", "SIGHUP")
AGAIN_SECONDS: Final = 1.0
"""A terminal and a launcher may deliver one and the same Ctrl-C twice; what comes later was meant."""
_MOVING: Final = (Phase.DATA, Phase.STEP, Phase.OTHER)
"""Phases of which the next boundary is the end."""


class Told:
    """What a process was told, by the first signal, and whether it was told again; a warning is followed by the real
    thing.
    """

    def __init__(self) -> None:
        self.signal: Signals | None = None
        self.at = math.inf

    def hear(self, number: Signals, now: float) -> bool:
        """Whether it was told to leave before, and this means now."""
        is_urgent, was_urgent = number.name in URGENT, self.signal is not None and self.signal.name in URGENT
        if is_urgent and was_urgent:
            return now - self.at >= AGAIN_SECONDS
        if self.signal is None or is_urgent:
            self.signal, self.at = number, now
        return False


class Vigil:
    """A thread that hears signals and, once there was one, watches the main thread.

    Args:
        grace_seconds: None takes the environment variable, else what the launcher is known for.
        leave: called with (why, exit code).
    """

    def __init__(
        self,
        *,
        grace_seconds: float | None = None,
        several: bool = False,
        leave: Callable[[str, int], object] = leave_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grace = _told_grace() if grace_seconds is None else grace_seconds
        self._several = several
        self._leave = leave
        self._clock = clock
        self._told = Told()
        self._again_at = math.inf
        self._since = clock()
        self._longest = 0.0
        self._steps = 0
        self._is_over = False
        self.numbers: frozenset[int] = frozenset()
        """The signals that the run has taken over."""
        self._pipe: tuple[int, int] | None = None
        self._former_fd = -1
        self._thread: threading.Thread | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    def open(self) -> None:
        """On the main thread, after the handlers are in place."""
        self._since = self._clock()
        self._stop_listening = phases.listen(self._moved)
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        try:
            self._former_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        except ValueError:  # no main thread of the main interpreter
            self.close()
            return
        _wakeup.fd = self._pipe[1]
        self._thread = threading.Thread(target=self._keep, name="dist_train-vigil", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Whatever comes now has a deadline of its own."""
        self._is_over = True

    def close(self) -> None:
        self._is_over = True
        self._stop_listening()
        if self._pipe is None:
            return
        reading, writing = self._pipe
        self._pipe = None
        if self._thread is not None:
            current = signal.set_wakeup_fd(self._former_fd)
            if current != writing:  # somebody has taken it over meanwhile, an event loop for instance
                signal.set_wakeup_fd(current)
            _wakeup.fd = -1
            with contextlib.suppress(OSError):
                os.write(writing, b"\0")
            self._thread.join(timeout=_IDLE_SECONDS + 1)
        os.close(writing)
        os.close(reading)

    def _moved(self, before: Phase, now: Phase) -> None:
        at = self._clock()
        if before in _MOVING and self._steps > 1:  # the first step compiles
            self._longest = max(self._longest, at - self._since)
        self._steps += before is Phase.STEP
        self._since = at
        if now in (Phase.END, Phase.OUTSIDE):
            self._is_over = True

    # In the thread

    def _keep(self) -> None:
        while (pipe := self._pipe) is not None:
            poller = select.poll()  # select() knows no file descriptor beyond 1023, and a job may have more open
            poller.register(pipe[0], select.POLLIN)
            ready = poller.poll(1000 * (_IDLE_SECONDS if self._told.signal is None else _POLL_SECONDS))
            for number in os.read(pipe[0], 64) if ready else b"":
                self.hear(number)
            if why := self.find_reason():
                assert self._told.signal is not None
                self._is_over = True
                self._leave(why, 128 + self._told.signal)

    def hear(self, number: int) -> None:
        """A signal came, whether or not the main thread can run its handler."""
        if self._former_fd >= 0 and number:
            with contextlib.suppress(OSError):
                os.write(self._former_fd, bytes([number]))
        now = self._clock()
        if number in self.numbers and self._told.hear(Signals(number), now):
            self._again_at = min(self._again_at, now)

    def find_reason(self) -> str:
        """Why to end now; "" while there is none."""
        if self._told.signal is None or self._is_over:
            return ""
        now, name = self._clock(), self._told.signal.name
        waited = now - self._told.at
        stuck = now - max(self._told.at, self._since)
        phase = phases.current()
        where = f"in the phase {phase}, after step {phases.global_step()}"
        if now - self._again_at >= LONELY_SECONDS:
            return f"{name} came a second time, and the main thread does not answer ({where})"
        if waited >= self._grace:
            return f"{name} came {waited:.0f} s ago, and no step boundary since ({where})"
        if not (self._several and _by_torchrun() and phase in _MOVING):
            return ""
        if stuck >= LONELY_SECONDS and _has_lost_a_sibling():
            return (
                f"{name} came, another worker of this machine is gone, and nothing moves since {stuck:.0f} s ({where})"
            )
        if self._longest and stuck >= max(STUCK_SECONDS, STUCK_TIMES * self._longest):
            return (
                f"{name} came, and nothing moves since {stuck:.0f} s, where {self._longest:.1f} s were the longest so "
                f"far ({where}): the other ranks are probably gone"
            )
        return ""


def _told_grace() -> float:
    told = os.environ.get(GRACE)
    if told is None:
        return TORCHRUN_GRACE_SECONDS if _by_torchrun() else OTHER_GRACE_SECONDS
    seconds = 0.0
    with contextlib.suppress(ConfigError):
        seconds = parse_seconds(float(told) if told.replace(".", "", 1).isdecimal() else told)
    if seconds > 0:
        return seconds
    raise ConfigError(
        f"The environment variable {GRACE} is {told!r}; it must be a time above 0, for instance 90 (seconds) or 5min. "
        f"Correct it, or unset it for what is known of the launcher."
    )


def _by_torchrun() -> bool:
    return launched.by_elastic() and not launched.by_dist_train()


def _has_lost_a_sibling() -> bool:
    """Whether fewer workers of this launcher live on this machine than it started; False where nobody can tell."""
    expected = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    try:
        children = psutil.Process(os.getppid()).children()
        alive = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return False
    return len(alive) < expected


class _Wakeup:
    fd = -1


_wakeup = _Wakeup()


def _forget_wakeup() -> None:
    """A forked child (a DataLoader's worker) must not tell its parent of a signal that only the child got."""
    if _wakeup.fd >= 0:
        _wakeup.fd = -1
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_wakeup)
