"""What scripts get wrong between two starts of a run, and what they are told."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dist_train as dt
from dist_train.errors import ConfigError, RunInUseError, StateMismatchError

DATA = TensorDataset(torch.arange(12.0).reshape(12, 1))


def run_of(run_dir: Path | str, optimizer: Any = torch.optim.AdamW, **options: Any) -> dt.Run:
    model = nn.Linear(1, 1)
    policy = dt.CheckpointPolicy(every_steps=1, monitor=options.pop("monitor", None))
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
    table = [line.split() for line in said.out.splitlines()]
    assert ["data.num_samples", "12", "16"] in table
    assert ["data.seed", "0", "1"] in table
    assert "this epoch mixes two orders" in said.err


def test_a_prepared_loader_is_refused(tmp_path: Path) -> None:
    loader = loader_of()
    prepared = SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=loader.batch_sampler))
    with pytest.raises(ConfigError, match=r"was given to accelerator\.prepare"):
        train(run_of(tmp_path, loader=loader), prepared)


def test_a_loader_prepared_by_accelerate_is_refused_when_the_run_is_made(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for loader in (loader_of(), DataLoader(DATA, batch_size=4)):
        with pytest.raises(
            ConfigError, match=r"given to accelerator.prepare \(DataLoaderShard\), which reads a batch ahead"
        ):
            run_of(tmp_path, loader=accelerator.prepare(loader))


def test_a_prepared_scheduler_is_refused_with_the_line_to_write(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parts: Any = dict(
        zip(("model", "optimizer", "scheduler"), accelerator.prepare(model, optimizer, scheduler), strict=True)
    )
    with pytest.raises(ConfigError, match=r"The scheduler was given to accelerator.prepare.*: scheduler.step\(\)`"):
        dt.Run(str(tmp_path), accelerator=accelerator, **parts)


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


# The run itself


def calls_of(run: dt.Run) -> dict[str, Any]:
    return {
        "run.epochs()": lambda: next(run.epochs(1)),
        "run.batches()": lambda: next(iter(run.batches(run._intake.loader))),
        "run.step()": run.step,
        "run.end_epoch()": run.end_epoch,
        "run.save()": run.save,
    }


@pytest.mark.parametrize("call", ["run.epochs()", "run.batches()", "run.step()", "run.end_epoch()", "run.save()"])
def test_a_run_without_with_is_told(call: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, loader=loader_of())
    with pytest.raises(ConfigError, match=f"{re.escape(call)} was called outside of the run: write `with"):
        calls_of(run)[call]()
    train(run)  # nothing was harmed


@pytest.mark.parametrize("call", ["run.step()", "run.batches(training loader)"])
def test_what_belongs_into_an_epoch_is_told(call: str, tmp_path: Path) -> None:
    message = re.escape(f"{call} belongs inside `for epoch in run.epochs")
    with pytest.raises(ConfigError, match=message), run_of(tmp_path, loader=loader_of()) as run:
        calls_of(run)[call.replace("training loader", "")]()


def test_a_step_after_the_last_epoch_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.step\(\) belongs inside"), run_of(tmp_path, loader=loader_of()) as run:
        for _ in run.epochs(1):
            for _ in run.batches(run._intake.loader):
                run.step()
        run.step()


def test_epochs_inside_epochs_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="called inside its own loop"), run_of(tmp_path, loader=loader_of()) as run:
        for _ in run.epochs(1):
            next(run.epochs(1))


def test_epochs_after_epochs_is_a_further_phase(tmp_path: Path) -> None:
    with run_of(tmp_path, loader=loader_of()) as run:
        for count in (1, 3):
            for _ in run.epochs(count):
                for _ in run.batches(run._intake.loader):
                    run.step()
    assert run.epochs_completed == 3


def test_another_training_loader_than_the_run_s_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another training loader than the Run was given"):
        train(run_of(tmp_path, loader=loader_of()), loader_of())


@pytest.mark.parametrize("wrap", [list, lambda loader: DataLoader(DATA, batch_size=2)])
def test_steps_over_batches_of_something_else_are_told(wrap: Any, tmp_path: Path) -> None:
    loader = loader_of()
    with pytest.raises(ConfigError, match=r"without a batch of the training loader: iterate `run.batches\(loader\)`"):
        train(run_of(tmp_path, loader=loader), wrap(loader))


def test_batches_without_steps_are_told_at_the_last_batch_at_the_latest(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"run.step\(\) was not called after the last batch"),
        run_of(tmp_path, loader=DataLoader(DATA, batch_size=12)) as run,
    ):
        for _ in run.epochs(1):
            for _ in run.batches(run._intake.loader):
                pass


def test_a_monitor_without_end_epoch_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, loader=loader_of(), monitor="val")
    with pytest.raises(ConfigError, match=r"monitor='val' is not among the metrics given to end_epoch \(none\)"):
        train(run)


def test_early_stopping_without_a_metric_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, loader=loader_of(), options=dt.RunOptions(early_stopping=dt.EarlyStopping(patience=1)))
    with pytest.raises(ConfigError, match=r"early_stopping.*call run.end_epoch\(val_loss=...\)"):
        train(run)


def test_two_runs_on_one_directory_end_the_older_one_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(RunInUseError, match="opened by a second Run of this process"),
        run_of(tmp_path, loader=loader_of()) as older,
    ):
        for _ in older.epochs(1):
            for _ in older.batches(older._intake.loader):
                newer = train(run_of(tmp_path, loader=loader_of()))
                older.step()
    assert (newer.global_step, older.global_step) == (3, 1)
    assert json.loads((tmp_path / "status.json").read_text())["global_step"] == 3


# The model and its optimizer


def stepping(run_dir: Path, model: nn.Module, optimizer: Any, change: Any) -> None:
    """Trains two epochs of one update; `change` comes between them."""
    with dt.Run(str(run_dir), model=model, optimizer=optimizer, policy=dt.CheckpointPolicy(every_steps=1)) as run:
        for epoch in run.epochs(2):
            change(epoch)
            run.step()


def add_a_layer(model: Any) -> None:
    model.append(nn.Linear(1, 1))


def remove_a_layer(model: Any) -> None:
    del model[1]


def replace_the_head(model: Any) -> None:
    model[1] = nn.Linear(2, 1)


def convert(model: Any) -> None:
    model.double()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add_a_layer, "added: 2.bias, 2.weight"),
        (remove_a_layer, "removed: 1.bias, 1.weight"),
        (replace_the_head, "replaced by other tensors: 1.bias, 1.weight"),
        (convert, "given another shape or dtype: 0.bias, 0.weight, 1.bias, 1.weight"),
    ],
)
def test_a_model_that_was_changed_is_told_by_its_parameters(change: Any, told: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=re.escape(f"changed after the Run was made ({told})")):
        stepping(tmp_path, model, optimizer, lambda epoch: change(model) if epoch else None)


def test_a_model_that_was_changed_between_run_and_loop_is_told_before_the_first_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="replaced by other tensors"), dt.Run(str(tmp_path), model=model) as run:
        replace_the_head(model)
        next(run.epochs(1))


def test_freezing_and_a_growing_optimizer_state_are_no_change(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def freeze_then_update(epoch: int) -> None:
        model[0].requires_grad_(False)
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()

    stepping(tmp_path, model, optimizer, freeze_then_update)


def add_a_group(model: Any, optimizer: Any) -> None:
    optimizer.add_param_group({"params": list(model[1].parameters())})


def add_a_stranger(model: Any, optimizer: Any) -> None:
    optimizer.add_param_group({"params": list(nn.Linear(3, 3).parameters())})


def add_to_a_group(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].append(model[1].weight)


def replace_a_member(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0] = model[1].weight


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add_a_group, "held 2 parameters and hold 2, 2"),
        (add_a_stranger, "held 2 parameters and hold 2, 2"),
        (add_to_a_group, "held 2 parameters and hold 3"),
        (replace_a_member, "held 2 parameters and hold 2 others"),
    ],
)
def test_parameter_groups_that_a_restart_would_not_have_are_never_saved(change: Any, told: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        return model, torch.optim.SGD(model[0].parameters(), lr=0.1)

    model, optimizer = build()
    with pytest.raises(ConfigError, match=f"The optimizer's parameter groups were changed .* \\(they {told}\\)"):
        stepping(tmp_path, model, optimizer, lambda epoch: change(model, optimizer) if epoch else None)
    again = build()
    stepping(tmp_path, *again, lambda epoch: None)  # what was committed before can be resumed


def test_groups_whose_settings_move_are_no_change(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def move(epoch: int) -> None:
        optimizer.load_state_dict(optimizer.state_dict())  # makes new groups of the same parameters
        optimizer.param_groups[0]["lr"] = 0.0

    stepping(tmp_path, model, optimizer, move)


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The optimizer trains no parameter of the model that the Run was given"):
        dt.Run(str(tmp_path), model=nn.Linear(1, 1), optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))


def test_a_trained_tensor_that_nobody_would_save_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, temperature = nn.Linear(1, 1), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    with pytest.raises(ConfigError, match=r"trains 1 tensors \(of shape \[3\]\) that belong to no model of the Run"):
        stepping(tmp_path, model, optimizer, lambda epoch: None)


def test_a_trained_tensor_of_a_registered_module_is_saved(tmp_path: Path) -> None:
    model, scale = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *scale.parameters()], lr=0.1)
    with dt.Run(str(tmp_path), model=model, optimizer=optimizer) as run:
        run.register("scale", scale)
        for _ in run.epochs(1):
            run.step()
    assert run.committed_step == 1


# The scheduler


def scheduled_run(run_dir: Path, *, give: str = "nothing", prepared: bool = False, epochs: int = 1) -> None:
    model = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if prepared:
        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    scheduler = None
    if give == "a user's own":
        scheduler = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    elif give != "no scheduler":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    given = {"scheduler": scheduler} if give in ("scheduler=", "a user's own") else {}
    with dt.Run(str(run_dir), model=model, optimizer=optimizer, **given) as run:
        if give == "register":
            run.register("schedule", scheduler)
        for _ in run.epochs(epochs):
            run.step()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_scheduler_that_nobody_saves_is_told_at_every_start(
    prepared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        scheduled_run(tmp_path, prepared=prepared, epochs=epochs)
        assert "The optimizer has a scheduler that the Run was not given: it is not saved" in capsys.readouterr().err


@pytest.mark.parametrize("give", ["scheduler=", "register", "a user's own", "no scheduler"])
def test_a_scheduler_that_is_saved_and_none_at_all_are_not_told(
    give: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        scheduled_run(tmp_path, give=give, epochs=epochs)
    assert "was not given" not in capsys.readouterr().err


def test_of_two_optimizers_the_one_is_told_whose_scheduler_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {name: nn.Linear(1, 1) for name in ("generator", "critic")}
    optimizers = {name: torch.optim.SGD(one.parameters(), lr=0.1) for name, one in models.items()}
    schedulers = {name: torch.optim.lr_scheduler.ConstantLR(one) for name, one in optimizers.items()}
    given = {"critic": schedulers["critic"]}
    with dt.Run(str(tmp_path), model=models, optimizer=optimizers, scheduler=given) as run:
        for _ in run.epochs(1):
            run.step()
    told = capsys.readouterr().err
    assert "The optimizer 'generator' has a scheduler that the Run was not given" in told
    assert "'critic'" not in told
