"""A global batch that these ranks do not share evenly: it is said at the start, fresh or resumed, and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.support.small_run import SmallRun

SHARES = "The global batch of 5 samples does not divide evenly on 1 rank: an update is 2 passes of 3 and 2"


def noted(run_dir: Path) -> list[tuple[str, bool]]:
    """Each start of the run, and whether the uneven shares were written down for it."""
    events = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
    starts = [event for event in events if event["event"] in ("noted", "resumed")]
    return [(event["event"], any(SHARES in note for note in event["notes"])) for event in starts]


def test_uneven_shares_are_told_at_each_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for epochs in (1, 2):
        SmallRun(
            run_dir=tmp_path, epochs=epochs, global_batch_size=5, micro_batch_size=3, accelerator=Accelerator(cpu=True)
        ).train()
        said = capfd.readouterr()
        assert SHARES in " ".join((said.out + said.err).split())
    assert noted(tmp_path) == [("noted", True), ("resumed", True)]


def test_nothing_is_said_of_even_shares(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for epochs in (1, 2):
        SmallRun(run_dir=tmp_path, epochs=epochs, micro_batch_size=2, accelerator=Accelerator(cpu=True)).train()
        assert "does not divide" not in "".join(capfd.readouterr())
    assert noted(tmp_path) == [("resumed", False)]
