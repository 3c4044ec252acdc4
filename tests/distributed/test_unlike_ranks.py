"""What a script says otherwise on each rank is refused, or the main rank's counts; nobody waits for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.unlike_ranks import train

pytestmark = pytest.mark.distributed
TOLD = {
    "every_steps": "every_steps is 2 on rank 0 and None on rank 1",
    "max_steps": "max_steps is None on rank 0 and 7 on rank 1",
    "epochs": "the number of epochs is 2 on rank 0 and 3 on rank 1",
    "seed": "seed is 0 on rank 0 and 1 on rank 1",
}


def test_ranks_that_would_part_are_refused_and_metrics_are_the_main_ranks(tmp_path: Path) -> None:
    for found in run_ranks(train, 2, str(tmp_path), ["nothing", *TOLD, "metrics"]):
        assert found["nothing"] == 2
        assert found["metrics"] == 2  # rank 1 alone would have stopped after its second epoch's worse one
        for what, told in TOLD.items():
            assert told in found[what], found[what]
