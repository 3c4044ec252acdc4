"""Random generators that modules and optimizers hold: found, restored where they lie, told where they are gone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.capture import Capture
from dist_train.each_rank import adapt
from dist_train.generators import HELD, HeldGenerators
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, write_checkpoint


class Noisy(nn.Module):
    """It may hold one generator less."""

    def __init__(self, *, second: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.linear.noise = torch.Generator()  # type: ignore[assignment]
        self.second = {"numpy": np.random.default_rng(1)} if second else {}

    def draw(self) -> list[Any]:
        drawn: list[Any] = [torch.rand(3, generator=self.linear.noise).tolist()]  # type: ignore[arg-type]
        return drawn + [one.random() for one in self.second.values()]


def places(model: nn.Module, registered: dict[str, Any]) -> list[str]:
    capture = Capture()
    HeldGenerators({"model": model}, {}).capture(capture, registered)
    return list(capture.state.get(HELD, []))


def test_each_is_found_once_without_the_global_ones_and_those_that_are_registered() -> None:
    model = Noisy()
    model.again = model.linear.noise  # type: ignore[assignment]
    model.globals = [torch.default_generator, np.random.mtrand._rand, random._inst]  # type: ignore
    assert places(model, {}) == ["model.again", "model.second.numpy"]
    assert places(model, {"noise": adapt(model.linear.noise, each_rank=False)}) == ["model.second.numpy"]
    assert places(nn.Linear(1, 1), {}) == []


def test_they_go_on_where_they_were_and_one_that_is_gone_is_told(tmp_path: Path) -> None:
    model = Noisy()
    model.draw()
    live = LiveState(models={"": model}, optimizers={})
    write_checkpoint(tmp_path, [live.capture()], live.settings)
    drawn = model.draw()
    manifest, reader = open_checkpoint(tmp_path)
    same, less = Noisy(), Noisy(second=False)
    notes = [
        LiveState(models={"": one}, optimizers={}).restore(manifest.state, manifest.settings, reader).notes
        for one in (same, less)
    ]
    reader.close()
    assert (same.draw(), less.draw()) == (drawn, drawn[:1])
    assert notes == [[], ["The checkpoint holds the random generator model.second.numpy, which is not there any more."]]
