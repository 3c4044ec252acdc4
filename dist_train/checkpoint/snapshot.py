"""Device -> host image: one copy, in the exact bytes of the files to be.

Invariant: an image's memory is reserved before it is touched (a mapping beyond what tmpfs can give is a SIGBUS),
page-aligned, and belongs to no name on disk, so that a killed process leaves none behind. That copy is all that
training waits for; what lies on a GPU its next kernels wait for, and the host does not (see `side_stream`).
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping

import torch

from dist_train.capture import Capture
from dist_train.checkpoint.boxes import local_part, region_of
from dist_train.checkpoint.plan import Plan, own_name
from dist_train.checkpoint.side_stream import SideStreams
from dist_train.checkpoint.tensor_file import ALIGNMENT, DTYPES, FileLayout

logger = logging.getLogger(__name__)
SHARED_MEMORY = "/dev/shm"
COPY_TIMEOUT_SECONDS = 600.0
"""A GPU copies tens of gigabytes in that time; one that does not hangs."""


class Image:
    """Host memory that holds all files of one rank's plan, each from a page boundary on."""

    def __init__(self, plan: Plan) -> None:
        self.spans: dict[str, tuple[int, int]] = {}
        position = 0
        for name, layout in plan.files.items():
            self.spans[name] = (position, layout.num_bytes)
            position += _round_up(layout.num_bytes)
        self.num_bytes = max(position, ALIGNMENT)
        self._memory = _reserve(self.num_bytes)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._pinned = _pin(self._bytes)
        self._copies = SideStreams()
        for name, layout in plan.files.items():
            start = self.spans[name][0]
            self._memory[start : start + len(layout.header)] = layout.header

    def file(self, name: str) -> tuple[memoryview, int]:
        """A file's bytes, padded to the block size, and its true length."""
        start, length = self.spans[name]
        return memoryview(self._memory)[start : start + _round_up(length)], length

    def fill(self, plan: Plan, capture: Capture, rank: int) -> None:
        """Copies the capture in. Afterwards training may change every tensor; the bytes are there after `wait`."""
        self.wait(COPY_TIMEOUT_SECONDS)  # a save that failed early has left its copies under way
        own = {own_name(name, rank): tensor for name, tensor in capture.per_rank.items()}
        tensors = {**capture.tensors, **own}
        with torch.no_grad():
            pairs = [pair for name, layout in plan.files.items() for pair in self._pairs(name, layout, tensors)]
            # Into memory that is not page-locked a copy from a GPU is made while the host waits for it.
            self._copies.start(pair for pair in pairs if self._is_behind(pair[1]))
            for target, source in pairs:
                if not self._is_behind(source):
                    target.copy_(source)

    def wait(self, timeout_seconds: float) -> None:
        """Until the bytes are there; in any thread. Raises RuntimeError, DeadlineError: a device did not give them."""
        self._copies.wait(timeout_seconds)

    def close(self) -> None:
        """Gives the memory back; no view of it may be in use."""
        with contextlib.suppress(RuntimeError):  # of a save that failed by it
            self.wait(COPY_TIMEOUT_SECONDS)
        self._unpin()
        del self._bytes
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())

    def _is_behind(self, source: torch.Tensor) -> bool:
        """Whether a tensor is copied while the host goes on."""
        return self._pinned and source.is_cuda

    def _pairs(
        self, name: str, layout: FileLayout, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(where in the image, what goes there) of each part of a file."""
        base = self.spans[name][0]
        for part in layout.parts:
            if part.num_bytes == 0:
                continue
            values = local_part(tensors[part.name])
            if part.local_offsets:
                values = region_of(values, part.local_offsets, part.sizes)
            start = base + part.start
            target = self._bytes[start : start + part.num_bytes].view(DTYPES[part.dtype]).view(part.sizes)
            yield target, values


def _reserve(num_bytes: int) -> mmap.mmap:
    """Shared memory without a name; private memory where the platform has none or it is full."""
    try:
        with tempfile.TemporaryFile(dir=SHARED_MEMORY, prefix="dist_train-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except (OSError, AttributeError) as error:
        logger.warning("Images lie in private memory: %s cannot give %d bytes (%s).", SHARED_MEMORY, num_bytes, error)
        return mmap.mmap(-1, num_bytes)


def _pin(memory: torch.Tensor) -> bool:
    """Page-locks the image for fast copies from a GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        return True
    logger.warning("CUDA cannot page-lock the %d bytes of an image: each save waits for its copies.", memory.numel())
    with contextlib.suppress(RuntimeError):  # CUDA keeps the refusal, and the next kernel would be blamed for it
        torch.ones(1, device="cuda").add_(1)
    return False


def _round_up(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
