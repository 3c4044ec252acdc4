"""The scenarios and use cases of the guide that this library began with, as a person plays them through on its models.

`docs/guide.md` maps every item of the guide to the command or line here and to a test; those without a test of their
own elsewhere are played through here, with the price models of the examples on a small sample.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_train import cli
from dist_train.history import read_metrics
from tests.support.damage import checkpoint_names, contents, copy_run, events
from tests.support.launch import ROOT, end_session, environment
from tests.support.twins import assert_same_run, read_checkpoint, same_bits
from tests.unit.test_examples_price import load_example

pytestmark = pytest.mark.distributed

FOLDER = ROOT / "examples" / "price_prediction"
data, model, train, predict = load_example(FOLDER, "data", "model", "train", "predict")
EPOCHS = 4
SMALL = ["--preset", "blazing", "--samples", "400", "--lr", "3e-2", "--cpu", "--keep-last", "9"]
DEADLINE_SECONDS = 120


def play(run_dir: Path, *more: str, epochs: int = EPOCHS) -> str:
    """What a person types; the run's own path is left to the test. Returns how it ended."""
    arguments = [*SMALL, "--run-dir", str(run_dir), "--epochs", str(epochs), *more]
    result = train.build_trainer(train.parse_args(arguments)).fit()
    assert result.exit_code == 0
    return str(result.status)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all epochs to which nothing ever happened."""
    run_dir = tmp_path_factory.mktemp("guide") / "run"
    play(run_dir)
    return run_dir


@pytest.fixture
def run_dir(twin: Path, tmp_path: Path) -> Path:
    return copy_run(twin, tmp_path / "run")


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What the terminal has shown since the last call."""
    return lambda: capsys.readouterr().out


def best_epoch(run_dir: Path) -> int:
    best = read_checkpoint(run_dir)[0].best
    assert best is not None
    return best.epochs_completed


def test_each_epoch_is_saved_and_the_best_is_marked(twin: Path, tmp_path: Path, said: Said) -> None:
    """Automatic saving; the example output; the files for each model: latest, epoch N, best."""
    play(tmp_path / "run")
    text = said()
    for epoch in range(1, EPOCHS + 1):
        line = rf"Epoch {epoch}/{EPOCHS} - Train Loss: \d\.\d{{4}} - Val SMAPE: \d+\.\d\d% - Val Loss: \d\.\d{{4}}\n"
        assert re.search(line + rf"Checkpoint saved: epoch {epoch} ", text)
    assert re.search(r"Best model so far: Val SMAPE \d+\.\d\d%", text)
    assert len(checkpoint_names(twin)) == EPOCHS
    assert (twin / "latest").resolve().name == checkpoint_names(twin)[-1]
    assert (twin / "best").resolve().name == f"step-{step_of(twin, best_epoch(twin)):08d}"


def test_a_checkpoint_holds_all_that_the_guide_lists(twin: Path) -> None:
    manifest, tensors = read_checkpoint(twin)
    assert any(name.startswith("model/") for name in tensors)
    assert any(name.startswith("optimizer/") for name in tensors)
    assert {"optimizer", "scheduler"} <= manifest.state.keys()
    assert manifest.progress.epochs_completed == EPOCHS
    assert manifest.train_loss is not None
    assert "val_smape" in manifest.metrics
    assert manifest.best is not None


def test_a_crash_in_epoch_three_is_continued_by_the_same_command(twin: Path, tmp_path: Path) -> None:
    """Scenario 1, use cases 1 and 2, the complete resume workflow."""
    run_dir = tmp_path / "run"
    arguments = [*SMALL, "--run-dir", str(run_dir), "--epochs", str(EPOCHS)]
    command = [sys.executable, str(FOLDER / "train.py"), *arguments]
    first = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        kill_after(first, "Checkpoint saved: epoch 2")
    finally:
        end_session(first)
    assert first.returncode == -signal.SIGKILL
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert again.returncode == 0, again.stderr
    assert re.search(
        r"Resuming from .*step-\d+ \((epoch [23] of 4 done|epoch 4 of 4 done), best val_smape", again.stdout
    )
    assert_same_run(run_dir, twin)


def kill_after(process: subprocess.Popen[str], line: str) -> None:
    """Reads what the process says and kills it at once when it has said the line."""
    assert process.stdout is not None
    deadline = time.monotonic() + DEADLINE_SECONDS
    for said_line in process.stdout:
        assert time.monotonic() < deadline
        if line in said_line:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
            return
    raise AssertionError(f"the run ended and never said {line!r}")


def test_resuming_from_epoch_two_starts_a_branch_there(run_dir: Path, twin: Path, said: Said) -> None:
    """Scenario 2: what was trained since is kept in abandoned/; the same settings end where the run had ended."""
    play(run_dir, "--resume", "epoch:2")
    assert "(epoch 2 of 4 done, best val_smape" in said()
    assert len(list((run_dir / "checkpoints" / "abandoned").glob("a*/step-*"))) == EPOCHS - 2
    assert [event["global_step"] for event in events(run_dir, "branched")] == [step_of(twin, 2)]
    for one, other in zip(read_checkpoint(run_dir)[1].values(), read_checkpoint(twin)[1].values(), strict=True):
        assert same_bits(one, other)


def step_of(run_dir: Path, epoch: int) -> int:
    return read_checkpoint(run_dir, f"epoch:{epoch}")[0].progress.global_step


def test_epochs_are_added_after_the_end(run_dir: Path, said: Said) -> None:
    """Scenario 3: from the latest, by giving more epochs; the schedule is that of a run of so many from the start."""
    straight = run_dir.parent / "straight"
    play(straight, epochs=EPOCHS + 2)
    said()
    play(run_dir, epochs=EPOCHS + 2)
    assert f"(epoch {EPOCHS} of {EPOCHS + 2} done" in said()
    assert read_checkpoint(run_dir)[0].progress.epochs_completed == EPOCHS + 2
    assert last_rate(run_dir) == last_rate(straight)


def last_rate(run_dir: Path) -> list[float]:
    groups = read_checkpoint(run_dir)[0].state["optimizer"]["groups"]
    return [group["settings"]["lr"] for group in groups]


def test_epochs_are_added_from_the_best(run_dir: Path) -> None:
    """Scenario 3 as the guide writes it: the best is known and continued, and it stays the best to be beaten."""
    best = best_epoch(run_dir)
    value = read_checkpoint(run_dir)[0].best
    play(run_dir, "--resume", "best", epochs=EPOCHS + 1)
    assert read_checkpoint(run_dir)[0].progress.epochs_completed == EPOCHS + 1
    assert events(run_dir, "resumed")[-1]["path"].endswith(f"step-{step_of(run_dir, best):08d}")
    now = read_checkpoint(run_dir)[0].best
    assert now is not None
    assert value is not None
    assert now.value <= value.value


def test_another_learning_rate_is_tried_from_epoch_two(run_dir: Path, said: Said) -> None:
    """Use case 3: the rate in the script is the one that is used, and it is told; the old epochs are all there."""
    before = contents(run_dir / "checkpoints")
    straight = run_dir.parent / "straight"
    play(straight, "--lr", "5e-4")
    said()
    play(run_dir, "--resume", "epoch:2", "--lr", "5e-4")
    assert re.search(r"lr\b.*0\.03.*0\.0005", said())
    assert last_rate(run_dir) == last_rate(straight)
    kept = set(contents(run_dir / "checkpoints").values())
    assert set(before.values()) <= kept


def test_two_epochs_are_compared_for_inference(twin: Path) -> None:
    """Use case 4: the same products, priced by the models of two epochs."""
    products = data.synthetic_products(20)
    prices = {}
    for epoch in (2, EPOCHS):
        loaded = predict.dt.load_model(str(twin), f"epoch:{epoch}", model.PriceModel())
        prices[epoch] = predict.predict_prices(loaded, predict.PriceDataset(products), torch.device("cpu"))
    assert len(prices[2]) == len(prices[EPOCHS]) == 20
    assert prices[2] != prices[EPOCHS]


def test_what_is_saved_is_listed_and_shown(twin: Path, said: Said) -> None:
    """Monitoring: what `ls -lh` and three prints of a loaded file did; which epoch was the best is noted."""
    assert cli.main(["ls", str(twin), "--json"]) == 0
    rows = json.loads(said())
    assert [row["epochs_completed"] for row in rows] == list(range(1, EPOCHS + 1))
    assert [row["epochs_completed"] for row in rows if row["best"]] == [best_epoch(twin)]
    assert cli.main(["show", str(twin)]) == 0
    text = said()
    assert re.search(r"metrics +val_smape \d+\.\d\d%", text)
    assert re.search(rf"best so far +val_smape \d+\.\d\d% at step \d+, epoch {best_epoch(twin)} ", text)


def test_without_a_checkpoint_the_same_command_just_starts(tmp_path: Path) -> None:
    """Troubleshooting, "No such file or directory": training has not completed an epoch yet."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert play(tmp_path / "run", epochs=1) == "done"


def test_half_the_micro_batch_is_the_cure_for_a_full_gpu(run_dir: Path) -> None:
    """Troubleshooting, "CUDA out of memory": the global batch, the updates and the rates stay what they were."""
    play(run_dir, "--micro-batch-size", "8", "--accumulation", "16", epochs=EPOCHS + 1)
    manifest = read_checkpoint(run_dir)[0]
    data_now = manifest.settings["config"]["data"]
    assert (data_now["global_batch_size"], data_now["micro_batch_size"]) == (128, 8)
    per_epoch = step_of(run_dir, EPOCHS) // EPOCHS
    assert manifest.progress.global_step == per_epoch * (EPOCHS + 1)


def test_the_history_of_a_run_is_a_list_for_a_table(twin: Path) -> None:
    history = [record for record in read_metrics(twin) if record["kind"] == "epoch"]
    assert [record["epoch"] + 1 for record in history] == list(range(1, EPOCHS + 1))
    assert all({"train_loss", "val_smape", "val_loss"} <= record.keys() for record in history)
