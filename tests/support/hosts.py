"""Several machines on this one: each is a network namespace with a name, an address and process ids of its own.

    with Network(2) as network:
        with network.hosts[0].start([...], log) as launch: ...
        network.hosts[1].kill(); network.hosts[1].boot(); network.hosts[0].cut()

What they share is the file system, as hosts share a run directory. The cables end in a switch that is a namespace too,
so that no firewall of this machine sees the frames and no address can collide with anybody's. Names hold the owner's
process id: what a killed test left behind is found and removed by the next `Network`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.background import Background
from tests.support.launch import ROOT, Outcome, run_command

_PREFIX = "dtn"
_TOOLS = ("ip", "nsenter", "unshare", "setpriv", "mount", "hostname")
_NUMBERS = itertools.count()
# Process 1 of a host: names it, and reaps what is orphaned; all its processes die with it.
_INIT = 'mount --bind "$1" /etc/hosts && hostname "$2" && echo up; sleep infinity & wait'


def why_not() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"making network namespaces needs {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        with tempfile.TemporaryDirectory() as folder, Network(1, Path(folder)):
            return ""
    except (AssertionError, OSError) as error:
        return f"this machine makes no network namespaces: {error}"


class Host:
    """One machine; made by `Network`, up from the start."""

    def __init__(self, name: str, address: str, namespace: str, switch: str, port: str, names: Path) -> None:
        self.name = name
        self.address = address
        self._namespace = namespace
        self._switch = switch
        self._port = port
        self._names = names
        self._init: subprocess.Popen[str] | None = None
        _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def boot(self) -> None:
        """After `kill`: the same machine with no process but its first, and other process ids."""
        inside = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._namespace]
        unshare = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._init = subprocess.Popen(
            [*inside, *unshare, "sh", "-c", _INIT, "init", str(self._names), self.name],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "up\n", f"{self.name} did not boot"

    def start(self, command: Sequence[str], log: Path, extra: Mapping[str, str] | None = None) -> Background:
        """Runs a command on this host beside the test."""
        return Background(self._inside(command), log, extra)

    def run(
        self, command: Sequence[str], *, deadline_seconds: float, extra: Mapping[str, str] | None = None
    ) -> Outcome:
        """Runs a command on this host to its end."""
        return run_command(self._inside(command), deadline_seconds=deadline_seconds, extra=extra)

    def pids(self) -> list[int]:
        """Of all processes of this host, its first included, as this machine counts them."""
        return [int(pid) for pid in _ip("netns", "pids", self._namespace).split()]

    def kill(self) -> None:
        """Every process at once, by its id. Their kernel is ours and still closes their connections: a host that
        loses its power says nothing, so `cut` it first.
        """
        deadline = time.monotonic() + 20
        while pids := self.pids():
            assert time.monotonic() < deadline, f"{self.name}: processes {pids} do not die"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        if self._init is not None:
            self._init.communicate(timeout=20)
            self._init = None

    def pause(self) -> None:
        """Every process but the first stands still, as all of a machine does whose hypervisor has paused it. Its
        kernel, which is ours, still answers: `cut` it first.
        """
        self._signal(signal.SIGSTOP, self._own_pids())

    def unpause(self) -> None:
        own = self._own_pids()
        self._signal(signal.SIGCONT, own)
        # `nsenter` stops itself when what it has started is stopped, and must not see that once more.
        self._signal(signal.SIGCONT, [pid for pid in self.pids() if pid not in own])

    def cut(self) -> None:
        """Unplugged at the switch: frames vanish, and no interface of any host says so."""
        _ip("-n", self._switch, "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "master", "bridge")

    def _own_pids(self) -> list[int]:
        """Of the processes that were started on it, without its first."""
        first = self._first_process()
        here = os.readlink(f"/proc/{first}/ns/pid")
        return [pid for pid in self.pids() if pid != first and _namespace_of(pid) == here]

    def _signal(self, what: signal.Signals, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def _inside(self, command: Sequence[str]) -> list[str]:
        first = self._first_process()
        return ["nsenter", "-t", str(first), "--net", "--uts", "--pid", "--mount", "env", "-C", str(ROOT), *command]

    def _first_process(self) -> int:
        """`setpriv`, `ip` and `unshare` are one process after another; the host's first is that one's child."""
        assert self._init is not None, f"{self.name} is not up"
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        assert len(children) == 1, f"{self.name} has no first process"
        return int(children[0])


class Network:
    """Hosts node0, node1, ... at 10.77.0.1, 10.77.0.2, ..., each of which reaches the others by name. A context
    manager; `folder` gets one small file.
    """

    def __init__(self, num_hosts: int, folder: Path) -> None:
        remove_leftovers()
        self._base = f"{_PREFIX}{os.getpid()}n{next(_NUMBERS)}"
        self._num_hosts = num_hosts
        self._folder = folder
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        switch = f"{self._base}s"
        lines = [f"10.77.0.{number + 1} node{number}\n" for number in range(self._num_hosts)]
        names = self._folder / "hosts"
        names.write_text("127.0.0.1 localhost\n" + "".join(lines))
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number in range(self._num_hosts):
                place = (f"{self._base}h{number}", switch, f"port{number}", names)
                self.hosts.append(Host(f"node{number}", f"10.77.0.{number + 1}", *place))
                self.hosts[-1].boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for host in self.hosts:
            host.kill()
        _remove(name for name in namespaces() if name.startswith(self._base))


def remove_leftovers() -> None:
    """Of tests that were killed."""
    for name in namespaces():
        owner = re.match(rf"{_PREFIX}(\d+)\D", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _remove([name])


def _remove(names: Iterable[str]) -> None:
    for name in names:
        for pid in _ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "del", name)


def namespaces() -> list[str]:
    """Names of all that there are on this machine."""
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _namespace_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout
