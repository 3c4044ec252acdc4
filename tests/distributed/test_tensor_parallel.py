"""Ranks that compute one model together get the same batches, resume exactly and hand over to any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.forked import run_ranks
from tests.support.tensor_parallel import train

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("world_size", "data_parallel"), [(2, 1), (4, 2)])
def test_a_stopped_run_goes_on_bit_for_bit(world_size: int, data_parallel: int, tmp_path: Path) -> None:
    straight = run_ranks(train, world_size, str(tmp_path / "straight"), data_parallel, None)
    first = run_ranks(train, world_size, str(tmp_path / "run"), data_parallel, 4)
    second = run_ranks(train, world_size, str(tmp_path / "run"), data_parallel, None)
    (alone,) = run_ranks(train, 1, str(tmp_path / "alone"), 1, None)
    for whole, one, two in zip(straight, first, second, strict=True):
        assert two["weights"] == whole["weights"]
        assert one["samples"] + two["samples"] == whole["samples"]
        assert "up.weight" in whole["sharded"]
        assert whole["step"] == alone["step"] == 9
    used = [one for group in straight[:: world_size // data_parallel] for one in group["samples"]]
    assert sorted(used) == sorted(alone["samples"]) == [(epoch, i) for epoch in range(3) for i in range(20)]
    for name, value in alone["weights"].items():
        assert torch.allclose(torch.tensor(value), torch.tensor(straight[0]["weights"][name]), rtol=1e-4, atol=1e-6)


def test_four_ranks_hand_over_to_two_and_these_to_one(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    stages = [run_ranks(train, *stage) for stage in ((4, run, 2, 2), (2, run, 1, 5), (1, run, 1, None))]
    used = stages[0][0]["samples"] + stages[0][2]["samples"] + stages[1][0]["samples"] + stages[2][0]["samples"]
    assert sorted(used) == [(epoch, index) for epoch in range(3) for index in range(20)]
    assert stages[2][0]["step"] == 9
