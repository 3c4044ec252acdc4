"""A rank that resumes sharded reads its own ranges of the files, and no others: seen in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from dist_train.capture import Capture
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from tests.support.cycle import FOLDER, write_checkpoint
from tests.support.forked import run_ranks

pytestmark = pytest.mark.distributed
RANKS = 4
ROWS, COLUMNS = 4096, 4096
"""64 MB, rows of 16 kB: what lies between two quarters of rows is three pages."""
SLACK = 64 << 10
"""Headers, and the edges of ranges."""


def cached_bytes(path: Path) -> int:
    """Of a file, in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as data:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        view = ctypes.c_char.from_buffer(data)
        assert libc.mincore(ctypes.addressof(view), size, pages) == 0, os.strerror(ctypes.get_errno())
        del view
        return sum(page & 1 for page in pages.raw) * mmap.PAGESIZE


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_share(folder: Path, placements: list[Placement], rank: int) -> tuple[int, int]:
    """On one rank: fills its part from the files; returns how much of them is in the page cache then, and how many
    pages the copy had to wait for one by one.
    """
    mesh = init_device_mesh("cpu", (RANKS,))
    target = distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, placements, src_data_rank=None)
    found = (0, 0)
    for reading in range(RANKS):
        torch.distributed.barrier()
        if reading == torch.distributed.get_rank() == rank:
            found = _read(folder, target)
    return found


def _read(folder: Path, target: DTensor) -> tuple[int, int]:
    store = Store(folder)
    paths = list((folder / FOLDER).glob("*.safetensors"))
    for path in paths:
        drop_cache(path)
    manifest = Manifest.from_json(store.read(f"{FOLDER}/manifest.json"))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    reader = CheckpointReader(store, FOLDER, manifest)
    reader.fill("model/weight", target)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    reader.close()
    local = target.to_local()
    assert torch.equal(local.reshape(-1)[:: COLUMNS // 8], _expected(target).reshape(-1)[:: COLUMNS // 8])
    return sum(map(cached_bytes, paths)), faults


def _expected(target: DTensor) -> torch.Tensor:
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole tensor, and another that nobody asks for."""
    folder = tmp_path_factory.mktemp("bytes")
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    write_checkpoint(folder, [Capture(tensors={"model/weight": nn.Parameter(whole).detach(), "model/x": whole[:512]})])
    path = next((folder / FOLDER).glob("model-*.safetensors"))
    drop_cache(path)
    if cached_bytes(path):
        pytest.skip(f"{folder} lies on a file system that keeps all files in memory")
    return folder


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_only_this_rank_s_ranges_of_the_files_are_read(saved: Path, dim: int) -> None:
    share = ROWS * COLUMNS * 4 // RANKS
    for rank in (0, RANKS - 1):
        read, faults = run_ranks(read_share, RANKS, saved, [Shard(dim)], rank)[rank]
        assert share <= read <= share + SLACK
        assert faults < share // mmap.PAGESIZE // 10, "pages were read one by one: the kernel has dropped requests"


def test_what_is_read_whole_is_in_the_page_cache(saved: Path) -> None:
    """So that the test above can fail: it sees what is read."""
    path = next((saved / FOLDER).glob("model-*.safetensors"))
    drop_cache(path)
    path.read_bytes()
    assert cached_bytes(path) >= ROWS * COLUMNS * 4
