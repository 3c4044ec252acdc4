"""The ranks' training loaders share out one order, or the run does not begin."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.errors import ConfigError
from dist_train.intake import _require_one_order

ORDER = {"num_samples": 20, "seed": 0, "global_batch_size": 4}


def rows(*ranks: tuple[int, int], **others: dict[str, Any]) -> list[Any]:
    return [[ORDER | others.get(f"rank_{index}", {}), *rank] for index, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    "found",
    [
        rows((0, 1)),
        rows((0, 2), (1, 2)),
        rows((0, 1), (0, 1)),  # two ranks compute one model
        rows((0, 2), (0, 2), (1, 2), (1, 2)),
        rows((0, 2), (1, 2), (0, 2), (1, 2)),
    ],
)
def test_each_share_has_as_many_ranks_as_any_other(found: list[Any]) -> None:
    _require_one_order(found)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (rows((0, 2)), r"rank=0 of world_size=2, on 1 rank:"),
        (rows((0, 2), (0, 2)), r"rank=0, 0 of world_size=2, on 2 ranks: not every share"),
        (rows((0, 2), (1, 2), (1, 2)), "not every share of a batch is trained on equally often"),
        (rows((0, 1), (0, 2)), r"rank 0 was made for world_size=1 and that of rank 1 for world_size=2"),
        (rows((0, 2), (1, 2), rank_1={"seed": 3}), "seed is 0 on rank 0 and 3 on rank 1"),
        (rows((0, 2), (1, 2), rank_1={"num_samples": 28}), "num_samples is 20 on rank 0 and 28 on rank 1"),
        (rows((0, 2), (1, 2), rank_1={"order": "aa"}), "order is None on rank 0 and 'aa' on rank 1"),
    ],
)
def test_loaders_that_would_lose_samples_or_hang_are_refused(found: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _require_one_order(found)
