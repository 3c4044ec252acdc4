"""Who may write in a run directory: its newest attempt, and nobody else.

Invariant: an attempt is taken by creating `attempts/<n+1>` exclusively and durably; whoever finds a newer number than
its own has lost the directory and touches nothing more. Whether a previous owner lives is judged by a counter that it
keeps moving, watched on the observer's own monotonic clock: no clock of two machines is ever compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from dist_train.checkpoint.manifest import ATTEMPTS
from dist_train.checkpoint.store import Store
from dist_train.errors import RunInUseError

OWNER = f"{ATTEMPTS}/owner.json"
_LOOPBACK = ("", "localhost", "::1")
"""Addresses that mean another machine on each machine."""
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 15.0
"""How long a silent owner is watched before it counts as dead; `DIST_TRAIN_OWNER_PATIENCE` (seconds) overrides it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Who holds the directory, as far as another process can tell."""

    host: str
    """Machine, boot and PID namespace: within one of them process ids can be compared."""
    hostname: str
    pid: int
    pid_started: str
    launch: str
    """Equal for the attempts of one launch (one torchrun agent, one elastic job)."""
    attempt: int = 0
    beats: int = 0
    released: bool = False

    @staticmethod
    def of_this_process(environment: Mapping[str, str] = os.environ) -> Owner:
        host = f"{socket.gethostname()} {_read('/proc/sys/kernel/random/boot_id')} {_link('/proc/self/ns/pid')}"
        pid = os.getpid()
        return Owner(
            host=host,
            hostname=socket.gethostname(),
            pid=pid,
            pid_started=_started(pid),
            launch=_launch(environment, host),
        )

    def may_be_replaced_by(self, other: Owner) -> bool:
        """Without watching: left cleanly, the same launch or process, or dead on this very machine."""
        if self.released or self.launch == other.launch:
            return True
        if self.host != other.host:
            return False
        return self.pid == other.pid or self._is_dead_here()

    def is_known_to_be_gone(self) -> bool:
        """Whether it left, or is dead on this very machine; another machine's process may live."""
        here = Owner.of_this_process()
        return self.released or (self.host == here.host and self._is_dead_here())

    def _is_dead_here(self) -> bool:
        return _started(self.pid) != self.pid_started


class Ownership:
    """One attempt's hold on a run directory; only the main rank has one."""

    def __init__(
        self,
        store: Store,
        owner: Owner | None = None,
        *,
        patience_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._owner = owner or Owner.of_this_process()
        self._patience = patience_seconds or float(os.environ.get("DIST_TRAIN_OWNER_PATIENCE", PATIENCE_SECONDS))
        self._clock = clock
        self._sleep = sleep
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.on_beat: Callable[[int], None] = lambda attempt: None
        """Called when the directory is taken, then with each beat in the heartbeat's thread."""

    @property
    def attempt(self) -> int:
        return self._owner.attempt

    def acquire(self, at_least: int = 1) -> int:
        """Takes the directory over and returns the attempt's number.

        Args:
            at_least: above every number that is recorded elsewhere: a copy of the directory may have left out the
                empty files of attempts/.

        Raises:
            RunInUseError: the owner shows life, or two launches started at the same moment and the other one won.
        """
        self._store.make_directory(ATTEMPTS)
        self._require_dead_owner()
        attempt = max(newest_attempt(self._store) + 1, at_least)
        try:
            self._store.create_exclusive(f"{ATTEMPTS}/{attempt:06d}")
        except FileExistsError as error:
            raise RunInUseError(self._in_use("another launch started at the same moment")) from error
        self._owner = replace(self._owner, attempt=attempt)
        self._write()
        for name in self._store.list(ATTEMPTS):
            if name.endswith(".tmp"):  # a killed owner's; one that still beats writes another
                self._store.unlink(f"{ATTEMPTS}/{name}")
        self.on_beat(attempt)
        self._thread = threading.Thread(target=self._keep_beating, name="dist_train-heartbeat", daemon=True)
        self._thread.start()
        return attempt

    def is_held(self) -> bool:
        """Whether no newer attempt has taken the directory over."""
        return newest_attempt(self._store) == self._owner.attempt

    def require_held(self) -> None:
        """Raises RunInUseError when a newer attempt owns the directory."""
        newest = newest_attempt(self._store)
        if newest != self._owner.attempt:
            raise RunInUseError(
                f"Attempt {newest} has taken over {self._store.root} from this one (attempt {self._owner.attempt}, "
                f"process {self._owner.pid} on {self._owner.hostname}). This process writes nothing more there; "
                f"what attempt {newest} committed is untouched."
            )

    def release(self) -> None:
        """Stops the heartbeat and says that the directory is free."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        with contextlib.suppress(OSError):
            if self.attempt and self.is_held():
                self._owner = replace(self._owner, released=True)
                self._write()

    def _require_dead_owner(self) -> None:
        owner = read_owner(self._store)
        if owner is None or self._may_replace(owner):
            return
        deadline = self._clock() + self._patience
        while self._clock() < deadline:
            self._sleep(min(BEAT_SECONDS / 4, self._patience / 4))
            now = read_owner(self._store)
            if now is None or self._may_replace(now):
                return
            if (now.attempt, now.beats) != (owner.attempt, owner.beats):
                where = f"process {now.pid} on {now.hostname} (attempt {now.attempt}) is training there"
                raise RunInUseError(self._in_use(where))

    def _may_replace(self, owner: Owner) -> bool:
        """What an old attempt that woke up has written says nothing about the newest one: that is watched."""
        return owner.attempt == newest_attempt(self._store) and owner.may_be_replaced_by(self._owner)

    def _in_use(self, why: str) -> str:
        return (
            f"The run directory {self._store.root} is in use: {why}. Nothing was changed. "
            f"Wait for it to end or stop it, then run the same command again; or give another run_dir."
        )

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk must not look like a death for longer than it lasts
                if not self.is_held():
                    return
                self._owner = replace(self._owner, beats=self._owner.beats + 1)
                self._write()
                self.on_beat(self._owner.attempt)

    def _write(self) -> None:
        self._store.replace(OWNER, json.dumps(asdict(self._owner)).encode(), durable=False)


def newest_attempt(store: Store) -> int:
    """Number of the newest attempt, 0 before the first."""
    return max((int(name) for name in store.list(ATTEMPTS) if name.isdigit()), default=0)


def read_owner(store: Store) -> Owner | None:
    """Who holds the directory; None when nobody is recorded."""
    try:
        return Owner(**json.loads(store.read(OWNER)))
    except (OSError, ValueError, TypeError):
        return None


def _launch(environment: Mapping[str, str], host: str) -> str:
    run_id = environment.get("TORCHELASTIC_RUN_ID", "")
    if run_id and run_id != "none":
        address = environment.get("MASTER_ADDR", "")
        here = host if address in _LOOPBACK or address.startswith("127.") else ""
        return " ".join(filter(None, [run_id, f"{address}:{environment.get('MASTER_PORT')}", here]))
    leader = os.getppid() if run_id else os.getpid()
    return f"{host} {leader} {_started(leader)}"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks; empty when there is no such process (or no /proc)."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if fields and fields[0] in "ZX":
        return ""
    return fields[19] if len(fields) > 19 else _exists(pid)


def _exists(pid: int) -> str:
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
