"""A process that has imported torch, accelerate and dist_train once, and forks a worker of it per request.

    launcher: {"start": 1, "variables": {...}}  -> {"started": 1, "pid": 4711}
              ... the worker ends ...           -> {"ended": 4711, "code": -9, "members": [4711, 4720]}
    the launcher's end of the socket closes     -> SIGTERM to all workers, after a grace SIGKILL, and the server ends

Invariant: no CUDA context exists when it forks; where an import made one, workers become fresh interpreters instead. It
has no thread but those of OpenBLAS, which sends them home around a fork. Of a worker that did not end well nothing of
its process group is left when its end is told. It knows nothing of ranks and attempts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from importlib import import_module
from typing import Any

from dist_train.cluster.worker import Program, boot_command, renew_randomness, run_program
from dist_train.launched import LAUNCHER_PID, WORKER_PID

Json = Any
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch._dynamo",  # the first optimizer brings it in, which takes as long as all the others
    "torch.profiler",
    "accelerate",
    "safetensors.torch",
    "multiprocessing.queues",
    "dist_train.run",
    "dist_train.trainer",
)
ORPHANS_GRACE_SECONDS = 30.0
"""How long workers may take to save and leave when the launcher has died."""
_PR_SET_PDEATHSIG = 1
_OF_THE_SERVER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def main(arguments: list[str]) -> int:
    """Serves until the launcher's end of the socket closes; in a forked worker, runs the program.

    Args:
        arguments: the program, the socket's descriptor, `fork` or `fresh`, modules to import besides.
    """
    program = Program.from_json(arguments[0])
    channel = socket.socket(fileno=int(arguments[1]))
    forks = arguments[2] == "fork"
    problem = _preload([*PRELOADED, *arguments[3:]]) if forks else ""
    server = ForkServer(channel)
    server.tell(ready=True, problem=problem)
    variables = server.serve()
    if variables is None:
        return 0
    os.environ.update(variables)
    if forks and not problem:
        renew_randomness()
        return run_program(program)
    command = boot_command("dist_train.cluster.worker", program)
    os.execv(command[0], command)


class ForkServer:
    """Forks, reaps and tells."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._former = {one: signal.getsignal(one) for one in _OF_THE_SERVER}
        self._pids: set[int] = set()
        self._received = b""
        self._end_at = float("inf")
        self._is_alone = False
        self._woken, wake = socket.socketpair()
        self._woken.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        for one in _OF_THE_SERVER:  # the launcher hears the terminal's and the platform's signals, and says what to do
            signal.signal(one, _ignore)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def tell(self, **fields: Json) -> None:
        with contextlib.suppress(OSError):  # the launcher may have died; `serve` sees it
            self._channel.sendall((json.dumps(fields) + "\n").encode())

    def serve(self) -> dict[str, str] | None:
        """Returns in a forked worker, with its variables; None at the server's end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._pids or not self._is_alone:
                ready = [key.fileobj for key, _ in selector.select(self._patience())]
                if self._woken in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                self._reap()
                if self._channel in ready:
                    for request in self._requests(selector):
                        variables = self._start(request)
                        if variables is not None:
                            return variables
                if time.monotonic() >= self._end_at:
                    self._signal_all(signal.SIGKILL)
        return None

    def _patience(self) -> float:
        """SIGCHLD wakes the selector; the rest is for a signal that came before it was heard."""
        return min(max(self._end_at - time.monotonic(), 0.05), 1.0)

    def _requests(self, selector: selectors.BaseSelector) -> list[Json]:
        try:
            data = self._channel.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            selector.unregister(self._channel)
            self._is_alone = True
            self._end_at = time.monotonic() + ORPHANS_GRACE_SECONDS
            self._signal_all(signal.SIGTERM)
            return []
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _start(self, request: Json) -> dict[str, str] | None:
        server = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_SERVER)  # one for the worker must not meet our handlers
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_SERVER)
            self._pids.add(pid)
            self.tell(started=request["start"], pid=pid)
            return None
        self._become_worker(server)
        return {**request["variables"], LAUNCHER_PID: str(server), WORKER_PID: str(os.getpid())}

    def _become_worker(self, server: int) -> None:
        signal.set_wakeup_fd(-1)
        for one, handler in self._former.items():
            signal.signal(one, handler)
        for end in (self._channel, self._woken, self._wake):
            end.close()
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_SERVER)
        die_with_parent(server)

    def _reap(self) -> None:
        for pid in list(self._pids):
            members = []
            if hasattr(os, "waitid"):  # macOS has none before Python 3.13
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None:
                    continue
                if (ended.si_code, ended.si_status) != (os.CLD_EXITED, 0):
                    # Before its id is given back, and with it the id of its process group.
                    members = members_of_group(pid)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._pids.discard(pid)
                self.tell(ended=pid, code=os.waitstatus_to_exitcode(status), members=members)

    def _signal_all(self, what: signal.Signals) -> None:
        for pid in self._pids:
            os.kill(pid, what)
            if what is signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, what)


def die_with_parent(parent: int) -> None:
    """Linux asks this process to end when its parent dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def members_of_group(group: int) -> list[int]:
    """Processes of a process group; none where the platform has no /proc."""
    members = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal() and _group_of(name) == group:
                members.append(int(name))
    return members


def _group_of(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[2])
    except (OSError, ValueError, IndexError):
        return None


def _preload(names: list[str]) -> str:
    """Imports what every worker needs; returns why this process must not be forked, "" where it may."""
    # The other way to count GPUs initialises the CUDA driver, which no forked process can use.
    asked = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        for name in names:
            import_module(name)
    except Exception as error:
        return f"{name} cannot be imported ({type(error).__name__}: {error})"
    finally:
        if asked is None:
            del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    if _cuda_is_in_use():
        return "an import has initialised CUDA"
    gc.collect()
    gc.freeze()  # the collector of a worker leaves these pages shared
    return ""


def _cuda_is_in_use() -> bool:
    """Whether somebody has called cuInit: afterwards no forked process can use CUDA."""
    if not sys.modules["torch"].version.cuda:
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    not_initialised = 3
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != not_initialised


def _ignore(number: int, frame: object) -> None:
    """A handler of its own, not SIG_IGN: a program that a worker starts must not inherit the deafness."""
