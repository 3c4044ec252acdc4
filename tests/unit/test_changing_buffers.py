"""Buffers that training makes, grows and drops: what a script must construct alike, and restores in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.errors import StateMismatchError
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, write_checkpoint


class Bank(nn.Module):
    """Buffers of every way to change."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.register_buffer("rows", torch.zeros(0, width))
        self.register_buffer("hidden", torch.zeros(0, width), persistent=False)
        self.register_buffer("dropped", torch.ones(2))

    def train_on(self) -> None:
        """What a step of training does to them."""
        self.rows = torch.cat([self.rows, torch.full((1, 4), float(len(self.rows)))])
        self.hidden = torch.cat([self.hidden, torch.full((1, 4), -float(len(self.hidden)))]).double()
        self.dropped = None
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.zeros(()))
        self.made = self.made + 1


def live_state(model: nn.Module) -> LiveState:
    return LiveState(models={"": model}, optimizers={})


def cycle(live: LiveState, fresh: LiveState, folder: Path) -> None:
    write_checkpoint(folder, [live.capture()], live.settings)
    manifest, reader = open_checkpoint(folder)
    try:
        fresh.restore(manifest.state, manifest.settings, reader)
    finally:
        reader.close()


def buffers(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, module in model.named_modules():
        for key, value in module._buffers.items():
            kind = None if value is None else (value.dtype, value.tolist())
            found[f"{name}.{key}"] = (kind, key in module._non_persistent_buffers_set)
    return found


def test_a_later_state_is_made_in_a_fresh_model_and_an_earlier_one_in_one_that_trained_on(tmp_path: Path) -> None:
    model = Bank()
    live = live_state(model)
    states = []
    for number in range(3):
        states.append(buffers(model))
        write_checkpoint(tmp_path / str(number), [live.capture()], live.settings)
        model.train_on()
    for number in (2, 0, 1):
        manifest, reader = open_checkpoint(tmp_path / str(number))
        for target in (Bank(), model):
            restored = live if target is model else live_state(target)
            restored.restore(manifest.state, manifest.settings, reader)
            assert buffers(target) == states[number]
        reader.close()


def test_what_the_script_constructs_otherwise_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = Bank()
    live = live_state(model)
    model.train_on()
    other = Bank()
    other.rows = torch.zeros(7, 4)
    before = buffers(other)
    with pytest.raises(StateMismatchError, match=r"model/rows is \[1, 4\] .* and \[7, 4\]"):
        cycle(live, live_state(other), tmp_path)
    assert buffers(other) == before
