"""Trainer: the standard loop over Run, in one process; and its settings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch import nn

from dist_train import trainer as trainer_module
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError, DisagreementError, StopReason
from dist_train.history import read_metrics
from dist_train.metrics import MAE, SMAPE, EarlyStopping
from dist_train.trainer import TrainConfig, Trainer, TrainResult, seed_everything
from tests.support.small_run import (
    AT_THE_END,
    Numbered,
    manifests_of,
    small_model,
    small_optimizer,
    smooth_model,
    squared_error,
)
from tests.support.twins import assert_same_run, read_checkpoint


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state in singletons; each test begins and leaves without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def with_outputs(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets, _ = batch
    prediction = model(inputs).squeeze(1)
    return nn.functional.mse_loss(prediction, targets), prediction, targets


def config(run_dir: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {"epochs": 2, "cpu": True, "log_every_steps": 1, "checkpoint": AT_THE_END}
    if "gradient_accumulation_steps" not in settings:
        given["global_batch_size"] = 4
    return TrainConfig(run_dir=str(run_dir), **{**given, **settings})


def trainer(run_dir: Path, **settings: Any) -> Trainer:
    """Settings of TrainConfig, and `model`, `loss`, `metrics`, `train_data`, `eval_data`, `collate_fn`."""
    model = settings.pop("model", None) or small_model()
    optimizer, scheduler = small_optimizer(model)
    parts: dict[str, Any] = {"train_data": Numbered(), "loss": squared_error, "scheduler": scheduler}
    names = ("loss", "metrics", "train_data", "eval_data", "collate_fn")
    parts |= {name: settings.pop(name) for name in names if name in settings}
    return Trainer(model, optimizer, config=config(run_dir, **settings), **parts)


def fit(run_dir: Path, **settings: Any) -> TrainResult:
    """As a new process would: Accelerate's singletons are forgotten before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return trainer(run_dir, **settings).fit()


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"TrainConfig.epochs is 0; it must be a whole number of at least 1\."),
        ({"epochs": 1.5}, r"TrainConfig.epochs is 1.5"),
        ({"global_batch_size": -4}, r"TrainConfig.global_batch_size is -4"),
        ({"micro_batch_size": "2"}, r"TrainConfig.micro_batch_size is '2'"),
        ({"log_every_steps": 0}, r"TrainConfig.log_every_steps is 0"),
        ({"mixed_precision": "fp8"}, r"TrainConfig.mixed_precision is 'fp8'; give 'no', 'bf16', 'fp16' or 'auto'\."),
        ({"global_batch_size": None}, r"TrainConfig needs global_batch_size, or gradient_accumulation_steps and micro"),
        (
            {"gradient_accumulation_steps": 2, "global_batch_size": 8, "micro_batch_size": 2},
            r"gradient_accumulation_steps goes with micro_batch_size and without global_batch_size\.",
        ),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps goes with micro_batch_size"),
        ({"gradient_accumulation_steps": 0, "micro_batch_size": 2}, r"gradient_accumulation_steps is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)


def test_metrics_without_evaluation_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics \['val_mae'\] are given, but no eval_data to measure them on"):
        trainer(tmp_path, metrics={"val_mae": MAE()})


def test_the_name_val_loss_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The name 'val_loss' is taken"):
        trainer(tmp_path, metrics={"val_loss": MAE()}, eval_data=Numbered(6))


def test_metrics_need_a_loss_function_that_returns_predictions(tmp_path: Path) -> None:
    ready = trainer(tmp_path, metrics={"val_mae": MAE()}, eval_data=Numbered(6), loss=squared_error)
    with pytest.raises(
        ConfigError, match=r"The metrics \['val_mae'\] need predictions: .* \(loss, prediction, target\)"
    ):
        ready.fit()


def test_a_loss_that_is_no_tensor_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="returned a float; it must return the mean loss as a tensor"):
        fit(tmp_path, loss=lambda model, batch: 0.5)


# Training and evaluating


def test_the_result_tells_how_the_run_ended(tmp_path: Path) -> None:
    metrics = {"val_smape": SMAPE(), "val_mae": MAE()}
    policy = CheckpointPolicy(every_epochs=1, monitor="val_mae")
    result = fit(tmp_path, loss=with_outputs, metrics=metrics, eval_data=Numbered(7), checkpoint=policy)
    assert (result.status, result.exit_code, result.global_step, result.epochs_completed) == (StopReason.DONE, 0, 10, 2)
    assert sorted(result.metrics) == ["val_loss", "val_mae", "val_smape"]
    measured = [record["val_mae"] for record in read_metrics(Store(tmp_path)) if record["kind"] == "epoch"]
    assert result.best == min(measured)
    assert result.metrics["val_mae"] == measured[-1]


def test_evaluation_looks_at_every_sample_once_without_training_on_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def recording(model: nn.Module, batch: Any) -> Any:
        if not model.training:
            assert not torch.is_grad_enabled()
            seen.extend(batch[2].tolist())
        return with_outputs(model, batch)

    ready = trainer(tmp_path, loss=recording, metrics={"val_mae": MAE()}, eval_data=Numbered(7), epochs=1)
    result = ready.fit()
    assert seen == list(range(7))
    with torch.no_grad():
        ready.model.eval()
        data = Numbered(7)
        prediction = ready.model(data.inputs).squeeze(1)
    targets = torch.stack([data[index][1] for index in range(7)])
    assert result.metrics["val_mae"] == pytest.approx(float((prediction - targets).abs().mean()), rel=1e-5)
    assert result.metrics["val_loss"] == pytest.approx(float(((prediction - targets) ** 2).mean()), rel=1e-5)


def test_without_evaluation_data_epochs_end_without_metrics(tmp_path: Path) -> None:
    result = fit(tmp_path)
    assert (result.metrics, result.best, result.epochs_completed) == ({}, None, 2)


def test_a_trainer_stopped_in_mid_epoch_goes_on_to_the_same_end(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_data": Numbered(7), "max_grad_norm": 0.1, "loss": with_outputs}
    fit(tmp_path / "twin", **options)
    assert fit(tmp_path / "run", max_steps=7, **options).global_step == 7
    fit(tmp_path / "run", **options)
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_the_scheduler_steps_once_an_update(tmp_path: Path) -> None:
    ready = trainer(tmp_path, micro_batch_size=1, model=smooth_model())
    ready.fit()
    assert ready.scheduler.last_epoch == 10
    rates = [record["lr"] for record in read_metrics(Store(tmp_path)) if record["kind"] == "step"]
    assert rates == [0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.0125, 0.0125, 0.0125, 0.00625]


def test_the_scheduler_waits_for_updates_that_amp_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = trainer(tmp_path, epochs=1)
    updates = iter([True, False, True, False, False])
    step = ready.optimizer.step

    def step_or_skip() -> None:
        skipped = next(updates)
        monkeypatch.setattr(type(ready.accelerator), "optimizer_step_was_skipped", skipped)
        None if skipped else step()

    monkeypatch.setattr(ready.optimizer, "step", step_or_skip)
    result = ready.fit()
    assert (ready.scheduler.last_epoch, result.global_step, result.epochs_completed) == (3, 3, 1)


def test_accumulation_follows_from_the_global_batch(tmp_path: Path) -> None:
    """With and without it the same updates, to the rounding of float32."""
    fit(tmp_path / "one", model=smooth_model(), epochs=1)
    fit(tmp_path / "four", model=smooth_model(), epochs=1, micro_batch_size=1)
    (one, big), (four, small) = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "four")
    assert one.progress.global_step == four.progress.global_step == 5
    for name in [name for name in big if name.startswith("model/")]:
        torch.testing.assert_close(small[name], big[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """After one update Adam's first moment is a tenth of the gradient that it was given."""
    norms = {}
    for limit in (None, 0.01):
        ready = trainer(tmp_path / str(limit), model=smooth_model(), max_grad_norm=limit, max_steps=1)
        ready.fit()
        moments = [state["exp_avg"] for state in ready.optimizer.optimizer.state.values()]
        norms[limit] = 10 * float(torch.stack([moment.norm() for moment in moments]).norm())
    assert norms[None] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_drop_last_leaves_the_short_window_out(tmp_path: Path) -> None:
    kept = fit(tmp_path / "kept", train_data=Numbered(10), model=smooth_model())
    dropped = fit(tmp_path / "dropped", train_data=Numbered(10), model=smooth_model(), drop_last=True)
    assert (kept.global_step, dropped.global_step) == (6, 4)
    assert manifests_of(tmp_path / "dropped")[-1]["settings"]["config"]["data"]["drop_last"] is True


def test_a_run_that_drops_the_last_window_resumes_at_an_epochs_end_without_one_more(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_data": Numbered(10), "drop_last": True, "eval_data": Numbered(4)}
    fit(tmp_path / "twin", **options)
    for steps in (2, 3):
        fit(tmp_path / "run", max_steps=steps, **options)
    fit(tmp_path / "run", **options)
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_a_collate_fn_makes_the_batches_of_training_and_evaluation(tmp_path: Path) -> None:
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([one[0] for one in samples]), "y": torch.stack([one[1] for one in samples])}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch["x"]).squeeze(1), batch["y"])

    result = fit(tmp_path, collate_fn=collate, loss=loss, eval_data=Numbered(5))
    assert result.global_step == 10
    assert result.metrics["val_loss"] > 0


def test_bf16_on_the_cpu_trains_and_resumes_exactly(tmp_path: Path) -> None:
    fit(tmp_path / "twin", mixed_precision="bf16")
    fit(tmp_path / "run", mixed_precision="bf16", max_steps=3)
    fit(tmp_path / "run", mixed_precision="bf16")
    assert_same_run(tmp_path / "twin", tmp_path / "run")
    fit(tmp_path / "plain")
    _, half = read_checkpoint(tmp_path / "twin")
    _, full = read_checkpoint(tmp_path / "plain")
    assert half["model/0.weight"].dtype == torch.float32
    assert not torch.equal(half["model/0.weight"], full["model/0.weight"])


def test_early_stopping_ends_the_run_with_exit_code_0(tmp_path: Path) -> None:
    model = smooth_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    nn.init.zeros_(model[2].weight)  # learns the mean at once, then nothing better comes
    result = fit(
        tmp_path, model=model, eval_data=Numbered(7), epochs=50, early_stopping=EarlyStopping(patience=1, min_delta=0.5)
    )
    assert (result.status, result.exit_code, result.epochs_completed) == (StopReason.EARLY_STOPPED, 0, 2)


def test_the_settings_stand_in_every_manifest(tmp_path: Path) -> None:
    fit(tmp_path, seed=11, max_steps=1, early_stopping=EarlyStopping(patience=4))
    settings = manifests_of(tmp_path)[0]["settings"]["config"]
    assert settings["user"]["seed"] == settings["data"]["seed"] == 11
    assert settings["user"]["early_stopping"]["patience"] == 4
    json.dumps(settings)


# gradient_accumulation_steps


def test_gradient_accumulation_steps_fix_the_global_batch_at_the_first_start(tmp_path: Path) -> None:
    ready = trainer(tmp_path, gradient_accumulation_steps=3, micro_batch_size=2)
    assert ready.train_loader.batch_sampler.global_batch_size == 6  # type: ignore[union-attr]
    ready.fit()
    assert manifests_of(tmp_path)[-1]["settings"]["config"]["data"]["global_batch_size"] == 6


def test_the_global_batch_is_kept_at_another_world_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, gradient_accumulation_steps=3, micro_batch_size=2, max_steps=1)
    ready = trainer(tmp_path, gradient_accumulation_steps=3, micro_batch_size=2)
    monkeypatch.setattr(type(ready.accelerator), "num_processes", 4)
    assert ready._global_batch_size() == 6


def test_the_global_batch_of_a_read_only_parent_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session with another number of GPUs goes on from the attached output of the last one."""
    fit(tmp_path / "earlier", gradient_accumulation_steps=3, micro_batch_size=2, max_steps=1)
    search = (str(tmp_path / "earl*"),)
    ready = trainer(tmp_path / "now", gradient_accumulation_steps=3, micro_batch_size=2, search=search)
    monkeypatch.setattr(type(ready.accelerator), "num_processes", 4)
    assert ready._global_batch_size() == 6


def test_other_accumulation_asked_for_now_wins(tmp_path: Path) -> None:
    fit(tmp_path, gradient_accumulation_steps=3, micro_batch_size=2, max_steps=1)
    asked = trainer(tmp_path, gradient_accumulation_steps=3, micro_batch_size=2)
    recorded = trainer_module._recorded_batch_size
    assert recorded(asked.config, {"gradient_accumulation_steps": 3, "micro_batch_size": 2}) == 6
    assert recorded(asked.config, {"gradient_accumulation_steps": 4, "micro_batch_size": 2}) is None
    assert recorded(asked.config, {"gradient_accumulation_steps": 3, "micro_batch_size": 1}) is None
    elsewhere = replace(asked.config, run_dir=str(tmp_path / "elsewhere"))
    assert recorded(elsewhere, {"gradient_accumulation_steps": 3, "micro_batch_size": 2}) is None


def test_a_global_batch_recorded_by_another_way_of_asking_is_not_taken_over(tmp_path: Path) -> None:
    fit(tmp_path, global_batch_size=8, micro_batch_size=2, max_steps=1)
    ready = trainer(tmp_path, gradient_accumulation_steps=2, micro_batch_size=2)
    assert ready.train_loader.batch_sampler.global_batch_size == 4  # type: ignore[union-attr]


# What is around the loop


def test_several_processes_without_a_group_are_an_error_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = trainer(tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DisagreementError, match=r"2 processes were launched .* rank 1 has no process group"):
        ready.fit()
    assert not (tmp_path / "run").exists()


def test_seed_everything_seeds_the_three_generators() -> None:
    draws = []
    for _ in range(2):
        seed_everything(2**40 + 3)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    seed_everything(4)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) != draws[0]


def test_deterministic_algorithms_are_turned_on_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        trainer(tmp_path, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    with pytest.warns(UserWarning, match="no supported trackers"), pytest.raises(ConfigError, match="not installed"):
        trainer(tmp_path, log_with="tensorboard")


def test_trackers_are_finished_once_the_end_is_saved_and_the_process_group_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's end_training() destroys the group by which several ranks agree on the end."""
    told: list[str] = []

    class Told(GeneralTracker):
        name, requires_logging_directory, tracker = "told", False, None

        def log(self, values: dict[str, Any], step: int | None = None, **others: Any) -> None:
            told.append(f"step {step}")

        def finish(self) -> None:
            told.append(json.loads((tmp_path / "status.json").read_text())["status"])

    ready = trainer(tmp_path, max_steps=2)
    ready.accelerator.log_with = [Told()]
    monkeypatch.setattr(ready.accelerator.state, "destroy_process_group", lambda: told.append("destroyed"))
    ready.fit()
    assert told == ["step 1", "step 2", "done"]


def test_an_optimizer_that_wants_a_closure_is_refused_at_once(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    config = TrainConfig(run_dir=str(tmp_path / "run"), epochs=1, global_batch_size=4, cpu=True)
    with pytest.raises(ConfigError, match="LBFGS evaluates the loss several times an update, by a closure"):
        Trainer(model, torch.optim.LBFGS(model.parameters()), train_data=[1], loss=lambda m, b: m(b), config=config)
