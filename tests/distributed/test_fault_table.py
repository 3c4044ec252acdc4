"""Every fault at every phase of a run under `dist-train launch`: a sample here, all of them with `--all`.

The faults, the phases and what may come of each stand in `tests/support/fault_table.py`, which also writes the page.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.fault_table import (
    FAULTS,
    PHASES,
    Cell,
    Result,
    all_cells,
    require_good_stop,
    sample_cells,
    try_cell,
)
from tests.support.launch import ROOT, Outcome

SAMPLE = 11
SEED = int(os.environ.get("DIST_TRAIN_FAULT_SEED", "1"))
PAGE = ROOT / "docs/fault-table.md"
sample = sample_cells(SAMPLE, SEED)


def _params() -> list[object]:
    """The cells of the sample are fast, all others slow."""
    slow = pytest.mark.slow
    return [pytest.param(cell, id=cell.id, marks=[] if cell in sample else slow) for cell in all_cells()]


@pytest.mark.distributed
@pytest.mark.parametrize("cell", _params())
def test_a_run_that_meets_a_fault_at_a_phase_ends_as_the_one_that_met_none(cell: Cell, tmp_path: Path) -> None:
    try_cell(cell, tmp_path)


def test_the_sample_meets_each_fault_and_each_phase() -> None:
    assert {cell.fault for cell in sample} == set(FAULTS)
    assert {cell.phase for cell in sample} == set(PHASES)


def test_the_page_shows_every_cell() -> None:
    """Written by the cells' own results: a fault or a phase that is new here must be tried before it is shown."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    shown = [row for row in rows if row[0] != "| phase"]
    assert len(shown) == 2 * len(PHASES)
    assert sum(text.strip(" |") not in ("-", "") for row in shown for text in row[1:]) == len(all_cells())
    assert {row[0].removeprefix("| ") for row in shown} == {name for name, _ in PHASES.values()}
    assert all(name in PAGE.read_text() for name, _ in FAULTS.values())


def test_a_cell_that_stops_where_the_page_says_nothing_of_it_fails() -> None:
    cell = Cell("kill-0", "mid-epoch", 2)
    ended = Outcome(1, "the launch gave up")
    result = Result(cell=cell, launches=1, attempts=1, first_exit=1, status="error", newest_step=9)
    with pytest.raises(AssertionError, match="kill-0-at-mid-epoch-of-2 stopped"):
        require_good_stop(cell, ended, result)
