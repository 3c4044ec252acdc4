"""A rank whose machine has vanished is noticed within half a minute, not when the collective's own time is over.

A process that dies closes its connections, and whoever waits for it learns of that at once. A machine that loses its
power or its network says nothing: what waits to hear from it waits for ever, and what has sent it something for the 15
minutes of TCP's retransmissions. Here the kernel asks the silent end (keep-alive), and a thread closes a connection
on which nothing was acknowledged for `PATIENCE_SECONDS`: the collective that waits on it then fails as it does for a
process that died.

Invariant: only silence counts. The other end's *kernel* answers, so a rank that is stopped, busy, stuck or does not
read what it is sent (its window is closed) is never taken for lost; that is why TCP_USER_TIMEOUT, which gives up on a
closed window, is not used. It watches the connections that it was shown, and knows nothing of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 30.0
"""`DIST_TRAIN_HOST_PATIENCE` (seconds, at least 3) overrides it."""
_LOOKS = 6  # within the patience
_ESTABLISHED = 1


@dataclass(frozen=True, slots=True)
class Line:
    """How a TCP connection stands. Source: struct tcp_info of linux/tcp.h."""

    established: bool
    unanswered: bool
    """Something was sent, again or as a probe, and is not acknowledged."""
    silent_seconds: float
    """Since the last acknowledgement."""

    @staticmethod
    def of(connection: socket.socket) -> Line:
        state, _, retransmits, probes, *_, silent_ms = struct.unpack(
            "=8B13I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        )
        return Line(state == _ESTABLISHED, bool(retransmits or probes), silent_ms / 1000)


class ConnectionWatch:
    """The connections to other machines that this process waits on.

    Args:
        patience_seconds: of silence, after which a connection is closed.
        look: how a connection stands.
    """

    def __init__(self, patience_seconds: float, look: Callable[[socket.socket], Line] = Line.of) -> None:
        self._patience = patience_seconds
        self._look = look
        self._watched: dict[int, int] = {}  # inode -> file descriptor
        self._suspects: set[int] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def new_connections(self) -> Iterator[None]:
        """Watches from now on the connections to other machines that are made within."""
        before = _sockets()
        yield
        with self._lock:
            for inode, descriptor in _sockets().items():
                if inode not in before:
                    self._watch(inode, descriptor)
            if self._watched and self._thread is None:
                self._thread = threading.Thread(target=self._keep_looking, name="dist_train-connections", daemon=True)
                self._thread.start()

    def close_silent(self) -> list[str]:
        """Closes what has been silent for too long at two looks in a row; returns the addresses of the other ends.

        Once is not enough: a probe whose answer is on its way looks the same.
        """
        with self._lock:
            silent = {inode for inode, descriptor in list(self._watched.items()) if self._is_silent(inode, descriptor)}
            lost, self._suspects = silent & self._suspects, silent
            addresses = set()
            for inode in lost:
                with _borrowed(self._watched.pop(inode), inode) as connection:
                    if connection is not None:
                        addresses.add(connection.getpeername()[0].removeprefix("::ffff:"))
                        connection.shutdown(socket.SHUT_RDWR)
        return sorted(addresses)

    def _watch(self, inode: int, descriptor: int) -> None:
        with _borrowed(descriptor, inode) as connection:
            if connection is None or not _leads_to_another_machine(connection):
                return
            idle, interval = max(int(self._patience / 3), 1), max(int(self._patience / 6), 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(int((self._patience - idle) / interval), 1)
            )
            self._watched[inode] = descriptor

    def _is_silent(self, inode: int, descriptor: int) -> bool:
        with _borrowed(descriptor, inode) as connection:
            if connection is not None and (line := self._look(connection)).established:
                return line.unanswered and line.silent_seconds >= self._patience
        del self._watched[inode]
        return False

    def _keep_looking(self) -> None:
        never = threading.Event()
        while not never.wait(self._patience / _LOOKS):
            if addresses := self.close_silent():
                logger.warning(
                    "%s has acknowledged nothing for %.0f s: that machine is down, or the network between it and this "
                    "one (%s) is. The connections to it are closed, so that whatever waits on them ends; the side of "
                    "the rendezvous goes on without the other. DIST_TRAIN_HOST_PATIENCE sets another patience.",
                    " and ".join(addresses),
                    self._patience,
                    socket.gethostname(),
                )


_watch: ConnectionWatch | None = None


def watch_new_connections() -> contextlib.AbstractContextManager[None]:
    """`ConnectionWatch.new_connections` of this process's one watch; does nothing where the kernel is not Linux."""
    global _watch
    if not hasattr(socket, "TCP_INFO") or not os.path.isdir("/proc/self/fd"):
        return contextlib.nullcontext()
    if _watch is None:
        _watch = ConnectionWatch(max(float(os.environ.get("DIST_TRAIN_HOST_PATIENCE", PATIENCE_SECONDS)), 3.0))
    return _watch.new_connections()


def _sockets() -> dict[int, int]:
    """Inode -> file descriptor of every socket of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            kind, _, rest = os.readlink(f"/proc/self/fd/{name}").partition(":[")
            if kind == "socket":
                found[int(rest.rstrip("]"))] = int(name)
    return found


@contextlib.contextmanager
def _borrowed(descriptor: int, inode: int) -> Iterator[socket.socket | None]:
    """The socket of a descriptor that another thread may close, or give to something else, at any moment; None when
    it has.
    """
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        yield None
        return
    with connection:
        yield connection if os.fstat(connection.fileno()).st_ino == inode else None


def _leads_to_another_machine(connection: socket.socket) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    except OSError:  # it listens, or is closed
        return False
    return bool(here != there)
