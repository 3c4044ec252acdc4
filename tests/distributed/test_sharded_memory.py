"""A rank needs its own share and a bounded buffer: to save (an image of exactly the bytes that it writes) and to resume
(the optimizer's state, or with it the weights of a model that is built without memory).

What must hold is RssAnon + RssShmem, which is what the process needs for itself. VmHWM counts pages of mapped files
too, the checkpoint's and those of libraries that are touched for the first time; the kernel can take them back.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import sharded_memory
from tests.support.forked import run_ranks
from tests.support.sharded_memory import Peak

BUFFER_MB = 40
"""A chunk that is digested (8 MiB), rounding to pages, what the allocator keeps; of any model."""
MAPPED_MB = 64
DEADLINE_SECONDS = 250


def state_mb(folder: Path) -> float:
    """Weights and both moments, as they lie on disk."""
    files = folder.glob("checkpoints/step-00000002/*.safetensors")
    return sum(path.stat().st_size for path in files) / 1e6


def check(peaks: list[Peak], share_mb: float, least_mb: float, what: str) -> None:
    told = f"{what}: a rank's share is {share_mb:.0f} MB; {peaks} MB"
    print(told)
    for peak in peaks:
        assert peak["own"] > least_mb, f"the watch has missed the peak, {told}"
        assert peak["own"] <= share_mb + BUFFER_MB, told
        assert peak["hwm"] <= share_mb + BUFFER_MB + MAPPED_MB, told


def check_save(folder: Path, megabytes: int, kind: str) -> None:
    pairs = run_ranks(sharded_memory.save, 4, str(folder), megabytes, kind, deadline_seconds=DEADLINE_SECONDS)
    share = state_mb(folder) / 4
    assert share * 4 > 3 * megabytes
    check([first for first, _ in pairs], share, 0.9 * share, f"saved by 4 ranks, {kind}")
    check([second for _, second in pairs], 0, -BUFFER_MB, "saved again, into the image that is there")


def check_resume(folder: Path, megabytes: int, kind: str, world_size: int) -> None:
    peaks = run_ranks(
        sharded_memory.resume, world_size, str(folder), megabytes, kind, deadline_seconds=DEADLINE_SECONDS
    )
    share = state_mb(folder) / world_size * (1 if kind == "meta" else 2 / 3)  # the weights were there before
    check(peaks, share, 0.9 * share, f"resumed by {world_size} ranks, {kind}")


@pytest.mark.distributed
def test_four_ranks_save_and_resume_in_their_shares(tmp_path: Path) -> None:
    check_save(tmp_path, 100, "sharded")
    check_resume(tmp_path, 100, "sharded", 4)
    check_resume(tmp_path, 100, "meta", 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_500_megabytes_on_four_ranks_take_their_shares_whatever_they_were_saved_as(tmp_path: Path) -> None:
    for saved_as in ("sharded", "plain"):
        check_save(tmp_path / saved_as, 500, saved_as)
        check_resume(tmp_path / saved_as, 500, "sharded", 4)
        check_resume(tmp_path / saved_as, 500, "sharded", 2)
        check_resume(tmp_path / saved_as, 500, "meta", 4)
