"""`dcp.save` and `dcp.load` need a bounded buffer besides the state, however large that is. Torch's are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import dcp_memory
from tests.support.forked import run_ranks

BUFFER_MB = 40
"""A chunk that is written (8 MiB), a piece that is read (16 MiB), receipts, what the allocator keeps."""
MAPPED_MB = 64


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("megabytes", "layout"),
    [
        pytest.param(100, "sharded", id="100 MB"),
        pytest.param(500, "sharded", marks=pytest.mark.slow, id="500 MB"),
        pytest.param(500, "transposed", marks=pytest.mark.slow, id="500 MB transposed"),
    ],
)
def test_two_ranks_save_and_load_in_a_bounded_buffer(tmp_path: Path, megabytes: int, layout: str) -> None:
    for what in (dcp_memory.save, dcp_memory.load):
        for kind in ("torch", "ours"):
            peaks = run_ranks(what, 2, str(tmp_path / kind), kind, megabytes, layout, deadline_seconds=200)
            told = f"{what.__name__} of {megabytes} MB {layout} by 2 ranks, {kind}: {peaks} MB"
            print(told)
            if kind == "ours":
                assert all(peak["own"] <= BUFFER_MB for peak in peaks), told
                assert all(peak["hwm"] <= BUFFER_MB + MAPPED_MB for peak in peaks), told
    written = sum(path.stat().st_size for path in (tmp_path / "ours" / "a").glob("*.safetensors")) / 1e6
    assert written > 0.9 * megabytes
