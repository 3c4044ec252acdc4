"""What a newcomer runs first works as it is written: the examples, and the scripts of the README."""

from __future__ import annotations

import ast
import csv
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support import forked
from tests.support.chaos import ChaosPlan
from tests.support.launch import ROOT, Outcome, run_again_until_done, run_command, torchrun
from tests.support.twins import assert_same_run

EXAMPLES = ROOT / "examples"
CHAOS = str(ROOT / "tests/support/chaos.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIFE_SECONDS = 120.0
MOST_LINES_OF_MINIMAL = 40

# Stands for what the user of the README's scripts has: a model, a loss, data.
MY_PROJECT = """
import torch
import dist_train as dt

generator = torch.Generator().manual_seed(0)
inputs = torch.rand(96, 4, generator=generator)
train_set = torch.utils.data.TensorDataset(inputs, 10 + inputs.sum(1))
val_set = torch.utils.data.TensorDataset(inputs[:20], 10 + inputs[:20].sum(1))

def build_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1), torch.nn.Flatten(0))

PriceModel = build_model

def price_loss(model, batch):
    prediction = model(batch[0])
    return torch.nn.functional.mse_loss(prediction, batch[1]), prediction, batch[1]

def loss_fn(model, batch):
    return price_loss(model, batch)[0]

def evaluate(run):
    metric = dt.MAE()
    with run.evaluation() as model:
        for batch in run.batches(dt.evaluation_loader(val_set, batch_size=8)):
            metric.update(*price_loss(model, batch)[1:])
    return metric.compute(run.world)
"""


def find_code_block(language: str) -> str:
    """The README's only block in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(block)


def run_script(command: list[str], folder: Path) -> Outcome:
    """With the modules that lie in the folder."""
    return run_command(command, deadline_seconds=LIFE_SECONDS, extra=modules_from(folder)).require_success()


def modules_from(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def test_minimal_stays_minimal() -> None:
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= MOST_LINES_OF_MINIMAL


@pytest.mark.distributed
def test_minimal_trains_the_same_alone_and_on_two_ranks(tmp_path: Path) -> None:
    script = [str(EXAMPLES / "minimal.py"), "--epochs", "2", "--run-dir"]
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    run_command([sys.executable, *script, alone], deadline_seconds=LIFE_SECONDS).require_success()
    forked.run_script(2, *script, together, deadline_seconds=LIFE_SECONDS)
    losses = [[record["train_loss"] for record in read_metrics(Store(run)) if record["kind"] == "epoch"]
              for run in (alone, together)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0] / 10


@pytest.mark.distributed
def test_own_loop_killed_under_torchrun_equals_the_run_that_never_died(tmp_path: Path) -> None:
    options = ["--cpu", "--epochs", "3", "--run-dir"]
    script = str(EXAMPLES / "own_loop.py")
    twin, run_dir = str(tmp_path / "twin"), str(tmp_path / "run")
    forked.run_script(2, script, *options, twin, deadline_seconds=LIFE_SECONDS)

    plan = ChaosPlan(str(tmp_path / "chaos"), seed=34, kills=1, most_micro_steps=190)
    killed = torchrun(2, CHAOS, script, *options, run_dir, max_restarts=2)
    outcome = run_command(killed, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment()).require_success()
    assert len(plan.fired()) == 1
    assert "Resuming from" in outcome.output, f"{plan.fired()} came before the first checkpoint: take another seed"
    assert_same_run(twin, run_dir)


@pytest.mark.distributed
def test_language_model_killed_and_started_again_equals_the_run_that_never_died(tmp_path: Path) -> None:
    folder = EXAMPLES / "language_model"
    options = (
        "--cpu --steps 12 --epochs 2 --corpus-mb 0.3 --block 32 --global-batch-size 8 --micro-batch-size 4 "
        "--eval-windows 8 --checkpoint-every 2 --log-every 1 --run-dir"
    )
    script = [str(folder / "train.py"), *shlex.split(options)]
    twin, run_dir = str(tmp_path / "twin"), str(tmp_path / "run")
    run_script([sys.executable, *script, twin], folder)

    plan = ChaosPlan(str(tmp_path / "chaos"), seed=24, kills=1, most_operations=40)
    lives = run_again_until_done(
        [sys.executable, CHAOS, *script, run_dir],
        deadline_seconds=LIFE_SECONDS,
        extra={**plan.to_environment(), **modules_from(folder)},
    )
    assert (len(lives), len(plan.fired())) == (2, 1)
    assert "Resuming from" in lives[-1].output, f"{plan.fired()} came before the first checkpoint: take another seed"
    assert_same_run(twin, run_dir)


@pytest.mark.distributed
def test_price_example_trains_on_two_ranks_and_predicts_every_product_once(tmp_path: Path) -> None:
    folder, test, out = EXAMPLES / "price_prediction", tmp_path / "test.csv", tmp_path / "submission.csv"
    training = [str(folder / "train.py"), "--preset", "blazing", "--samples", "500", "--epochs", "2", "--cpu"]
    run_script(torchrun(2, *training, "--run-dir", str(tmp_path / "run")), folder)
    making = [str(folder / "data.py"), "--out", str(test), "--samples", "50", "--seed", "1", "--without-price"]
    run_script([sys.executable, *making], folder)
    predicting = [str(folder / "predict.py"), "--run", str(tmp_path / "run"), "--data", str(test), "--out", str(out)]
    run_script([sys.executable, *predicting], folder)
    with test.open(newline="", encoding="utf-8") as products, out.open(newline="", encoding="utf-8") as prices:
        wanted, found = list(csv.DictReader(products)), list(csv.DictReader(prices))
    assert [row["sample_id"] for row in found] == [row["sample_id"] for row in wanted]
    assert len({row["sample_id"] for row in found}) == 50
    assert all(float(row["price"]) >= 0.01 for row in found)


@pytest.mark.distributed
@pytest.mark.parametrize(("language", "run_dir"), [("python", "runs/ultra"), ("diff", "runs/own")])
def test_the_readme_s_script_runs(language: str, run_dir: str, tmp_path: Path) -> None:
    """Twice: the second start has nothing left to do. Of the diff, what it leads to."""
    lines = find_code_block(language).splitlines()
    if language == "diff":
        lines = [line[1:] for line in lines if not line.startswith("-")]
    script = "\n".join(lines).replace(f'"{run_dir}"', repr(str(tmp_path / run_dir)))
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "my_project.py").write_text(MY_PROJECT)
    first, second = (run_script([sys.executable, str(tmp_path / "script.py")], tmp_path) for _ in range(2))
    assert "Epoch 20/20" in first.output
    assert "Nothing is left to do" in second.output


def test_every_test_that_the_readme_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert named
    missing = []
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8")) if (ROOT / path).exists() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{path}::{name}")
    assert missing == []


def test_every_file_that_the_readme_links_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("dist-train") is None, reason="the demo shows the installed command dist-train")
def test_the_demo_ends_well() -> None:
    outcome = run_command([sys.executable, str(ROOT / "scripts/demo/story.py")], deadline_seconds=800).require_success()
    assert outcome.output.count("The two runs are one and the same, bit for bit.") == 2
