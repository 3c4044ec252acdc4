"""What a disk may hold after a power loss, from a record of every change that a store made.

POSIX promises little: the data of a file are on disk after fsync of the file, a name after fsync of its directory; any
other change may have reached the disk or not, whatever came before or after it. A rename is there or not there, never
in between. Data that were not synced may be missing, cut short or zeros.

    RecordingStore -> events -> crash_states(events) -> CrashState.materialise(folder) -> look
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.checkpoint.store import Operation, Store

BASE = 0
"""The directory that was there, durably, before anything was recorded."""
_SUBSETS_PER_MOMENT = 4


@dataclass(frozen=True)
class Written:
    """A file's (or link's) content became this."""

    inode: int
    data: bytes | str


@dataclass(frozen=True)
class Renamed:
    """Names of one directory changed, all at once: None takes a name away."""

    inode: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Synced:
    """Everything done to this file or directory before is durable."""

    inode: int
    kind: str
    path: str


@dataclass(frozen=True)
class Mark:
    """Something that is no change: an acknowledgement, for instance."""

    kind: str
    value: Any = None


Event = Written | Renamed | Synced | Mark


@dataclass
class Recorder:
    """A file system in memory that follows a store's changes; may serve several stores, one after the other."""

    base: Path
    events: list[Event] = field(default_factory=list)
    _directories: dict[int, dict[str, int]] = field(default_factory=lambda: {BASE: {}})
    _unsettled: tuple[Operation, Path] | None = None
    _inodes: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def before(self, operation: Operation, full: Path) -> None:
        """Whatever was told last has happened by now; this one will."""
        with self._lock:
            self.settle()
            self._unsettled = operation, full

    def mark(self, kind: str, value: Any = None) -> None:
        with self._lock:
            self.settle()
            self.events.append(Mark(kind, value))

    def settle(self) -> None:
        if self._unsettled is None:
            return
        (operation, full), self._unsettled = self._unsettled, None
        if operation.kind in ("fsync", "fsync_dir"):
            self.events.append(Synced(self._find(full), operation.kind, str(full.relative_to(self.base))))
            return
        folder, name = self._find(full.parent), full.name
        names = self._directories[folder]
        if operation.kind in ("mkdir", "create", "open", "symlink") and name not in names:
            self._add(folder, name, is_directory=operation.kind == "mkdir")
        if operation.kind in ("create", "open", "write", "truncate"):
            self.events.append(Written(names[name], full.read_bytes()))
        elif operation.kind == "symlink":
            self.events += [Written(names[name], operation.target), Synced(names[name], "symlink", str(full))]
        elif operation.kind in ("unlink", "rmdir") and name in names:
            del names[name]
            self.events.append(Renamed(folder, ((name, None),)))
        elif operation.kind == "rename":
            target = _inside(full, operation)
            assert target.parent == full.parent, "a rename between directories is not modelled"
            names[target.name] = names.pop(name)
            self.events.append(Renamed(folder, ((name, None), (target.name, names[target.name]))))
        elif operation.kind == "exchange":
            other = _inside(full, operation).name
            names[name], names[other] = names[other], names[name]
            self.events.append(Renamed(folder, ((name, names[name]), (other, names[other]))))

    def _add(self, folder: int, name: str, *, is_directory: bool) -> None:
        self._inodes += 1
        self._directories[folder][name] = self._inodes
        if is_directory:
            self._directories[self._inodes] = {}
        self.events.append(Renamed(folder, ((name, self._inodes),)))

    def _find(self, full: Path) -> int:
        inode = BASE
        for part in full.relative_to(self.base).parts:
            inode = self._directories[inode][part]
        return inode

    @property
    def is_directory(self) -> Callable[[int], bool]:
        return self._directories.__contains__


def _inside(full: Path, operation: Operation) -> Path:
    """A target is relative to the store's root, like the path."""
    root = Path(str(full).removesuffix(operation.path)) if operation.path else full
    return Path(os.path.normpath(root / operation.target))


class RecordingStore(Store):
    """A store whose changes a recorder follows."""

    def __init__(self, root: Path, recorder: Recorder) -> None:
        super().__init__(root)
        self._recorder = recorder

    def _before(self, kind: str, path: str, target: str = "") -> str:
        full = super()._before(kind, path, target)
        self._recorder.before(Operation(kind, path, target), Path(os.path.normpath(full)))
        return full


@dataclass(frozen=True)
class CrashState:
    """One thing that the disk may hold if the power fails after `moment` events."""

    moment: int
    how: str
    files: dict[str, bytes | str | None]
    """Path below the base -> content, target of a link, None for a directory."""

    def materialise(self, folder: Path) -> None:
        folder.mkdir()
        for name, data in self.files.items():
            path = folder / name
            if data is None:
                path.mkdir()
            elif isinstance(data, str):
                path.symlink_to(data)
            else:
                path.write_bytes(data)


def crash_states(recorder: Recorder, events: Sequence[Event]) -> Iterator[CrashState]:
    """Every moment with nothing, everything, each one and all but one of the unsynced changes, and some subsets.

    Equal states of different moments are different: more has been promised at the later one. Moments at which the
    promises and the possible states are those of the moment before are left out.
    """
    seen: set[Any] = set()
    promises = 0
    for moment in range(len(events) + 1):
        if moment and isinstance(events[moment - 1], Mark):
            promises += 1
        durable, pending = _split(events[:moment])
        for how, chosen in _choices(moment, pending):
            changes = sorted([*durable, *chosen], key=lambda one: one[0])
            files = dict(_tree(recorder, [change for _, change in changes]))
            key = (promises, frozenset(files.items()))
            if key not in seen:
                seen.add(key)
                yield CrashState(moment, how, files)


Numbered = tuple[int, Written | Renamed]


def _split(events: Sequence[Event]) -> tuple[list[Numbered], list[Numbered]]:
    """The changes that are durable and those that may be lost."""
    synced: set[int] = set()
    durable: list[Numbered] = []
    pending: list[Numbered] = []
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        if isinstance(event, Synced):
            synced.add(event.inode)
        elif isinstance(event, (Written, Renamed)):
            (durable if event.inode in synced else pending).append((index, event))
    return durable[::-1], pending[::-1]


def _choices(moment: int, pending: list[Numbered]) -> Iterator[tuple[str, list[Numbered]]]:
    yield "nothing pending", []
    yield "everything pending", pending
    for index, one in enumerate(pending):
        others = pending[:index] + pending[index + 1 :]
        yield f"only change {one[0]}", [one]
        yield f"all but change {one[0]}", others
        for how, torn in _torn(one[1]):
            yield f"all, with change {one[0]} {how}", [*others, (one[0], torn)]
    chance = random.Random(moment)
    for number in range(_SUBSETS_PER_MOMENT if len(pending) > 2 else 0):
        yield f"subset {number}", [one for one in pending if chance.random() < 0.5]


def _torn(change: Written | Renamed) -> Iterator[tuple[str, Written]]:
    if isinstance(change, Written) and isinstance(change.data, bytes) and change.data:
        half = len(change.data) // 2
        yield "cut", Written(change.inode, change.data[:half])
        yield "zeroed", Written(change.inode, change.data[:half] + bytes(len(change.data) - half))


def _tree(recorder: Recorder, changes: Sequence[Written | Renamed]) -> Iterator[tuple[str, bytes | str | None]]:
    names: dict[int, dict[str, int]] = {}
    data: dict[int, bytes | str] = {}
    for change in changes:
        if isinstance(change, Written):
            data[change.inode] = change.data
            continue
        for name, inode in change.names:
            here = names.setdefault(change.inode, {})
            if inode is None:
                here.pop(name, None)
            else:
                here[name] = inode

    def walk(inode: int, path: str) -> Iterator[tuple[str, bytes | str | None]]:
        for name, child in sorted(names.get(inode, {}).items()):
            full = f"{path}{name}"
            if recorder.is_directory(child):
                yield full, None
                yield from walk(child, f"{full}/")
            else:
                yield full, data.get(child, b"")

    yield from walk(BASE, "")
