"""The ranks' training loaders share out one order, or the run does not begin."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.errors import ConfigError
from dist_train.places import require_one_order

ORDER = {"num_samples": 20, "seed": 0, "global_batch_size": 4}


def test_equal_orders_are_one() -> None:
    require_one_order([ORDER])
    require_one_order([ORDER, dict(ORDER)])


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"seed": 3}, "seed is 0 on rank 0 and 3 on rank 1"),
        ({"num_samples": 28}, "num_samples is 20 on rank 0 and 28 on rank 1"),
        ({"order": "aa"}, "order is None on rank 0 and 'aa' on rank 1"),
    ],
)
def test_loaders_that_would_lose_samples_or_hang_are_refused(other: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_one_order([ORDER, ORDER | other])
