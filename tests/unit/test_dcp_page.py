"""The blocks of docs/dcp.md run as they are written, in order, and do what the page says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dist_train.checkpoint.plain_values import WAYS_OUT
from dist_train.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/dcp.md").read_text(encoding="utf-8")
BLOCKS = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
COMMANDS = re.findall(r"^(dist-train .*)$", PAGE, re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore")


def training(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def is_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = training(1), training(2)
    names: dict[str, Any] = {"torch": torch, **first}
    followed = []

    def follow(block: str) -> str:
        followed.append(block)
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(BLOCKS[block], f"docs/dcp.md: {block}", "exec"), names)
        return out.getvalue()

    follow("save")
    names |= second
    follow("load")
    assert names["step"] == 100
    assert is_equal(first["model"], second["model"])
    assert second["optimizer"].state_dict()["state"][0]["step"] == 1
    follow("many")
    follow("async")
    dcp.save({"model": first["model"]}, storage_writer=dcp.FileSystemWriter("old/step-100"))
    damage(Path("outputs/step-400"))
    said = follow("newest")
    assert "step-400 is left out" in said
    assert "has digest" in said
    assert names["path"] == Path("outputs/step-300")
    follow("keep")
    assert sorted(one.name for one in Path("outputs").iterdir()) == ["step-300", "step-400"]
    follow("from-torch")
    follow("to-torch")
    saved = torch.load("everything.pth", weights_only=True)
    assert torch.equal(saved["model"]["weight"], first["model"].weight)
    back = {"model": nn.Linear(4, 3)}
    dcp.load(back, storage_reader=dcp.FileSystemReader("back/step-100"))
    assert is_equal(back["model"], first["model"])
    assert "Put its getvalue() in its place" in follow("refused")
    assert not Path("outputs/step-500").exists()
    follow("async")  # whole again, for the commands
    assert set(followed) == set(BLOCKS)
    run_commands()


def damage(folder: Path) -> None:
    file = next(folder.glob("model-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def run_commands() -> None:
    codes = {}
    for line in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()):
            codes[line] = main(shlex.split(line)[1:])
    assert len(codes) == 4
    assert {line: code for line, code in codes.items() if code} == {
        line: 1 for line in COMMANDS if line.startswith("dist-train diff")
    }, "they differ in the step"
    assert torch.load("model.pth", weights_only=True)["model_state_dict"].keys() == {"weight", "bias"}


def test_the_page_names_the_way_out_of_all_that_has_one() -> None:
    table = PAGE.partition("## What is refused")[2]
    for name in ("BytesIO", "Namespace", "defaultdict", "deque", "Generator", "complex128", "sparse", "quantized"):
        assert any(name in known for known in WAYS_OUT)
        assert name in table, name
