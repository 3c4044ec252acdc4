"""Which bytes of a mapped file are read from the disk: those that are asked for, in large requests.

Invariant: hints only; a platform without them reads more than it needs and gives the same bytes. Left alone the kernel
reads ahead, on a rank that wants its part of a file also what lies around it; told that access is random it reads
single pages. So a mapping is random, and what is about to be copied is asked for range by range.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import torch

PIECE_BYTES = 16 << 20
"""So much of a mapping is touched before it is let go: a load needs no more memory than training."""
GAP_BYTES = 4 << 10
"""Gaps up to this (rows of a matrix that is cut along its columns) are cheaper to read than to leave out. Larger ones
are not: an eighth of a matrix by columns took 0.10 s with this, and 0.24 s with 64 kB and with it all of the file.
"""
REQUEST_BYTES = 128 << 10
"""Of one request the kernel reads no more than its read-ahead (this, unless somebody has set it) and drops the rest,
which would then be read page by page. Source: `force_page_cache_ra` in mm/readahead.c.
"""


def read_on_request(data: mmap.mmap) -> None:
    """From now on nothing is read ahead: said before the first byte is touched, since a touch reads along what lies
    around it (as much as is read ahead: 8 MB of each file where somebody has set that).
    """
    if hasattr(mmap, "MADV_RANDOM"):
        data.madvise(mmap.MADV_RANDOM)


def request_range(data: mmap.mmap, start: int, num_bytes: int) -> None:
    """Asks for bytes that are about to be touched, as far as there are such."""
    if hasattr(mmap, "MADV_WILLNEED"):
        stop = min(start + num_bytes, len(data))
        for first in range(start - start % mmap.PAGESIZE, stop, REQUEST_BYTES):
            _advise(data, mmap.MADV_WILLNEED, first, min(first + REQUEST_BYTES, stop))


def read_ahead(data: mmap.mmap, start: int, num_bytes: int) -> None:
    """A range that somebody reads from its beginning to its end."""
    if num_bytes and hasattr(mmap, "MADV_NORMAL"):
        _advise(data, mmap.MADV_NORMAL, start, start + num_bytes)


def request(data: mmap.mmap, start: int, values: torch.Tensor) -> int:
    """Asks for the bytes of a view of what is mapped from `start` on; returns how far they lie apart, first to last."""
    start += int(values.storage_offset()) * values.element_size()
    steps = [(size, stride * values.element_size()) for size, stride in zip(values.shape, values.stride(), strict=True)]
    steps = [(size, stride) for size, stride in steps if size > 1]
    for first, last in _runs(start, steps, values.element_size()):
        request_range(data, first, last - first)
    return _span(steps, values.element_size())


def let_go(data: mmap.mmap) -> None:
    """Lets the kernel take the pages of a mapping back."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def pieces(values: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Mapped values and where they go, cut alike so that the values of a piece lie within `PIECE_BYTES`."""
    dim = next((dim for dim, size in enumerate(values.shape) if size > 1), None)
    if dim is None:
        yield values, target
        return
    row_bytes = values.stride(dim) * values.element_size()
    rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for one, other in zip(values.split(rows, dim), target.split(rows, dim), strict=True):
        yield from pieces(one, other) if rows == 1 else [(one, other)]


def _runs(start: int, steps: Sequence[tuple[int, int]], itemsize: int) -> Iterator[tuple[int, int]]:
    """First byte and the one after the last of what lies together, gaps that are read along included.

    In a box the gaps of an outer dimension are no smaller than those within it.
    """
    if not steps or steps[0][1] - _span(steps[1:], itemsize) <= GAP_BYTES:
        yield start, start + _span(steps, itemsize)
        return
    size, stride = steps[0]
    for index in range(size):
        yield from _runs(start + index * stride, steps[1:], itemsize)


def _span(steps: Sequence[tuple[int, int]], itemsize: int) -> int:
    return itemsize + sum((size - 1) * stride for size, stride in steps)


def _advise(data: mmap.mmap, advice: int, start: int, stop: int) -> None:
    first = start - start % mmap.PAGESIZE
    data.madvise(advice, first, min(stop, len(data)) - first)
