"""From a signal to the end: a process that was told to leave and reaches no boundary is not waited for without end.

    signal -> (in C, also while the main thread hangs in a collective) wakeup descriptor -> this thread
    the grace is over                                 end
    several ranks of one launcher, stuck in a step:   another worker of this machine is gone        end
                                                      much longer than ever before                  end

Under torchrun the same SIGTERM means "save and leave" and "the others are dead, you will be restarted"; what tells them
apart is whether training still moves. Its SIGKILL comes after 30 s, whatever the flags say.

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

GRACE: Final = "DIST_TRAIN_GRACE"
"""Environment variable: seconds from the signal to SIGKILL, where the platform gives more or less than usual."""
ELASTIC_GRACE_SECONDS: Final = 28.0
"""torchrun gives 30 s: leaving before that shows where each rank stood."""
ALONE_GRACE_SECONDS: Final = 600.0
"""Whoever started the script directly will say it again, or kill."""
LONELY_SECONDS: Final = 2.0
"""A worker of this machine is gone, and this one hangs: its own error, if there is to be one, comes at once."""
STUCK_SECONDS: Final = 10.0
STUCK_TIMES: Final = 3.0
"""Nothing moves: longer than this, and than so many times the longest that it ever took."""
_POLL_SECONDS: Final = 0.2
_IDLE_SECONDS: Final = 1.0
_URGENT: Final = ("SIGTERM", "SIGINT")
_MOVING: Final = (Phase.DATA, Phase.STEP, Phase.OTHER)
"""Phases of which the next boundary is the end."""


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
        self._told: Signals | None = None
        self._told_at = self._again_at = math.inf
        self._since = clock()
        self._longest = 0.0
        self._steps = 0
        self._is_over = False
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
            ready, _, _ = select.select([pipe[0]], [], [], _IDLE_SECONDS if self._told is None else _POLL_SECONDS)
            for number in os.read(pipe[0], 64) if ready else b"":
                self.hear(number)
            if why := self.find_reason():
                assert self._told is not None
                self._is_over = True
                self._leave(why, 128 + self._told)

    def hear(self, number: int) -> None:
        """A signal came, whether or not the main thread can run its handler."""
        if self._former_fd >= 0 and number:
            with contextlib.suppress(OSError):
                os.write(self._former_fd, bytes([number]))
        names = {getattr(signal, name, None): name for name in (*_URGENT, "SIGUSR1", "SIGHUP")}
        if number not in names:
            return
        now = self._clock()
        is_urgent, was_urgent = names[number] in _URGENT, self._told is not None and self._told.name in _URGENT
        if is_urgent and was_urgent and now - self._told_at >= 1.0:
            self._again_at = min(self._again_at, now)
        if self._told is None or (is_urgent and not was_urgent):
            self._told, self._told_at = Signals(number), now

    def find_reason(self) -> str:
        """Why to end now; "" while there is none."""
        if self._told is None or self._is_over:
            return ""
        now, name = self._clock(), self._told.name
        waited = now - self._told_at
        stuck = now - max(self._told_at, self._since)
        phase = phases.current()
        where = f"in the phase {phase}, after step {phases.global_step()}"
        if now - self._again_at >= LONELY_SECONDS:
            return f"{name} came a second time, and the main thread does not answer ({where})"
        if waited >= self._grace:
            return f"{name} came {waited:.0f} s ago, and no step boundary since ({where})"
        if not (self._several and launched.by_elastic() and phase in _MOVING):
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
        return ELASTIC_GRACE_SECONDS if launched.by_elastic() else ALONE_GRACE_SECONDS
    with contextlib.suppress(ValueError):
        if float(told) > 0:
            return float(told)
    raise ConfigError(
        f"The environment variable {GRACE} is {told!r}; it must be a number of seconds above 0. Correct it, or unset "
        f"it for what is known of the launcher."
    )


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
