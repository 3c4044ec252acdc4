"""The blocks of docs/warm-starts.md run as they are written, in order, and do what the page says."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train as dt
from tests.support.small_run import events_of, manifests_of

PAGE = (Path(__file__).resolve().parents[2] / "docs/warm-starts.md").read_text(encoding="utf-8")
BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}


def network(hidden: int, classes: int, *, adapter: bool = False) -> Any:
    dt.seed_everything(0)
    model: Any = nn.Sequential()
    model.body = nn.Linear(3, hidden)
    if adapter:
        model.adapter = nn.Linear(hidden, hidden)
    model.head = nn.Linear(hidden, classes)
    return model


def train(run_dir: str, model: Any, optimizer: Any, *, epochs: int, options: dt.RunOptions | None = None) -> None:
    with dt.Run(run_dir, model=model, optimizer=optimizer, options=options) as run:
        for _ in run.epochs(epochs):
            model(torch.ones(2, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()


def test_the_page_does_what_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"dt": dt, "torch": torch, "network": network, "train": train}

    def follow(block: str) -> Any:
        exec(BLOCKS[block], names)
        return names["model"].state_dict()

    base = follow("base")
    tuned = follow("warm-start")
    said = capsys.readouterr().out
    shown = re.search(r"^```\n(Started.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown
    for line in shown[1].replace("/data/", f"{tmp_path}/").removesuffix("...").splitlines():
        assert line in said, line
    assert tuned["head.weight"].shape == (5, 8)
    assert not torch.equal(tuned["body.weight"], base["body.weight"])  # it has trained on
    grown = follow("grown")
    assert manifests_of(tmp_path / "runs/base")[-1]["progress"]["epochs_completed"] == 6
    assert any(
        "Loaded in part: 4 of the 6" in note for note in events_of(tmp_path / "runs/base", "resumed")[-1]["notes"]
    )
    adapted = follow("excluded")
    assert torch.equal(adapted["body.weight"], grown["body.weight"])
    tensors = manifests_of(tmp_path / "runs/adapter")[-1]["tensors"]
    assert {name for name in tensors if name.startswith("model/")} == {"model/adapter.weight", "model/adapter.bias"}
    caplog.clear()
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)  # the first run of a process ends that
    for name, value in follow("adapter").items():
        assert torch.equal(value, adapted[name]), name
    assert "with the values of the training" in caplog.text


def test_the_page_names_every_option_that_it_is_about() -> None:
    assert set(BLOCKS) == {"base", "warm-start", "grown", "excluded", "adapter"}
    for option in ("warm_start", "partial_load", "exclude"):
        assert option in dt.TrainConfig.__dataclass_fields__
        assert option in dt.RunOptions.__dataclass_fields__
