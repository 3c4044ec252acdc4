"""Device -> host image: one copy, in the exact bytes of the files to be.

Invariant: an image's memory is reserved before it is touched (a mapping beyond what tmpfs can give is a SIGBUS),
page-aligned, and belongs to no name on disk, so that a killed process leaves none behind. That copy is all that
training waits for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
from collections.abc import Mapping

import torch

from dist_train.capture import Capture
from dist_train.checkpoint.boxes import local_part, region_of
from dist_train.checkpoint.plan import Plan, own_name
from dist_train.checkpoint.tensor_file import ALIGNMENT, DTYPES, FileLayout

logger = logging.getLogger(__name__)
SHARED_MEMORY = "/dev/shm"


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
        for name, layout in plan.files.items():
            start = self.spans[name][0]
            self._memory[start : start + len(layout.header)] = layout.header

    def file(self, name: str) -> tuple[memoryview, int]:
        """A file's bytes, padded to the block size, and its true length."""
        start, length = self.spans[name]
        return memoryview(self._memory)[start : start + _round_up(length)], length

    def fill(self, plan: Plan, capture: Capture, rank: int) -> None:
        """Copies the capture in. Afterwards training may change every tensor."""
        own = {own_name(name, rank): tensor for name, tensor in capture.per_rank.items()}
        tensors = {**capture.tensors, **own}
        with torch.no_grad():
            for name, layout in plan.files.items():
                self._fill_file(self.spans[name][0], layout, tensors)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Gives the memory back; no view of it may be in use."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        del self._bytes
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _fill_file(self, base: int, layout: FileLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        for part in layout.parts:
            if part.num_bytes == 0:
                continue
            values = local_part(tensors[part.name])
            if part.local_offsets:
                values = region_of(values, part.local_offsets, part.sizes)
            start = base + part.start
            target = self._bytes[start : start + part.num_bytes].view(DTYPES[part.dtype]).view(part.sizes)
            target.copy_(values, non_blocking=self._pinned)


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
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0


def _round_up(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
