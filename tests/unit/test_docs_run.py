"""The blocks of docs/inference.md do what the page says, in order, in one directory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.cli import main
from dist_train.run import Run
from tests.support.small_run import Numbered, SmallRun, small_model, small_optimizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "inference.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def evaluate(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return float(model.eval()(Numbered().inputs).mean())


def train_two_models(run_dir: str) -> None:
    models = {"generator": small_model(), "discriminator": torch.nn.Linear(2, 2)}
    with Run(run_dir, model=models) as run:
        for _ in run.epochs(1):
            run.step()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the runs that the page speaks of."""
    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "models").mkdir()
    policy = CheckpointPolicy(every_epochs=5, keep_last=9)
    with contextlib.redirect_stdout(io.StringIO()):
        SmallRun(run_dir=folder / "runs" / "ultra", epochs=20, policy=policy).train()
        train_two_models("runs/gan")
    yield folder
    os.chdir(before)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def run_lines(text: str) -> None:
    for line in text.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "dist-train", f"only our own commands are run here: {line}"
        assert main(words) == 0, line


def test_every_block_of_the_page_runs(place: Path) -> None:
    model = small_model()
    optimizer, scheduler = small_optimizer(model)
    names: dict[str, Any] = {"build_model": small_model, "evaluate": evaluate, "torch": torch}
    names |= {"optimizer": optimizer, "scheduler": scheduler}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for language, text in blocks():
            run_lines(text) if language == "bash" else exec(compile(text, str(PAGE), "exec"), names)
    said = out.getvalue()
    assert "does not fit the model: model/" in said
    measured = dict(re.findall(r"^(epoch:\d+) (\S+)$", said, re.MULTILINE))
    assert measured.keys() == {"epoch:15", "epoch:20"}
    assert len(set(measured.values())) == 2, "two epochs of a training differ"
    assert (names["start_epoch"], names["best_metric"]) == (5, 2 / 7)
    written = sorted(path.name for path in [*place.iterdir(), *(place / "models").iterdir()])
    assert written == [
        "e15.safetensors",
        "everything.zip",
        "everything.zip.sha256",
        "models",
        "runs",
        "ultra-best-weights.zip",
        "ultra-best-weights.zip.sha256",
        "ultra-best.pth",
        "ultra-hf",
        "ultra-latest.pth",
        "ultra.zip",
        "ultra.zip.sha256",
    ]


def test_the_comparison_of_two_epochs_takes_three_lines() -> None:
    (block,) = [text for _, text in blocks() if "epoch:15" in text and "epoch:20" in text]
    assert len(block.splitlines()) == 3


def test_the_page_has_blocks_of_both_kinds() -> None:
    languages = [language for language, _ in blocks()]
    assert languages.count("python") >= 4
    assert languages.count("bash") == 3
