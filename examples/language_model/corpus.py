"""The corpus: the Python standard library's own source, as bytes. Nothing to download.

Invariant: the same Python installation gives the same bytes in the same order, whatever the process, the rank or the
order in which the file system lists its folders. Files, not positions, are held out for evaluation.
"""

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
SEPARATOR = b"\0"
"""Stands after every file, so that the model can tell where one ends."""
HELD_OUT_SHARE = 0.1
"""Share of the files kept for evaluation."""


class CorpusError(Exception):
    """There is not enough source to train on; the message says why."""


def list_source_files(root: Path) -> list[Path]:
    """Return every .py file under root, sorted by its path, without installed packages and tests."""
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def is_held_out(relative_path: str) -> bool:
    """Whether this file is kept for evaluation; depends on its name alone."""
    return zlib.crc32(relative_path.encode()) < HELD_OUT_SHARE * 2**32


def read_files(root: Path, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content and separator), max_bytes in all; the last file may be cut short."""
    for path in list_source_files(root):
        if max_bytes <= 0:
            return
        content = (path.read_bytes() + SEPARATOR)[:max_bytes]
        max_bytes -= len(content)
        yield path.relative_to(root).as_posix(), content


def as_tensor(content: bytes) -> Tensor:
    """Return the bytes as uint8 [number of bytes]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def load_corpus(corpus_mb: float, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the training and the held-out bytes, each uint8 [number of bytes].

    Args:
        corpus_mb: upper bound of both together, in megabytes (10**6 bytes).
        root: folder to read; default: the standard library of the Python that runs this.

    Raises:
        CorpusError: one of the two parts would be empty.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, content in read_files(root, int(corpus_mb * 1e6)):
        parts[is_held_out(name)].append(content)
    training, held_out = (b"".join(parts[held]) for held in (False, True))
    if not training or not held_out:
        raise CorpusError(
            f"{root}: found {len(training)} bytes of .py source for training and {len(held_out)} for evaluation; both "
            "need some. Raise --corpus-mb, or use a Python whose standard library lies on disk as .py files."
        )
    return as_tensor(training), as_tensor(held_out)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Map-style dataset of windows of `block` bytes, spread evenly over the data.

    An item is (inputs, targets), both int64 [block]; the targets are the inputs moved on by one byte.
    """

    def __init__(self, data: Tensor, block: int, count: int | None = None) -> None:
        """Cut `count` windows; by default as many as fit side by side. They overlap when more are asked for."""
        if len(data) < block + 1:
            raise CorpusError(f"{len(data)} bytes are too few for a window of {block} + 1. Raise --corpus-mb.")
        self.data, self.block = data, block
        self.count = (len(data) - 1) // block if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        start = index * (len(self.data) - self.block - 1) // max(1, self.count - 1)
        window = self.data[start : start + self.block + 1].long()
        return window[:-1], window[1:]
