"""The benchmark of a save's cost runs on each device; its numbers are nobody's business here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from tests.support.gpu import EACH_DEVICE
from tests.support.launch import ROOT, run_command


@pytest.mark.parametrize("device", EACH_DEVICE)
def test_the_benchmark_measures_each_way_as_often_as_it_was_asked_to(device: str, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks/gpu_save_cost.py")
    options = ["--device", device, "--megabytes", "17", "--rounds", "2", "--folder", str(tmp_path)]
    command = [sys.executable, script, *options, "--json", str(tmp_path / "found.json")]
    said = run_command(command, deadline_seconds=200).require_success().output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rounds"] == 2
    assert list(found["medians"]) == ["no save", "side stream", "waiting copy", "torch.save"]
    assert all(0 <= row["host"] <= row["update"] < math.inf for row in found["medians"].values())
    assert all(way in said for way in found["medians"])
    assert "durable" in said
