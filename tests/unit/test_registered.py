"""run.register: averages of weights, modules that share tensors with a model, and evaluation by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dist_train as dt
from tests.support.own_loaders import BATCH, Augmented, LeaveError


class PlainAverage:
    """An average as people write it: a dict of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.updates = 0

    def update_parameters(self, model: nn.Module) -> None:
        self.updates += 1
        for name, value in model.state_dict().items():
            self.shadow[name] = torch.lerp(self.shadow[name].double(), value.double(), 0.1).to(value.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def averaged_model(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def network() -> nn.Module:
    dt.seed_everything(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))


def train(run_dir: Path, make_average: Any, leave_at: int | None = None) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = make_average(model)
    loader = dt.data_loader(Augmented(), global_batch_size=BATCH)
    try:
        with dt.Run(str(run_dir), model=model, optimizer=optimizer, loader=loader) as run:
            run.register("average", average)
            for _ in run.epochs(2):
                for batch in run.batches(loader):
                    model(batch / 26).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    average.update_parameters(model)
                    run.step()
                    if run.global_step == leave_at:
                        run.save(wait=True)
                        raise LeaveError
    except LeaveError:
        pass
    return average


def flat(state: Any) -> dict[str, torch.Tensor]:
    return state.get("shadow", state)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make_average", [averaged_model, PlainAverage])
def test_an_average_that_was_left_in_mid_epoch_is_that_of_the_run_that_was_not(
    make_average: Any, tmp_path: Path
) -> None:
    straight = train(tmp_path / "straight", make_average)
    train(tmp_path / "left", make_average, leave_at=4)
    resumed = train(tmp_path / "left", make_average)
    for name, value in flat(straight.state_dict()).items():
        assert torch.equal(value, flat(resumed.state_dict())[name]), name


class Tied(nn.Module):
    """Shares the model's first layer, has one of its own, and a buffer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shared, self.own = model[0], nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))


def run_with(run_dir: Path, steps: int) -> tuple[Any, Tied]:
    model: Any = network()
    tied = Tied(model)
    with dt.Run(str(run_dir), model=model) as run:
        run.register("tied", tied)
        for _ in run.epochs(steps):
            with torch.no_grad():
                tied.count += 1
                model[0].weight += 1
                tied.own.weight += 1
            run.step()
    return model, tied


def test_what_a_registered_module_shares_with_the_model_is_stored_once_and_comes_back_shared(tmp_path: Path) -> None:
    run_with(tmp_path, 2)
    manifest = json.loads((tmp_path / "latest/manifest.json").read_text())
    assert manifest["aliases"]["user/tied/shared.weight"] == "model/0.weight"
    assert "user/tied/shared.weight" not in manifest["tensors"]
    assert "user/tied/own.weight" in manifest["tensors"]
    model, tied = run_with(tmp_path, 3)
    straight_model, straight = run_with(tmp_path / "straight", 3)
    assert tied.shared is model[0]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, tied.state_dict()[name]), name
    assert torch.equal(model[0].weight, straight_model[0].weight)


def test_a_registered_module_is_filled_where_it_lies(tmp_path: Path) -> None:
    """Its tensors are the same memory after a resume: whoever holds one of them still does."""
    run_with(tmp_path, 1)
    model: Any = network()
    tied = Tied(model)
    held = tied.own.weight
    before = held.data_ptr()
    with dt.Run(str(tmp_path), model=model) as run:
        run.register("tied", tied)
        assert tied.own.weight is held
        assert held.data_ptr() == before
        assert float(tied.count) == 1


def test_a_registered_module_s_buffers_are_the_main_rank_s(tmp_path: Path) -> None:
    model: Any = network()
    with dt.Run(str(tmp_path), model=model) as run:
        run.register("tied", Tied(model))
        capture = run._live.capture()
    assert "user/tied/count" in capture.main_only
    assert "user/tied/own.weight" not in capture.main_only


def test_evaluation_knows_models_and_registered_modules_by_name(tmp_path: Path) -> None:
    models = {"a": network(), "b": nn.Linear(1, 1)}
    average = averaged_model(models["a"])
    with dt.Run(str(tmp_path), model=models) as run:
        run.register("average", average)
        run.register("numbers", PlainAverage(models["b"]))
        with run.evaluation("average") as smooth:
            assert smooth is average
            assert not smooth.training
            assert not torch.is_grad_enabled()
        assert average.training
        with run.evaluation("b") as one:
            assert one is models["b"]
        with pytest.raises(dt.DistTrainError, match="the names are 'average', 'a', 'b'"):
            run.evaluation("numbers")


def test_an_only_model_needs_no_name_in_evaluation(tmp_path: Path) -> None:
    for number, model in enumerate((network(), {"net": network()})):
        with dt.Run(str(tmp_path / str(number)), model=model) as run:
            for name in (None, ""):
                with run.evaluation(name) as one:
                    assert not one.training
            with pytest.raises(dt.DistTrainError, match=r"there is no such model; the run's only model needs no name"):
                run.evaluation("zzz")
