"""Sharded parameters: each rank writes its own bytes, nothing is gathered, and any world size reads them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forked import run_script
from tests.support.launch import ROOT
from tests.support.twins import read_checkpoint, same_bits

SCRIPT = str(ROOT / "tests/support/sharded.py")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory saved by two ranks, with each rank's own parts beside it."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, folder, "save")
    return folder


def launch(world_size: int, folder: Path, mode: str) -> list[dict[str, Any]]:
    out = folder / f"{mode}-{world_size}"
    arguments = [SCRIPT, "--run-dir", str(folder / "run"), "--out", str(out), "--mode", mode]
    run_script(world_size, *arguments, deadline_seconds=120)
    return [torch.load(f"{out}-{rank}.pt", weights_only=True) for rank in range(world_size)]


def whole_tensors(parts_by_rank: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put together from the parts that the ranks say they hold."""
    whole: dict[str, torch.Tensor] = {}
    for parts in parts_by_rank:
        for name, (values, offsets, shape) in parts.items():
            target = whole.setdefault(name, torch.full(shape, float("nan"), dtype=values.dtype))
            for dim, offset in enumerate(offsets):
                target = target.narrow(dim, offset, values.shape[dim])
            target.copy_(values)
    return whole


def test_each_rank_writes_its_own_share_and_nothing_is_gathered(saved: Path) -> None:
    """The script patches every gathering collective to raise during the save."""
    parts = [torch.load(saved / f"save-2-{rank}.pt", weights_only=True) for rank in range(2)]
    manifest, _ = read_checkpoint(saved / "run")
    for rank in range(2):
        share = sum(values.nbytes for values, _, _ in parts[rank].values())
        written = sum(entry.size for name, entry in manifest.files.items() if f"-{rank + 1:05d}-of-00002" in name)
        assert written <= share * 1.01 + 65536


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sharded_checkpoint_loads_bit_for_bit_at_another_world_size(saved: Path, world_size: int) -> None:
    original = whole_tensors([torch.load(saved / f"save-2-{rank}.pt", weights_only=True) for rank in range(2)])
    loaded = whole_tensors(launch(world_size, saved, "load"))
    assert loaded.keys() == original.keys()
    assert [name for name in original if not same_bits(original[name], loaded[name])] == []


def test_the_files_hold_what_the_ranks_held(saved: Path) -> None:
    original = whole_tensors([torch.load(saved / f"save-2-{rank}.pt", weights_only=True) for rank in range(2)])
    _, tensors = read_checkpoint(saved / "run")
    assert [name for name in original if not same_bits(original[name], tensors[name])] == []
