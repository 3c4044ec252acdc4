"""A run and some of its checkpoints as one uncompressed zip, for a download: it unpacks into a run directory.

    ultra.zip         ultra/run.json, metrics.jsonl, ..., ultra/checkpoints/step-.../, ultra/SHA256SUMS
    ultra.zip.sha256  of the zip itself, for `sha256sum -c` next to it

Invariant: every byte is compared with what was committed on its way into the archive, which appears whole or not at
all; nothing in the run is changed, and it may be training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from dist_train.checkpoint.catalog import committed, read_checkpoint
from dist_train.checkpoint.manifest import (
    ATTEMPTS,
    BRANCH_FILE,
    EVENTS_LOG,
    MANIFEST_NAME,
    METRICS_LOG,
    PINS,
    RUN_FILE,
    STATUS_FILE,
    FileEntry,
    Manifest,
)
from dist_train.checkpoint.outbox import new_file, require_new
from dist_train.checkpoint.ownership import newest_attempt
from dist_train.checkpoint.selection import (
    best_path,
    better_elsewhere,
    find_checkpoints,
    newest_path,
    open_run,
    warn_of_better_elsewhere,
)
from dist_train.checkpoint.store import CHUNK_BYTES, Store
from dist_train.checkpoint.stripping import weights_only as without_training_state
from dist_train.checkpoint.verify import RunningDigest
from dist_train.console import ByteMeter, bytes_text
from dist_train.errors import CorruptCheckpointError, NoCheckpointError, StorageError

Json = Any
Choice = Literal["best", "latest", "both", "all"]
SUMS_NAME = "SHA256SUMS"
_FILE_BYTES = 4096
"""What a file costs in an archive besides its bytes; generous."""
_TRIES = 10
"""A training that goes on may prune a checkpoint just before its files are opened."""
_MOST_OPEN = 256
"""Files that are opened beforehand; a process may usually have 1024."""
_OLDEST = (1980, 1, 1, 0, 0, 0)
"""A zip knows no earlier date."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCheckpoint:
    """One checkpoint in an archive."""

    path: str
    """Folder inside the unpacked run directory."""
    marks: list[str]
    """best (best here, where a better one is in another directory), latest; of a choice of one its own alone."""
    global_step: int
    epochs_completed: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What a pack wrote."""

    path: str
    sums_path: str
    folder: str
    """What it unpacks into."""
    sha256: str
    num_bytes: int
    weights_only: bool
    checkpoints: list[PackedCheckpoint]


@dataclass(frozen=True, slots=True)
class _Content:
    """A checkpoint as it goes into the archive."""

    path: str
    origin: Manifest
    """As it is in the run."""
    manifest: Manifest
    """As it will be in the archive."""
    marks: list[str]

    @property
    def text(self) -> bytes:
        """Of its manifest.json."""
        return self.manifest.to_json().encode()


def pack(
    run_dir: str,
    to: str | None = None,
    *,
    choice: Choice = "both",
    weights_only: bool = False,
    max_bytes: int | None = None,
    force: bool = False,
) -> Packed:
    """Packs a run for a download; what it unpacks into can be listed, loaded from and trained on.

    Args:
        to: the zip to be written; None is `ultra.zip` for the run `runs/ultra`, in the working directory, and
            `ultra-best.zip` and the like for another choice.
        choice: `best` for inference, `latest` for going on elsewhere, `both` (one folder where they are the same, the
            latest alone where no metric is monitored), or `all`.
        weights_only: leave out the state of optimizer, scheduler and scaler, which is most of the bytes: for
            inference; a training that goes on from it starts them fresh.
        max_bytes: refuse a zip that would be larger.
        force: replace what is there.

    Raises:
        NoCheckpointError, CorruptCheckpointError: a checkpoint cannot be had.
        ConfigError: the target is there already, or lies in a run.
        StorageError: it cannot be written, or is too large; nothing is left of it.
    """
    store = open_run(run_dir)
    folder = os.path.basename(store.root)
    target = to or _default_name(folder, choice, weights_only)
    if os.path.isdir(target):
        target = os.path.join(target, _default_name(folder, choice, weights_only))
    sums_target = f"{target}.sha256"
    for one in (target, sums_target):
        require_new(one, force=force, is_folder=False)
    if choice in ("best", "both"):
        warn_of_better_elsewhere(store, find_checkpoints(store))
    for tries_left in reversed(range(_TRIES)):
        contents = _choose(store, choice, weights_only)
        try:
            digest = _write(store, target, folder, contents, max_bytes, force)
            break
        except CorruptCheckpointError:  # or pruned by the training that goes on; then something newer is there
            if not tries_left or all(read_checkpoint(store, one.path).manifest == one.origin for one in contents):
                raise
    with new_file(sums_target, needed_bytes=_FILE_BYTES, force=True) as file:
        file.write(f"{digest}  {os.path.basename(target)}\n".encode())
    return Packed(
        path=target,
        sums_path=sums_target,
        folder=folder,
        sha256=digest,
        num_bytes=os.stat(target).st_size,
        weights_only=weights_only,
        checkpoints=[
            PackedCheckpoint(
                path=one.path,
                marks=one.marks,
                global_step=one.manifest.progress.global_step,
                epochs_completed=one.manifest.progress.epochs_completed,
                num_bytes=one.manifest.num_bytes,
            )
            for one in contents
        ],
    )


def _default_name(folder: str, choice: Choice, weights_only: bool) -> str:
    parts = [folder, *([] if choice == "both" else [choice]), *(["weights"] if weights_only else [])]
    return f"{'-'.join(parts)}.zip"


def _choose(store: Store, choice: Choice, weights_only: bool) -> list[_Content]:
    """Oldest first."""
    found = find_checkpoints(store)
    best, latest = best_path(found), newest_path(found)
    marked = {"best here" if better_elsewhere(found) else "best": best, "latest": latest}
    if choice in ("best", "latest"):  # what is latest in the directory of an earlier session is not the run's latest
        marked = {mark: path for mark, path in marked.items() if mark.startswith(choice)}
    if latest is None or (choice == "best" and best is None):
        what = "checkpoint that can be used" if latest is None else "best checkpoint: no monitored metric is recorded"
        raise NoCheckpointError(f"{store.given} holds no {what}; `dist-train ls {store.given}` lists what there is.")
    named: dict[Choice, list[str | None]]
    named = {"best": [best], "latest": [latest], "both": [best, latest], "all": [one.path for one in found]}
    wanted = set(named[choice])
    contents = []
    for path, manifest in committed(found):
        if path in wanted:
            kept = without_training_state(manifest) if weights_only else manifest
            contents.append(_Content(path, manifest, kept, [mark for mark in marked if marked[mark] == path]))
    return contents


def _write(store: Store, target: str, folder: str, contents: list[_Content], max_bytes: int | None, force: bool) -> str:
    """Returns the sha256 of the archive, of its bytes as they are read again: zipfile goes back to fill in sizes."""
    small = _small_files(store, contents)
    large = sum(one.manifest.num_bytes for one in contents)
    count = len(small) + sum(len(one.manifest.files) + 1 for one in contents) + 2
    needed = large + sum(map(len, small.values())) + sum(len(one.text) for one in contents) + count * _FILE_BYTES
    if max_bytes is not None and needed > max_bytes:
        raise StorageError(
            f"{target} was not written: it takes {bytes_text(needed)}, and {bytes_text(max_bytes)} are free for it. "
            f"Pack with --weights-only, or make room first: `dist-train prune {store.given}` removes checkpoints by "
            f"policy, and an earlier zip may go."
        )
    meter = ByteMeter(2 * large, sys.stderr, name=f"pack {target}")
    try:
        with _opened(store, contents) as sources, new_file(target, needed_bytes=needed, force=force) as file:
            sums: dict[str, str] = {}
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, data in small.items():
                    sums[name] = _add_bytes(archive, f"{folder}/{name}", data)
                for one in contents:
                    for name, entry in sorted(one.manifest.files.items()):
                        path = f"{one.path}/{name}"
                        sums[path] = _add_file(archive, f"{folder}/{path}", sources[path], entry, meter.add)
                    path = f"{one.path}/{MANIFEST_NAME}"
                    sums[path] = _add_bytes(archive, f"{folder}/{path}", one.text)
                listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
                _add_bytes(archive, f"{folder}/{SUMS_NAME}", listed.encode())
            file.flush()
            return _hash(file.name, meter.add)
    finally:
        meter.pause()


def _small_files(store: Store, contents: list[_Content]) -> dict[str, bytes]:
    """What makes it a run directory: identity, history, the number of its attempts, branch and pins.

    The links and the record of who holds the directory are left out: they mean nothing elsewhere.
    """
    small = {}
    for name in (RUN_FILE, METRICS_LOG, EVENTS_LOG, BRANCH_FILE, STATUS_FILE):
        with contextlib.suppress(FileNotFoundError):
            data = store.read(name)
            is_log = name in (METRICS_LOG, EVENTS_LOG)
            small[name] = data[: data.rfind(b"\n") + 1] if is_log else data  # the last line may be half written
    if _is_running(small.get(STATUS_FILE, b"")):
        del small[STATUS_FILE]
    attempt = max([newest_attempt(store), *(one.manifest.attempt for one in contents)])
    small[f"{ATTEMPTS}/{attempt:06d}"] = b""
    for one in contents:
        for digest in {one.manifest.digest, one.manifest.stripped_from or one.manifest.digest}:
            with contextlib.suppress(FileNotFoundError):
                small[f"{PINS}/{digest}"] = store.read(f"{PINS}/{digest}")
    return small


def _is_running(status: bytes) -> bool:
    try:
        return bool(json.loads(status)["status"] == "running")
    except (ValueError, KeyError, TypeError):
        return False


def _add_bytes(archive: zipfile.ZipFile, name: str, data: bytes) -> str:
    with archive.open(_info(name, len(data)), "w") as out:
        out.write(data)
    return hashlib.sha256(data).hexdigest()


def _add_file(
    archive: zipfile.ZipFile, name: str, source: _Source, entry: FileEntry, on_bytes: Callable[[int], None]
) -> str:
    """Streams a file in and proves it on the way."""
    found, digest = RunningDigest(), hashlib.sha256()
    with archive.open(_info(name, entry.size), "w") as out:
        for chunk in source.read():
            found.update(chunk)
            digest.update(chunk)
            out.write(chunk)
            on_bytes(len(chunk))
    if (found.entry().size, found.entry().digest) != (entry.size, entry.digest):
        is_now = f"is {found.entry().size} bytes with digest {found.entry().digest}"
        raise source.damaged(f"{is_now}, expected {entry.size} with {entry.digest}")
    return digest.hexdigest()


@dataclass(slots=True)
class _Source:
    """A file of the run. One that is opened at once is still there when the training has pruned it."""

    store: Store
    path: str
    file: BinaryIO | None = None

    def open(self) -> BinaryIO:
        try:
            self.file = self.file or self.store.path(self.path).open("rb", buffering=0)
        except OSError as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
            raise self.damaged(why) from error
        return self.file

    def read(self) -> Iterator[memoryview]:
        """Its errors are the source's, not those of the archive that is being written."""
        with self.open() as file:
            try:
                yield from _chunks(file)
            except OSError as error:
                raise self.damaged(f"cannot be read: {error.strerror or error}") from error

    def damaged(self, why: str) -> CorruptCheckpointError:
        store = self.store
        return CorruptCheckpointError(
            f"{store.shown(self.path)} {why}. Nothing was packed. `dist-train verify {store.given}` tells which "
            f"checkpoints are whole; choose one of them (--best, --latest).",
            str(store.path(self.path)),
        )


@contextlib.contextmanager
def _opened(store: Store, contents: list[_Content]) -> Iterator[dict[str, _Source]]:
    """All files by path, opened now as far as a process may have that many."""
    paths = [f"{one.path}/{name}" for one in contents for name in sorted(one.manifest.files)]
    sources = {path: _Source(store, path) for path in paths}
    with contextlib.ExitStack() as stack:
        for path in paths[:_MOST_OPEN]:
            stack.enter_context(sources[path].open())
        yield sources


def _chunks(file: BinaryIO) -> Iterator[memoryview]:
    """Through one buffer that is reused."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        yield buffer[:count]


def _info(name: str, size: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=max(time.localtime()[:6], _OLDEST))
    info.compress_type = zipfile.ZIP_STORED
    info.external_attr = 0o644 << 16
    info.file_size = size  # tells zipfile beforehand where a file needs the 64-bit form
    return info


def _hash(path: str, on_bytes: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for chunk in _chunks(file):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()
