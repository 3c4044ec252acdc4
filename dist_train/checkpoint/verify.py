"""Proof that a checkpoint's bytes are those that were committed, naming the file and byte range that are not.

Needs neither torch nor the model. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import xxhash

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import DIGEST_BLOCK_BYTES, FileEntry, Manifest
from dist_train.checkpoint.store import Store

BLOCK_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what was committed."""

    file: str
    problem: str
    start: int | None = None
    stop: int | None = None
    """The first wrong bytes lie in [start, stop), where that is known."""
    could_not_be_read: bool = False
    """The disk gave an error in place of the bytes, which says nothing about them."""

    def __str__(self) -> str:
        span = "" if self.start is None or self.stop is None else f" (bytes {self.start} to {self.stop - 1})"
        return f"{self.file}: {self.problem}{span}"


class RunningDigest:
    """xxh3-128 of a stream, with its value at the end of every block."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._length = 0
        self.blocks: list[str] = []

    def update(self, chunk: memoryview) -> None:
        while len(chunk):
            room = DIGEST_BLOCK_BYTES - self._length % DIGEST_BLOCK_BYTES
            self._hash.update(chunk[:room])
            self._length += len(chunk[:room])
            chunk = chunk[room:]
            if self._length % DIGEST_BLOCK_BYTES == 0:
                self.blocks.append(self._hash.hexdigest()[:BLOCK_DIGITS])

    def entry(self) -> FileEntry:
        return FileEntry(size=self._length, digest=self._hash.hexdigest(), blocks=self.blocks)


def digest_bytes(data: bytes) -> FileEntry:
    """The entry of a file with these bytes."""
    digest = RunningDigest()
    digest.update(memoryview(data))
    return digest.entry()


def verify_checkpoint(
    store: Store,
    path: str,
    manifest: Manifest,
    *,
    files: Iterable[str] | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Damage]:
    """Reads every listed file (or those of `files`) and returns what is wrong with them."""
    names = sorted(manifest.files) if files is None else files
    checks = (_verify_file(store, f"{path}/{name}", name, manifest.files[name], on_bytes) for name in names)
    return [damage for damage in checks if damage is not None]


def verify_as_it_is(
    store: Store, path: str, manifest: Manifest, on_bytes: Callable[[int], None] = lambda count: None
) -> list[Damage]:
    """The same beside a run that trains: what became weights-only while it was read is judged by its new manifest."""
    damages = verify_checkpoint(store, path, manifest, on_bytes=on_bytes)
    now = read_checkpoint(store, path).manifest if damages else None
    if now is None or now.digest == manifest.digest:
        return damages
    return verify_checkpoint(store, path, now, on_bytes=on_bytes)


def _verify_file(
    store: Store, path: str, name: str, entry: FileEntry, on_bytes: Callable[[int], None]
) -> Damage | None:
    try:
        size = store.size(path)
        if size != entry.size:
            return Damage(
                name, f"is {size} bytes long, expected {entry.size}", min(size, entry.size), max(size, entry.size)
            )
        found = RunningDigest()
        for chunk in store.read_chunks(path):
            found.update(chunk)
            on_bytes(len(chunk))
    except FileNotFoundError:
        return Damage(name, "is missing")
    except OSError as error:
        return Damage(name, f"cannot be read: {error.strerror or error}", could_not_be_read=True)
    return None if found.entry().digest == entry.digest else _first_wrong_block(name, entry, found.entry())


def _first_wrong_block(name: str, expected: FileEntry, found: FileEntry) -> Damage:
    pairs = zip(expected.blocks, found.blocks, strict=False)
    wrong = next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected.blocks))
    start = wrong * DIGEST_BLOCK_BYTES
    stop = min(start + DIGEST_BLOCK_BYTES, expected.size)
    return Damage(name, f"has digest {found.digest}, expected {expected.digest}", start, stop)
