"""The recipes of docs/own-loops.md run as they are written, and end alike whether they were killed or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import dist_train as dt

PAGE = (Path(__file__).resolve().parents[2] / "docs/own-loops.md").read_text(encoding="utf-8")
RECIPES = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}


class Data(torch.utils.data.Dataset[Any]):
    """Twenty-six points."""

    def __init__(self) -> None:
        self.tensor = torch.randn(26, 3, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]


class KilledError(Exception):
    """Stands for a kill: nothing more is saved."""


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, outputs))


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    return loss


def follow(recipe: str, run_dir: Path) -> dict[str, torch.Tensor]:
    """What the recipe's run ends with: all of its tensors."""
    dt.seed_everything(0)
    model, weights = network(3, 1), np.arange(1.0, 27.0)
    names: dict[str, Any] = {
        "dt": dt,
        "np": np,
        "torch": torch,
        "accelerator": Accelerator(cpu=True),
        "network": network,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_fn": loss_fn,
        "data": Data(),
        "weights": weights / weights.sum(),
        "run_dir": str(run_dir),
    }
    exec(compile(RECIPES[recipe], f"docs/own-loops.md: {recipe}", "exec"), names)
    run = names["run"]
    assert run.reason == "done"
    return {name: value.clone() for name, value in run._live.capture().tensors.items()}


def test_the_page_has_these_recipes() -> None:
    assert list(RECIPES) == ["accumulation", "gan", "ema", "order", "own-loader", "iterable", "callbacks"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_that_is_killed_ends_as_if_nothing_had_happened(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = follow(recipe, tmp_path / "straight")
    step = dt.Run.step

    def killed_step(run: dt.Run, loss: Any = None) -> None:
        step(run, loss)
        if run.global_step == 5 and not run._feed.in_window:
            run.save(wait=True)
            raise KilledError

    monkeypatch.setattr(dt.Run, "step", killed_step)
    with pytest.raises(KilledError):
        follow(recipe, tmp_path / "killed")
    monkeypatch.setattr(dt.Run, "step", step)
    capsys.readouterr()
    resumed = follow(recipe, tmp_path / "killed")
    output = capsys.readouterr()
    assert "Resuming from" in output.out
    assert "not be exact" not in output.err
    assert straight.keys() == resumed.keys()
    assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []
    if recipe == "callbacks":
        assert "Epoch 5 checkpoint ready for download: " in output.out
