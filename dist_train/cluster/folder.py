"""The launch's own folder on this node: what workers tell the launcher, anew for each attempt.

Invariant: only folders of launches of this user whose process has died are removed besides its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"dist-train-launch-(\d+)-")
_OF_TORCH = re.compile(r"torch_(\d+)_")


class Folder:
    """Below the directory for temporary files."""

    def __init__(self) -> None:
        _remove_those_of_dead_launches()
        self.path = Path(tempfile.mkdtemp(prefix=f"dist-train-launch-{os.getpid()}-"))

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
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).iterdir():
            found = _NAME.match(path.name)
            if found and path.stat().st_uid == os.getuid() and not psutil.pid_exists(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def remove_shared_memory(pids: Iterable[int]) -> None:
    """What data loaders of processes that were killed have left in /dev/shm; our own images have no name there."""
    dead = set(pids)
    with contextlib.suppress(OSError):
        for path in SHARED_MEMORY.iterdir():
            found = _OF_TORCH.match(path.name)
            if found and int(found[1]) in dead:
                with contextlib.suppress(OSError):
                    path.unlink()
