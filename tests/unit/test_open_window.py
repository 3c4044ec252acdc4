"""A loop that accumulates by hand: a save in the middle of its window is made when the window ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dist_train as dt
from dist_train.open_window import OpenWindow


def network() -> nn.Module:
    dt.seed_everything(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1))


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3)).square().mean().backward()


@pytest.mark.parametrize("to_none", [True, False])
def test_a_window_is_open_between_a_backward_pass_and_the_end_of_its_update(to_none: bool) -> None:
    model = network()
    window = OpenWindow({"": model})
    assert not window.is_open()
    for _ in range(2):
        backward(model)
        assert window.is_open()
        window.close()
        assert not window.is_open()
        model.zero_grad(set_to_none=to_none)
        assert not window.is_open()
    backward(model)
    assert window.is_open()


def test_a_save_within_a_window_by_hand_is_that_of_the_update_that_ends_it(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = dt.CheckpointPolicy(every_epochs=100, at_end=False)
    with dt.Run(str(tmp_path / "run"), model=model, optimizer=optimizer, policy=policy) as run:
        for _ in run.epochs(1):
            for update in range(3):
                backward(model)
                if update == 1:
                    run.save(wait=True)
                    assert run.committed_step == -1
                backward(model)
                optimizer.step()
                run.step()
                optimizer.zero_grad()
            assert run.committed_step == 2
            run.save(wait=True)
            assert run.committed_step == 3, "after an update, gradients cleared or not, a save is made at once"
