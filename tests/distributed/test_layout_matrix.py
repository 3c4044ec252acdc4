"""Any layout to any other: a sample here, all of them with `--all`.

The layouts and what must come of each pair stand in `tests/support/layout_matrix.py`, which also writes the page.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.launch import ROOT
from tests.support.layout_matrix import LAYOUTS, STANDS, Stand, all_pairs, build, differences, page, try_pairs

SEED = int(os.environ.get("DIST_TRAIN_LAYOUT_SEED", "1"))
PAGE = ROOT / "docs/layouts.md"
pytestmark = pytest.mark.distributed


def sample_pairs(seed: int) -> list[tuple[Stand, Stand]]:
    """Each layout once saved and once loaded, on four ranks at most; most pairs change the world size, too."""
    rng = random.Random(seed)

    def stands() -> list[Stand]:
        small = [[one for one in STANDS if one.layout == layout.name and one.world_size <= 4] for layout in LAYOUTS]
        chosen = [rng.choice(some) for some in small if some]
        rng.shuffle(chosen)
        return chosen

    return list(zip(stands(), stands(), strict=True))


sample = sample_pairs(SEED)


def test_a_sample_of_layouts_loads_as_others_bit_for_bit(tmp_path: Path) -> None:
    found = try_pairs(sample, tmp_path)
    assert found == {(source.id, target.id): [] for source, target in sample}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_layout_loads_as_every_other_bit_for_bit(tmp_path: Path) -> None:
    pairs = all_pairs()
    assert try_pairs(pairs, tmp_path) == {(source.id, target.id): [] for source, target in pairs}


def test_the_sample_meets_each_layout() -> None:
    small = {layout.name for layout in LAYOUTS if min(layout.world_sizes) <= 4}
    assert {source.layout for source, _ in sample} == {target.layout for _, target in sample} == small


def test_the_page_shows_every_layout_and_no_pair_that_differed() -> None:
    """Written by the pairs' own results: a layout that is new here must be tried before it is shown."""
    assert PAGE.read_text() == page({(source.id, target.id): [] for source, target in all_pairs()})


def missed(stand: Stand) -> list[str]:
    """What the comparison says of objects into which nothing was loaded."""
    return differences(build(stand, empty=True), counters=False)


@pytest.mark.parametrize("layout", ["FSDP2", "strided by hand", "whole (DDP)"])
def test_the_comparison_sees_what_was_not_loaded(layout: str) -> None:
    told = run_ranks(missed, 2, Stand(2, layout))
    assert {"embed.weight", "kernel", "low", "seen"} <= set(told[0])
