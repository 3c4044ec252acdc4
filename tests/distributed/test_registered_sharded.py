"""Registered objects and warm starts where nothing is whole on any rank: any layout loads into any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import averages
from tests.support.forked import run_ranks
from tests.support.small_run import manifests_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Any]]:
    """By kind of average and world size: a run of three updates, and what its average ended with."""
    found = {}
    for kind, world_size in [("dictionary", 2), ("dictionary", 4), ("module", 2), ("lazy", 2)]:
        run_dir = tmp_path_factory.mktemp("averages") / f"{kind}-{world_size}"
        found[kind, world_size] = (run_dir, run_ranks(averages.train, world_size, str(run_dir), kind)[0])
    return found


@pytest.mark.parametrize(
    ("kind", "then", "now"),
    [("dictionary", 2, 1), ("dictionary", 2, 3), ("dictionary", 4, 2), ("module", 2, 1), ("module", 2, 3)],
)
def test_an_average_that_was_sharded_loads_bit_for_bit_at_another_world_size(
    kind: str, then: int, now: int, saved: dict[tuple[str, int], tuple[Path, Any]], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(saved[kind, then][0], tmp_path / "run", symlinks=True)
    for loaded in run_ranks(averages.train, now, str(run_dir), kind, 0):
        assert loaded == saved[kind, then][1]


def test_each_rank_writes_its_own_part_of_an_average(saved: dict[tuple[str, int], tuple[Path, Any]]) -> None:
    newest = manifests_of(saved["dictionary", 2][0])[-1]
    sizes = [newest["files"][f"state-0000{rank}-of-00002.safetensors"]["size"] for rank in (1, 2)]
    assert min(sizes) > 0.9 * max(sizes)


def test_what_an_object_shares_with_a_sharded_model_is_stored_once(tmp_path: Path) -> None:
    run_ranks(averages.train, 2, str(tmp_path), "shared")
    newest = manifests_of(tmp_path)[-1]
    assert newest["aliases"]["user/average/shadow/2.bias"] == "model/2.bias"
    assert not any(name.startswith("user/") for name in newest["tensors"])
    run_ranks(averages.train, 3, str(tmp_path), "shared", 4)


def test_what_was_sharded_and_has_no_place_yet_is_refused_before_anything_is_loaded(
    saved: dict[tuple[str, int], tuple[Path, Any]], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(saved["lazy", 2][0], tmp_path / "run", symlinks=True)
    for text in run_ranks(averages.refused, 2, str(run_dir)):
        assert text.startswith("StateMismatchError"), text
        for part in ("user/average/shadow/0.weight", "[37, 16]", "shows no tensor there yet", "before run.register"):
            assert part in text, text
    for text, unchanged in run_ranks(averages.refused_before_entry, 2, str(run_dir)):
        assert text.startswith("StateMismatchError"), text
        assert unchanged


# Weights alone, and in part


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    run_dir = tmp_path_factory.mktemp("bases") / "base"
    return run_dir, run_ranks(averages.save_base, 2, str(run_dir))[0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_warm_start_reads_a_ranks_own_part_of_any_layout(
    world_size: int, base: tuple[Path, Any], tmp_path: Path
) -> None:
    done = run_ranks(averages.start_warm, world_size, str(tmp_path / "run"), str(base[0]))
    assert all(one["weights"] == base[1] for one in done)
    total = sum(one["read"] for one in done)
    whole = 4 * (16 * averages.WIDTH + averages.WIDTH + averages.WIDTH + 1)
    assert whole <= total <= whole + 64 * world_size  # buffers are read by every rank
    started = [one for one in (tmp_path / "run/run.jsonl").read_text().splitlines() if '"started"' in one]
    assert str(base[0]) in started[0]


def test_a_head_of_another_shape_is_new_on_every_rank(base: tuple[Path, Any], tmp_path: Path) -> None:
    run_dir = shutil.copytree(base[0], tmp_path / "run", symlinks=True)
    for found in run_ranks(averages.load_in_part, 3, str(run_dir), 5):
        assert found["weights"]["0.weight"] == base[1]["0.weight"]
        assert found["weights"]["2.weight"] == found["fresh"]
        assert found["kept"] == ["0.weight", "0.bias"]


def test_weights_of_another_program_are_spread_over_the_ranks(base: tuple[Path, Any], tmp_path: Path) -> None:
    from dist_train.checkpoint.exchange import export_checkpoint

    file = export_checkpoint(str(base[0]), "latest", str(tmp_path / "w.safetensors"), form="safetensors").path
    done = run_ranks(averages.start_warm, 2, str(tmp_path / "run"), file)
    assert all(one["weights"] == base[1] for one in done)
