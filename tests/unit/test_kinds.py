"""What training scripts hold: left in the middle and resumed by new objects, it ends as the bare loop does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

import dist_train as dt
from dist_train.errors import ConfigError, UnsaveableStateError
from tests.support.kinds import KINDS
from tests.support.kinds_page import cells, place_of_kind, says
from tests.support.kinds_refused import REFUSED
from tests.support.kinds_refused_later import REFUSED_LATER
from tests.support.launch import ROOT
from tests.support.scripts import differences, everything, train, train_bare

LEFT_AT, UPDATES = 3, 6
PAGE = cells((ROOT / "docs/what-is-saved.md").read_text())
"""What users are told of each kind."""


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """What Accelerate keeps of one Accelerator for the next ones of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_and_resumed_ends_as_the_bare_loop_does(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    dt.seed_everything(0)
    straight = kind.build()
    losses = train_bare(straight, range(UPDATES))
    dt.seed_everything(0)
    left = kind.build()
    train(left, tmp_path / "run", LEFT_AT)
    assert PAGE[name][1] == place_of_kind(tmp_path / "run"), "write the page anew: see tests/support/kinds_page.py"
    dt.seed_everything(1)
    resumed = kind.build()
    assert differences(everything(left), everything(resumed)), "a kind that holds nothing proves nothing"
    restored: list[Any] = []
    again = train(resumed, tmp_path / "run", UPDATES, at_start=restored)
    assert differences(everything(left), restored[0]) == []
    assert again == losses[LEFT_AT:]
    assert differences(everything(straight), everything(resumed)) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_before_the_first_step_with_the_way_out(name: str, tmp_path: Path) -> None:
    script = REFUSED[name].build()
    stepped: list[int] = []
    script.step = stepped.append
    with pytest.raises((UnsaveableStateError, ConfigError)) as caught:
        train(script, tmp_path / "run", 1)
    assert re.search(REFUSED[name].says, str(caught.value))
    assert says(PAGE[name][0], str(caught.value)), "write the page anew: see tests/support/kinds_page.py"
    assert stepped == []


@pytest.mark.parametrize("name", REFUSED_LATER)
def test_what_comes_up_in_training_is_refused_by_the_save_and_not_by_the_load(name: str, tmp_path: Path) -> None:
    script = REFUSED_LATER[name].build()
    with pytest.raises((UnsaveableStateError, ConfigError)) as caught:
        train(script, tmp_path / "run", 1)
    assert re.search(REFUSED_LATER[name].says, str(caught.value))
    assert says(PAGE[name][0], str(caught.value)), "write the page anew: see tests/support/kinds_page.py"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []
