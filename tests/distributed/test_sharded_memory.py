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

SAVE_BUFFER_MB = 16
"""A chunk that is digested (8 MiB), the manifest's JSON, rounding to pages; of any model."""
LOAD_BUFFER_MB = 24
"""A piece of a mapped file (16 MiB), the headers of the files, and what a process needs once for its first load."""
MAPPED_MB = 48
"""Pages of mapped files: what is asked for by columns has gaps, which lie between."""
DEADLINE_SECONDS = 250


def state_mb(folder: Path) -> float:
    """Weights and both moments, as they lie on disk."""
    files = folder.glob("checkpoints/step-00000002/*.safetensors")
    return sum(path.stat().st_size for path in files) / 1e6


def check(peaks: list[Peak], share_mb: float, buffer_mb: float, what: str) -> None:
    told = f"{what}: a rank's share is {share_mb:.0f} MB; {peaks} MB"
    print(told)
    for peak in peaks:
        assert peak["own"] > 0.9 * share_mb - buffer_mb * (share_mb == 0), f"the watch has missed the peak, {told}"
        assert peak["own"] <= share_mb + buffer_mb, f"more than its share and {buffer_mb} MB, {told}"
        assert peak["hwm"] <= share_mb + buffer_mb + MAPPED_MB, told


def check_save(folder: Path, megabytes: int, kind: str, *, gathers: bool = False) -> None:
    arguments = (str(folder), megabytes, kind, gathers)
    pairs = run_ranks(sharded_memory.save, 4, *arguments, deadline_seconds=DEADLINE_SECONDS)
    share = state_mb(folder) / 4
    assert share * 4 > 3 * megabytes, "the optimizer's state is not in it"
    check([first for first, _ in pairs], share, SAVE_BUFFER_MB, f"saved by 4 ranks, {kind}")
    check([second for _, second in pairs], 0, SAVE_BUFFER_MB, "saved again, into the image that is there")


def check_resume(folder: Path, megabytes: int, kind: str, world_size: int, *, gathers: bool = False) -> None:
    arguments = (str(folder), megabytes, kind, gathers)
    peaks = run_ranks(sharded_memory.resume, world_size, *arguments, deadline_seconds=DEADLINE_SECONDS)
    share = state_mb(folder) / world_size * (1 if kind == "meta" else 2 / 3)  # the weights were there before
    check(peaks, share, LOAD_BUFFER_MB, f"resumed by {world_size} ranks, {kind}")


@pytest.mark.distributed
def test_four_ranks_save_and_resume_in_their_shares(tmp_path: Path) -> None:
    check_save(tmp_path, 100, "sharded")
    check_resume(tmp_path, 100, "sharded", 4)
    check_resume(tmp_path, 100, "meta", 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_one_whole_parameter_on_a_rank_is_noticed(tmp_path: Path) -> None:
    """These limits can fail: on a save that gathers a parameter at a time, on a load that reads whole ones."""
    check_save(tmp_path / "sound", 200, "sharded")
    with pytest.raises(AssertionError, match="more than its share"):
        check_save(tmp_path / "gathered", 200, "sharded", gathers=True)
    with pytest.raises(AssertionError, match="more than its share"):
        check_resume(tmp_path / "sound", 200, "sharded", 4, gathers=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("saved_as", ["sharded", "columns", "plain"])
def test_500_megabytes_on_four_ranks_take_their_shares_whatever_they_were_saved_as(
    saved_as: str, tmp_path: Path
) -> None:
    check_save(tmp_path, 500, saved_as)
    check_resume(tmp_path, 500, "sharded", 4)
    check_resume(tmp_path, 500, "sharded", 2)
    check_resume(tmp_path, 500, "columns", 4)
    check_resume(tmp_path, 500, "meta", 4)
