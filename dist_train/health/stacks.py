"""Where the threads of this process are, and how the processes of the other ranks on this host stand.

Invariant: looking changes nothing and takes no lock of the program's own.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil

STOPPED = "stopped by a signal"
DEAD = "dead"
_STATES = {
    "T": STOPPED,
    "t": "held by a debugger",
    "D": "waiting in the kernel, for a disk or a driver",
    "Z": DEAD,
    "X": DEAD,
    "R": "running",
    "S": "sleeping",
}
_DEBUGGERS = ("bdb.py", "pdb.py")
_WAITS_FOR_PEERS = ("/torch/distributed/", "/torch/autograd/graph.py", "/nn/parallel/distributed.py")


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a rank runs."""

    host: str
    """With its PID namespace: within one of them process ids mean something to each other."""
    pid: int
    started: str
    """In the kernel's ticks: a process id may be given out again."""

    @staticmethod
    def of_this_process() -> Peer:
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = ""
        return Peer(f"{socket.gethostname()} {namespace}".strip(), os.getpid(), _started(os.getpid()))

    @property
    def name(self) -> str:
        return self.host.partition(" ")[0]

    def state(self, here: Peer) -> str:
        """In words; empty where it cannot be known from here."""
        if self.host != here.host:
            return ""
        return state_of(self.pid) if self.is_alive(here) else DEAD

    def is_alive(self, here: Peer) -> bool:
        """Whether it is known to be: this very process is there."""
        return self.host == here.host and bool(self.started) and _started(self.pid) == self.started


def state_of(pid: int) -> str:
    """How the kernel says a process stands; empty without /proc."""
    letter = next(iter(_stat(pid)), "")
    return _STATES.get(letter, letter)


def _started(pid: int) -> str:
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """What follows a process's name in /proc; nothing without /proc, or when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def stacks_of_all_threads() -> str:
    """As Python shows them, innermost call last; the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    parts = []
    for ident, frame in frames:
        if ident == main or ident != threading.get_ident():  # the one that looks is of no interest
            parts.append(f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def main_stack() -> list[traceback.FrameSummary]:
    """Of the main thread, innermost call last."""
    return list(traceback.extract_stack(_main_frame()))


def innermost(stack: Sequence[traceback.FrameSummary]) -> str:
    """The line that the main thread is at, as `file:line in function`."""
    return f"{stack[-1].filename}:{stack[-1].lineno} in {stack[-1].name}" if stack else "nowhere"


def line_of_the_script(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line outside of installed packages and the standard library: the one to look at first."""
    ours = [one for one in stack if not _is_installed(one.filename)]
    return innermost(ours or stack)


def waits_for_peers(stack: Sequence[traceback.FrameSummary]) -> bool:
    """Whether the main thread is inside a collective, so that the cause is another rank's."""
    return any(part in frame.filename for frame in stack for part in _WAITS_FOR_PEERS)


def is_debugged() -> bool:
    """Whether a person holds the main thread in a debugger."""
    frame = _main_frame()
    while frame is not None:
        if os.path.basename(frame.f_code.co_filename) in _DEBUGGERS or "pydevd" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _is_installed(path: str) -> bool:
    inside = (
        "site-packages",
        "dist-packages",
        f"{os.sep}lib{os.sep}python",
        os.path.dirname(os.path.dirname(__file__)),
    )
    return path.startswith("<") or any(part in path for part in inside)


def children_lines() -> list[str]:
    """Loader workers and the like."""
    with suppress(psutil.Error, OSError):
        found = psutil.Process().children(recursive=True)
        return [f"child process {one.pid}: {state_of(one.pid)}" for one in found]
    return []


def kill_children() -> None:
    """A loader's worker that hangs would outlive this process."""
    with suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
