"""`help()` of the settings shows the docstring under each field."""

from __future__ import annotations

import copy
import pickle
import pydoc
from typing import Any

import pytest

import dist_train as dt


@pytest.mark.parametrize(
    ("cls", "field", "text"),
    [
        (dt.TrainConfig, "micro_batch_size", "Samples of one forward pass on one device"),
        (dt.CheckpointPolicy, "keep_last", "Newest checkpoints to keep"),
        (dt.RunOptions, "max_steps", "Stop as done after this many optimizer updates."),
    ],
)
def test_help_tells_what_each_field_is_for(cls: Any, field: str, text: str) -> None:
    shown = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    told = shown.partition(f"\n |  {field}\n |      ")[2].partition("\n |  \n")[0]
    assert text in told


def test_settings_are_copied_and_pickled_as_ever() -> None:
    options = dt.RunOptions(max_steps=3)
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
    assert not hasattr(options, "__dict__")
