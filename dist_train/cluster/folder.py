"""The launch's own folder on this node: what workers tell the launcher, anew for each attempt.

Invariant: only folders of launches of this user whose process has died are removed besides its own. Whether a process
lives is asked only within the machine, boot and PID namespace where its id means something.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"dist-train-launch-([0-9a-f]{12})-(\d+)-")
_HASH_LENGTH = 12
_OF_TORCH = re.compile(r"torch_(\d+)_")


class Folder:
    """Below the directory for temporary files."""

    def __init__(self) -> None:
        _remove_those_of_dead_launches()
        self.path = Path(tempfile.mkdtemp(prefix=f"dist-train-launch-{where()}-{os.getpid()}-"))

    def renew(self, attempt: int) -> Path:
        """An empty folder for the notes of an attempt. Where the disk is full there is none: the workers then tell
        nothing, which costs an explanation and not the training.
        """
        folder = self.of_attempt(attempt)
        shutil.rmtree(self.of_attempt(attempt - 1), ignore_errors=True)  # was read; a full disk has room again
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def of_attempt(self, attempt: int) -> Path:
        return self.path / f"attempt-{attempt}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_those_of_dead_launches() -> None:
    here = where()
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).iterdir():
            found = _NAME.match(path.name)
            if found and found[1] == here and path.stat().st_uid == os.getuid() and not _lives(int(found[2])):
                shutil.rmtree(path, ignore_errors=True)


def where() -> str:
    """Machine, boot and PID namespace: containers may share the directory for temporary files, hosts as well."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {boot} {namespace}".encode()).hexdigest()[:_HASH_LENGTH]


def _lives(pid: int) -> bool:
    """Or another process that has got its id since; who has ended and was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def remove_shared_memory(pids: Iterable[int]) -> None:
    """What data loaders of processes that were killed have left in /dev/shm; our own images have no name there.
    What has a name with the id of a process that lives is that one's: ids are used again.
    """
    dead = {pid for pid in pids if not _lives(pid)}
    with contextlib.suppress(OSError):
        for path in SHARED_MEMORY.iterdir():
            found = _OF_TORCH.match(path.name)
            if found and int(found[1]) in dead:
                with contextlib.suppress(OSError):
                    if path.stat().st_uid == os.getuid():
                        path.unlink()
