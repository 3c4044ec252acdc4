"""What scripts get wrong between two starts of a run, and what they are told."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dist_train as dt
from dist_train.errors import ConfigError, StateMismatchError

DATA = TensorDataset(torch.arange(12.0).reshape(12, 1))


def run_of(run_dir: Path | str, optimizer: Any = torch.optim.AdamW, **options: Any) -> dt.Run:
    model = nn.Linear(1, 1)
    policy = dt.CheckpointPolicy(every_steps=1)
    return dt.Run(str(run_dir), model=model, optimizer=optimizer(model.parameters(), lr=0.1), policy=policy, **options)


def train(run: dt.Run, loader: Any = None, *, leave_at: int | None = None, epochs: int = 1) -> dt.Run:
    loader = run._intake.loader if loader is None else loader
    with run:
        for _ in run.epochs(epochs):
            for _ in run.batches(loader):
                run.step(loss=1.0)
                if run.global_step == leave_at:
                    return run
    return run


def loader_of(num_samples: int = 12, seed: int = 0) -> Any:
    return dt.data_loader(TensorDataset(torch.zeros(num_samples, 1)), global_batch_size=4, seed=seed)


def test_another_optimizer_is_refused_by_both_names(tmp_path: Path) -> None:
    train(run_of(tmp_path, loader=loader_of()))
    with pytest.raises(StateMismatchError, match="the optimizer was a AdamW and is a Adagrad now"):
        train(run_of(tmp_path, torch.optim.Adagrad, loader=loader_of()), epochs=2)


def test_a_registered_object_that_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_of(tmp_path, loader=loader_of()) as run:
        run.register("ema", SimpleNamespace(state_dict=lambda: {"value": 1}, load_state_dict=lambda state: None))
        for _ in run.epochs(1):
            for _ in run.batches(run._intake.loader):
                run.step()
    train(run_of(tmp_path, loader=loader_of()), epochs=2)
    assert "holds 'ema', which this script does not register" in capsys.readouterr().err


def test_other_data_in_mid_epoch_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(run_of(tmp_path, loader=loader_of()), leave_at=2)
    train(run_of(tmp_path, loader=loader_of(num_samples=16, seed=1)))
    said = capsys.readouterr()
    assert "data.num_samples: 12 -> 16" in said.out
    assert "data.seed: 0 -> 1" in said.out
    assert "this epoch mixes two orders" in said.err


def test_a_prepared_loader_is_refused(tmp_path: Path) -> None:
    loader = loader_of()
    prepared = SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=loader.batch_sampler))
    with pytest.raises(ConfigError, match=r"was given to accelerator\.prepare"):
        train(run_of(tmp_path, loader=loader), prepared)


def test_a_second_step_after_one_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="called twice after one batch"), run_of(tmp_path, loader=loader_of()) as run:
        for _ in run.epochs(1):
            for _ in run.batches(run._intake.loader):
                run.step()
                run.step()


def test_a_loss_that_is_not_finite_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_of(tmp_path, loader=loader_of(), options=dt.RunOptions(log_every_steps=1)) as run:
        for _ in run.epochs(2):
            for _ in run.batches(run._intake.loader):
                run.step(loss=math.nan)
    assert capsys.readouterr().err.count("is not finite") == 1
    events = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [event["names"] for event in events if event["event"] == "not_finite"] == [["loss"]]


def test_a_relative_run_dir_outlives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_of("runs/here", loader=loader_of()) as run:
        for _ in run.epochs(1):
            for _ in run.batches(run._intake.loader):
                os.chdir("/")
                run.step()
    assert (tmp_path / "runs/here/checkpoints/step-00000003/manifest.json").exists()


def test_a_monitor_that_will_never_be_measured_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="monitor='val_smap' will not be measured; there will be: val_smape, val_loss"
    ):
        trainer(tmp_path, monitor="val_smap", metrics={"val_smape": dt.SMAPE()})


def test_reduce_lr_on_plateau_follows_the_monitored_metric_once_an_epoch(tmp_path: Path) -> None:
    ready = trainer(tmp_path, monitor="val_loss", epochs=4, plateau=True)
    ready.fit()
    assert ready.scheduler.last_epoch == 4
    assert ready.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def trainer(run_dir: Path, monitor: str, *, epochs: int = 1, plateau: bool = False, **options: Any) -> dt.Trainer:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if plateau:
        options["scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    policy = dt.CheckpointPolicy(monitor=monitor)
    config = dt.TrainConfig(run_dir=str(run_dir), epochs=epochs, global_batch_size=4, cpu=True, checkpoint=policy)
    return dt.Trainer(model, optimizer, train_data=DATA, eval_data=DATA, loss=constant_loss, config=config, **options)


def constant_loss(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prediction = model(batch[0]).squeeze(1)
    return (prediction * 0).sum() + 1.0, prediction, batch[0].squeeze(1)
