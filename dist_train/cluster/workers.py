"""The workers of this node as the launcher holds them: started through the fork server, watched, signalled, ended.

Invariant: an end is known the moment it happens (no polling), and `stop` leaves nothing behind. Where the fork server
dies its workers end with it, and the next start has a new one.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from dist_train.cluster.fork_server import ORPHANS_GRACE_SECONDS
from dist_train.cluster.worker import Program, boot_command
from dist_train.errors import DeadlineError

Json = Any
IMPORTS_SECONDS = 900.0
"""How long the imports of the fork server may take: a cold network file system is slow."""
AFTER_TERM_SECONDS = 3.0
"""What a worker that was told to end, and has nobody to agree with, may take for it."""
_LAST_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The end of one worker."""

    pid: int
    code: int
    """Negative for a signal."""
    server_died: bool = False


@dataclass(slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    received: bytes = b""
    problem: str | None = None
    pids: dict[int, int] = field(default_factory=dict)
    """Local rank -> process, of what was started and not yet said to have ended."""


class Workers:
    """Starts and ends one worker a local rank, again and again.

    Args:
        forks: from a process with the imports done; else each worker is a fresh interpreter.
        preload: further modules to import once.
        environment: of the server, and so of all workers.
        wake: a socket that ends `wait` when something can be read from it; reading is the caller's.
        say: tells the user something.
    """

    def __init__(
        self,
        program: Program,
        *,
        forks: bool,
        preload: Sequence[str],
        environment: Mapping[str, str],
        wake: socket.socket,
        say: Callable[[str], None],
    ) -> None:
        self._program, self._forks, self._preload, self._say = program, forks, preload, say
        self._wake, self._environment = wake, environment
        self._server: _Server | None = None
        self.exits: dict[int, Exit] = {}
        """Local rank -> its end, of the present workers, in the order in which they ended."""
        self.ended_pids: set[int] = set()
        """Of all attempts: processes that did not end well, and what they had started."""

    @property
    def pids(self) -> dict[int, int]:
        """Local rank -> process, of those that live."""
        return self._server.pids if self._server else {}

    def open(self) -> None:
        """Starts the server, which imports while the caller goes on."""
        ours, its = socket.socketpair()
        how = "fork" if self._forks else "fresh"
        server = "dist_train.cluster.fork_server"
        command = boot_command(server, self._program, str(its.fileno()), how, *self._preload)
        process = subprocess.Popen(
            command,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )
        its.close()
        self._server = _Server(process, ours)

    def start(self, variables: Mapping[int, Mapping[str, str]]) -> dict[int, int]:
        """One worker for each local rank with its environment variables; returns their processes.

        Raises:
            DeadlineError: the server did not come up.
        """
        self.exits = {}
        if self._server is None or self._server.process.poll() is not None:
            self._close_server()
            self.open()
        server = self._server
        assert server is not None
        for local_rank, own in variables.items():
            request = json.dumps({"start": local_rank, "variables": dict(own)})
            with contextlib.suppress(OSError):  # a server that has died is found below
                server.channel.sendall(request.encode() + b"\n")
        deadline = time.monotonic() + IMPORTS_SECONDS
        while self._server is server and len(server.pids) + len(self.exits) < len(variables):
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"The process that imports torch and starts the workers (id {server.process.pid}) has not done so "
                    f"in {IMPORTS_SECONDS:.0f} s. Look at what it waits for; --start-method spawn does without it."
                )
            self.wait(1.0, wake=False)
        for local_rank in variables:
            if local_rank not in self.exits and local_rank not in self.pids:
                self.exits[local_rank] = Exit(pid=0, code=-signal.SIGKILL, server_died=True)
        return dict(self.pids)

    def wait(self, seconds: float, *, wake: bool = True) -> None:
        """Returns when a worker has ended, when `wake` is readable, or after so many seconds."""
        server = self._server
        with selectors.DefaultSelector() as selector:
            if server is not None:
                selector.register(server.channel, selectors.EVENT_READ)
            if wake:
                selector.register(self._wake, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(max(seconds, 0.0))]
        if server is not None and server.channel in ready:
            self._hear(server)

    def send(self, what: signal.Signals, to: Collection[int] | None = None) -> None:
        """A signal to each worker that lives, or to some local ranks: to it alone, not to what it has started."""
        for pid in [pid for local_rank, pid in self.pids.items() if to is None or local_rank in to]:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(what)

    def stopped(self) -> set[int]:
        """Local ranks of workers that SIGSTOP (or a debugger) holds."""
        found = set()
        for local_rank, pid in self.pids.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    found.add(local_rank)
        return found

    def wait_all(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Until all have ended, or `until` says so; returns whether they have."""
        deadline = time.monotonic() + seconds
        while self.pids and not until() and (rest := deadline - time.monotonic()) > 0:
            self.wait(min(rest, 0.2), wake=False)
        return not self.pids

    def kill(self) -> None:
        """Nothing of them is left when this returns."""
        self.send(signal.SIGKILL)
        if not self.wait_all(_LAST_SECONDS) and self._server is not None:
            self._say(f"workers {sorted(self.pids.values())} do not die of SIGKILL; they are left behind")
            self._close_server()

    def close(self) -> None:
        """Ends workers and server."""
        if self.pids:
            self.kill()
        self._close_server()

    def _hear(self, server: _Server) -> None:
        try:
            data = server.channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._bury(server)
            return
        *lines, server.received = (server.received + data).split(b"\n")
        for message in map(json.loads, lines):
            self._take_in(server, message)

    def _take_in(self, server: _Server, message: dict[str, Json]) -> None:
        if "ready" in message:
            if message["problem"]:
                self._say(f"each worker imports for itself: {message['problem']}")
        elif "started" in message:
            server.pids[message["started"]] = message["pid"]
        else:
            local_rank = next((rank for rank, pid in server.pids.items() if pid == message["ended"]), None)
            if local_rank is not None:
                pid = server.pids.pop(local_rank)
                self.exits[local_rank] = Exit(pid=pid, code=message["code"])
                self.ended_pids.update(message["members"])

    def _bury(self, server: _Server) -> None:
        """The server has died. Its workers were told to end by the kernel; they are waited for, then killed."""
        self._say("the process that forks the workers has died; it will be started anew")
        left = [process for pid in server.pids.values() if (process := _find(pid)) is not None]
        _, alive = psutil.wait_procs(left, timeout=ORPHANS_GRACE_SECONDS)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_LAST_SECONDS)
        for local_rank, pid in server.pids.items():
            self.exits[local_rank] = Exit(pid=pid, code=-signal.SIGKILL, server_died=True)
        server.pids.clear()
        self._close_server()

    def _close_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.channel.close()
        try:
            server.process.wait(timeout=AFTER_TERM_SECONDS)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait(timeout=_LAST_SECONDS)


def _find(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
