"""What training scripts hold: left in the middle and resumed by new objects, it ends as the bare loop does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dist_train as dt
from tests.support.kinds import KINDS
from tests.support.scripts import differences, everything, train, train_bare

LEFT_AT, UPDATES = 3, 6


@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_and_resumed_ends_as_the_bare_loop_does(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    dt.seed_everything(0)
    straight = kind.build()
    losses = train_bare(straight, range(UPDATES))
    dt.seed_everything(0)
    left = kind.build()
    train(left, tmp_path / "run", LEFT_AT)
    dt.seed_everything(1)
    resumed = kind.build()
    assert differences(everything(left), everything(resumed)), "a kind that holds nothing proves nothing"
    restored: list[Any] = []
    again = train(resumed, tmp_path / "run", UPDATES, at_start=restored)
    assert differences(everything(left), restored[0]) == []
    assert [float(loss) for loss in again] == [float(loss) for loss in losses[LEFT_AT:]]
    assert differences(everything(straight), everything(resumed)) == []
