"""A process that is to leave does leave: when it hangs on its way out, its stacks are shown and it is ended.

Invariant: what is armed is either cancelled or ends the process; ending it runs no further Python, because whatever
hangs may hold any lock. It saves nothing: whoever arms it has given the save its time.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from dist_train.console import print_text

SHUTDOWN_SECONDS: Final = 10
"""For what runs after the script's last line: exit handlers, destructors (NCCL's among them)."""
Leave = Callable[[int], object]


class Departure:
    """An end at a certain time. `leave` is `os._exit`, but in tests."""

    def __init__(self, seconds: float, why: str, exit_code: int, leave: Leave = os._exit) -> None:
        self._why = why
        self._seconds = seconds
        self._exit_code = exit_code
        self._leave = leave
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.name = "dist_train-departure"
        self._timer.start()

    def cancel(self) -> None:
        """It has left by itself, or need not."""
        self._timer.cancel()
        atexit.unregister(_bound_shutdown)

    def _end(self) -> None:
        leave_now(f"it did not end within {self._seconds:.0f} s ({self._why})", self._exit_code, self._leave)


def leave_now(why: str, exit_code: int, leave: Leave = os._exit) -> None:
    """Shows the stacks of all threads and ends this process; from any thread."""
    with contextlib.suppress(OSError, ValueError):  # whoever read the output may be gone
        print_text(f"Rank {os.environ.get('RANK', '0')} is ended now: {why}.", error=True)
        with open(os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2), "w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
    leave(exit_code)


def leave_by(seconds: float, why: str, exit_code: int) -> Departure:
    """Ends this process after `seconds`, whatever it then hangs in, unless the returned one is cancelled; and, once the
    script is done, bounds the interpreter's own end.
    """
    atexit.register(_bound_shutdown)
    return Departure(seconds, why, exit_code)


def _bound_shutdown() -> None:
    """An alarm of the system's: threads stand still while the interpreter is taken down, and so would the timer."""
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SHUTDOWN_SECONDS)
