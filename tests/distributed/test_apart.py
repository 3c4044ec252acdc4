"""A model that several processes would train apart, with real workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forked import run_script
from tests.support.launch import ROOT

pytestmark = pytest.mark.distributed


def test_a_model_whose_gradients_nothing_averages_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_script(2, str(ROOT / "tests/support/apart.py"), str(tmp_path), deadline_seconds=120)
    for rank in range(2):
        told: dict[str, str] = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        refused = {name: message for name, message in told.items() if message}
        assert list(refused) == [
            "bare",
            "bare without an accelerator",
            "bare without an optimizer",
            "bare beside a prepared one",
            "what was prepared, by its old name",
            "tensor parallel",
        ]
        assert refused["bare"].startswith(
            "The model (Sequential) was not given to accelerator.prepare: its gradients would not be averaged over the "
            "2 processes, which would train apart (0.bias, 0.weight, 1.bias, 1.weight)."
        )
        assert "RunOptions(own_gradients=True)" in refused["bare"]
        told_of = "The model is tensor parallel, and nobody averages the gradients of 2 plain parameters in it"
        assert refused["tensor parallel"].startswith(told_of)
        assert refused["bare beside a prepared one"].startswith("The model 'd' (Sequential) was not given")
        assert len(told) - len(refused) == 6
