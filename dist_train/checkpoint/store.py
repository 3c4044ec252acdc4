"""Every file operation of a save, commit, resume and retention, behind one small class.

Invariant: each call that changes a file or a directory goes through `Store._before`, so that a log of the store is the
whole truth and a fault can be put before any operation. Paths are relative to the store's root.
It decides nothing: what to write and when is the business of the callers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dist_train.errors import StorageError

logger = logging.getLogger(__name__)
CHUNK_BYTES = 8 << 20
DIRECT_ALIGNMENT = 4096
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class Operation:
    """One primitive change, told before it happens."""

    kind: str
    """create, open, write, truncate, fsync, fsync_dir, rename, exchange, mkdir, unlink, rmdir, symlink."""
    path: str
    """Relative to the root; absolute for the root and the directories above it."""
    target: str = ""


Observer = Callable[[Operation], None]


class Store:
    """Files below one root directory.

    Args:
        root: the directory; made by `make_directory("")` when missing.
        observer: called before each primitive change; may raise OSError in its place.
        direct: write images past the page cache (O_DIRECT) where the file system allows it.
    """

    def __init__(self, root: str | Path, *, observer: Observer | None = None, direct: bool = True) -> None:
        self.given = str(root)
        """The root as the user wrote it, for messages; the working directory may change meanwhile."""
        self.root = Path(os.path.abspath(root))
        self.observer = observer
        self.direct = direct

    def _before(self, kind: str, path: str, target: str = "") -> str:
        if self.observer is not None:
            self.observer(Operation(kind, path, target))
        return str(self.root / path)

    # Reading

    def path(self, path: str = "") -> Path:
        return self.root / path

    def shown(self, path: str) -> str:
        """A path as people are told of it."""
        return os.path.join(self.given, path)

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)

    def is_directory(self, path: str) -> bool:
        return os.path.isdir(self.root / path)

    def list(self, path: str = "") -> list[str]:
        """Sorted names in a directory; empty when it is missing."""
        try:
            return sorted(os.listdir(self.root / path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, path: str) -> int:
        return os.stat(self.root / path).st_size

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def map(self, path: str) -> mmap.mmap:
        """The bytes of a file that is not empty, mapped privately; pages are read when touched."""
        with open(self.root / path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read_chunks(self, path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The file's bytes in order, through one buffer that is reused."""
        buffer = bytearray(chunk_bytes)
        with open(self.root / path, "rb", buffering=0) as file:
            while filled := _read_full(file.readinto, memoryview(buffer)):
                yield memoryview(buffer)[:filled]

    def free_bytes(self) -> int:
        """Bytes that this user can still write below the root (quota not included)."""
        stats = os.statvfs(self.root)
        return stats.f_bavail * stats.f_frsize

    def tree_bytes(self, path: str = "") -> int:
        """Bytes of all files below a path; files that vanish meanwhile count as zero."""
        total = 0
        for folder, _, names in os.walk(self.root / path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    # Writing

    def make_directory(self, path: str, *, exist_ok: bool = True) -> None:
        """Makes a directory and its missing parents, each made durable in its parent.

        One that is there already is made durable too: whoever made it may have been killed in between.
        """
        path = path or os.path.abspath(self.root)  # the root's own name must be durable as well
        parent = os.path.dirname(path)
        if not (exist_ok and self.is_directory(path)):
            if not self.is_directory(parent):
                self.make_directory(parent)
            with contextlib.suppress(*([FileExistsError] if exist_ok else [])):
                os.mkdir(self._before("mkdir", path))
        # A directory above the root may be closed to us; its names are its owner's business then.
        with contextlib.suppress(*([PermissionError] if os.path.isabs(path) else [])):
            self.sync_directory(parent)

    def create_exclusive(self, path: str) -> None:
        """Creates an empty file durably. Raises FileExistsError if somebody else was first."""
        full = self._before("create", path)
        descriptor = os.open(full, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            self._sync(descriptor, path)
        finally:
            os.close(descriptor)
        self.sync_directory(os.path.dirname(path))

    def write_new(self, path: str, data: bytes) -> None:
        """Writes a new file and fsyncs it; its directory entry is not yet durable."""
        full = self._before("create", path)
        descriptor = os.open(full, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            if data:
                self._before("write", path)
                _write_full(descriptor, memoryview(data))
            self._sync(descriptor, path)
        finally:
            os.close(descriptor)

    def replace(self, path: str, data: bytes, *, durable: bool = True) -> None:
        """Puts a whole file in place of another at once: a reader sees the old or the new, never a part."""
        temporary = f"{path}.{os.getpid()}-{time.monotonic_ns()}.tmp"
        try:
            if durable:
                self.write_new(temporary, data)
            else:
                self._write_undurable(temporary, data)
            self.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self.unlink(temporary)
            raise
        if durable:
            self.sync_directory(os.path.dirname(path))

    def _write_undurable(self, path: str, data: bytes) -> None:
        full = self._before("create", path)
        with open(full, "wb", buffering=0) as file:
            self._before("write", path)
            file.write(data)

    def append(self, path: str, text: str) -> None:
        """Appends to a file (not fsynced, see `sync_file`); a torn last line of a killed process is closed first."""
        created = not self.exists(path)
        descriptor = os.open(self._before("open", path), os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
        try:
            length = os.fstat(descriptor).st_size
            torn = length > 0 and os.pread(descriptor, 1, length - 1) != b"\n"
            self._before("write", path)
            _write_full(descriptor, memoryview((("\n" if torn else "") + text).encode()))
        finally:
            os.close(descriptor)
        if created:
            self.sync_directory(os.path.dirname(path))

    def write_image(self, path: str, image: memoryview, length: int, on_chunk: Callable[[memoryview], None]) -> None:
        """Streams the first `length` bytes of an image into a new file and fsyncs it.

        Args:
            image: page-aligned, at least `length` rounded up to 4096 bytes long.
            on_chunk: called with each chunk once, in order (digests on the way).
        """
        starts = range(0, length, CHUNK_BYTES)
        chunks = ((image[start : _round_up(start + CHUNK_BYTES)], min(CHUNK_BYTES, length - start)) for start in starts)
        self.write_chunks(path, chunks, on_chunk)

    def write_chunks(
        self, path: str, chunks: Iterable[tuple[memoryview, int]], on_chunk: Callable[[memoryview], None]
    ) -> None:
        """Streams chunks into a new file and fsyncs it.

        Args:
            chunks: (memory, length): page-aligned, as long as `length` rounded up to 4096 bytes or longer; every
                length but the last is a multiple of 4096. A chunk is written before the next one is asked for, which
                may thus lie in the same memory.
            on_chunk: as in `write_image`.
        """
        full = self._before("create", path)
        descriptor = self._open_image(full)
        written = 0
        try:
            for memory, length in chunks:
                on_chunk(memory[:length])
                self._before("write", path)
                self._write_chunk(descriptor, memory[: _round_up(length)], written, length)
                written += length
            # O_DIRECT writes whole blocks: the padded tail is cut before fsync, or safetensors rejects the file.
            self._before("truncate", path)
            os.ftruncate(descriptor, written)
            self._sync(descriptor, path)
        finally:
            os.close(descriptor)

    def _open_image(self, full: str) -> int:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        if self.direct and not hasattr(os, "O_DIRECT"):
            self._give_up_direct("this platform has no O_DIRECT")
        if not self.direct:
            return os.open(full, flags, 0o644)
        try:
            return os.open(full, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self._give_up_direct("the file system refuses O_DIRECT")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(full)  # some file systems create the file before they refuse the flag
        return os.open(full, flags, 0o644)

    def _give_up_direct(self, why: str) -> None:
        self.direct = False
        logger.warning("Files in %s are written through the page cache: %s.", self.root, why)

    def _write_chunk(self, descriptor: int, padded: memoryview, offset: int, length: int) -> None:
        if self.direct:
            try:
                _write_full(descriptor, padded, offset)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._give_up_direct("the file system refuses O_DIRECT")
            import fcntl

            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        _write_full(descriptor, padded[:length], offset)

    def sync_file(self, path: str) -> None:
        """Makes what was appended to a file durable; a missing file has nothing to sync."""
        try:
            descriptor = os.open(self.root / path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            self._sync(descriptor, path)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: str) -> None:
        """Makes the names in a directory durable."""
        full = self._before("fsync_dir", path)
        descriptor = os.open(full, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems without directory fsync
                raise
        finally:
            os.close(descriptor)

    def _sync(self, descriptor: int, path: str) -> None:
        self._before("fsync", path)
        os.fsync(descriptor)

    def rename(self, source: str, target: str) -> None:
        os.rename(self._before("rename", source, target), self.root / target)

    def exchange(self, source: str, target: str) -> bool:
        """Swaps two names at once; False, and nothing done, where the platform or file system cannot."""
        rename = getattr(_libc(), "renameat2", None)
        if rename is None:
            return False
        one, other = os.fsencode(self._before("exchange", source, target)), os.fsencode(self.root / target)
        if rename(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
            return False
        raise OSError(code, os.strerror(code), os.fsdecode(one), None, os.fsdecode(other))

    def unlink(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._before("unlink", path))

    def remove_tree(self, path: str) -> None:
        """Removes a directory and all in it; what vanishes meanwhile is no error."""
        full = self.root / path
        if full.is_symlink() or not full.is_dir():
            self.unlink(path)
            return
        for name in self.list(path):
            self.remove_tree(f"{path}/{name}")
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._before("rmdir", path))

    def link(self, path: str, target: str) -> None:
        """Points a symbolic link, for people, at a target relative to the root."""
        temporary = f"{path}.{os.getpid()}.tmp"
        self.unlink(temporary)
        os.symlink(target, self._before("symlink", temporary, target))
        self.rename(temporary, path)

    def require_writable(self) -> None:
        """Makes the root and writes a file there.

        Raises:
            StorageError: says why the directory cannot be used.
        """
        probe = f".writable-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.make_directory("")
            self.write_new(probe, b"")
            self.unlink(probe)
        except OSError as error:
            raise StorageError(
                f"The run directory {self.root} cannot be written: {error.strerror or error}. "
                f"Choose another run_dir, or fix its permissions or free space, and run the same command again."
            ) from error


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error means that a disk or quota is full."""
    return isinstance(error, OSError) and error.errno in NO_SPACE


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where this platform lets one in."""
    with contextlib.suppress(OSError, TypeError):
        return ctypes.CDLL(None, use_errno=True)
    return None


def _round_up(length: int) -> int:
    return -(-length // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT


def _write_full(descriptor: int, data: memoryview, offset: int | None = None) -> None:
    written = 0
    while written < len(data):
        rest = data[written:]
        written += os.write(descriptor, rest) if offset is None else os.pwrite(descriptor, rest, offset + written)


def _read_full(readinto: Callable[[memoryview], int | None], view: memoryview) -> int:
    filled = 0
    while filled < len(view) and (got := readinto(view[filled:])):
        filled += got
    return filled
