"""A script with its own .pth files moves to dist_train and back again, and nothing is lost on either way."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.cli import main
from dist_train.history import read_metrics
from tests.support.launch import ROOT, run_command
from tests.unit.test_exchange import differences

MIGRATION = ROOT / "examples" / "migration"
LATEST = "checkpoint_ultra_latest.pth"


def python(*command: Any) -> str:
    words = [sys.executable, *map(str, command)]
    return run_command(words, deadline_seconds=120).require_success().output


def dist_train(*command: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([str(word) for word in command]) == 0
    return out.getvalue()


def old_script(models: Path, epochs: int, *more: Any) -> str:
    """It knows nothing of us, so that it may as well run in this process."""
    words = ["--models", models, "--epochs", epochs, *more]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["old_script.py", *map(str, words)])
        runpy.run_path(str(MIGRATION / "old_script.py"), run_name="__main__")
    return out.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the old script has saved in five epochs that nobody interrupted."""
    folder = tmp_path_factory.mktemp("old") / "models"
    old_script(folder, 5)
    return folder


def test_an_old_script_is_continued_by_its_own_loop_and_continues_that_bit_for_bit(
    models: Path, tmp_path: Path
) -> None:
    run_dir, back = tmp_path / "ultra", tmp_path / "back.pth"
    said = dist_train("import", models / "checkpoint_ultra_epoch_2.pth", "--run", run_dir)
    assert "epoch 2, step 16" in said
    assert f"run_dir='{run_dir}': it continues with epoch 3" in said
    said = python(MIGRATION / "own_loop.py", "--run-dir", run_dir, "--epochs", 4)
    assert "epoch 2 of 4 done, best val_smape" in said
    assert "Epoch 3/4" in said
    assert [one["epoch"] for one in read_metrics(run_dir) if one["kind"] == "epoch"] == [1, 2, 3]
    dist_train("export", run_dir, "latest", "--to", back)
    exported = torch.load(back, weights_only=True)
    unbroken = torch.load(models / "checkpoint_ultra_epoch_4.pth", weights_only=True)
    loss = unbroken.pop("train_loss")
    assert differences(unbroken, exported) == []
    assert exported["train_loss"] == pytest.approx(loss)
    assert "Resumed from epoch 4, best SMAPE" in old_script(tmp_path / "models", 5, "--resume-from", back)
    ends = [torch.load(folder / LATEST, weights_only=True) for folder in (models, tmp_path / "models")]
    assert differences(*ends) == []


def test_an_old_script_is_continued_by_the_trainer(models: Path, tmp_path: Path) -> None:
    run_dir, back = tmp_path / "ultra", tmp_path / "back.pth"
    dist_train("import", models / "checkpoint_ultra_epoch_2.pth", "--run", run_dir)
    said = python(MIGRATION / "trainer.py", "--run-dir", run_dir, "--epochs", 4)
    assert "epoch 2 of 4 done, best val_smape" in said
    history = [one for one in read_metrics(run_dir) if one["kind"] == "epoch"]
    assert [(one["epoch"], one["global_step"]) for one in history] == [(1, 16), (2, 24), (3, 32)]
    old = torch.load(models / "checkpoint_ultra_epoch_2.pth", weights_only=True)
    assert history[0]["val_smape"] == old["val_smape"] > history[-1]["val_smape"], "it trains on, not anew"
    dist_train("export", run_dir, "latest", "--to", back)
    exported = torch.load(back, weights_only=True)
    assert (exported["epoch"], exported["val_smape"]) == (3, history[-1]["val_smape"])
    assert exported["scheduler_state_dict"]["last_epoch"] == 32
    assert "Epoch 5/5" in old_script(tmp_path / "models", 5, "--resume-from", back)
