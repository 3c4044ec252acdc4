"""Live objects -> files -> fresh objects, equal bit for bit; and capture, which changes nothing."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.plan import make_plan
from dist_train.errors import StateMismatchError, UnsaveableStateError
from dist_train.model_state import clean_name
from dist_train.optimizer_state import step_device
from dist_train.rng import capture_rng, restore_rng
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, sample_tensor, write_checkpoint

PERMUTATIONS = list(itertools.permutations(range(4)))


def cycle(live: LiveState, fresh: LiveState, folder: Path, world_size: int = 2) -> dict[str, Any]:
    """Saves `live` as `world_size` equal ranks would and restores it into `fresh`; returns the changed settings."""
    write_checkpoint(folder, [live.capture() for _ in range(world_size)], live.settings)
    manifest, reader = open_checkpoint(folder)
    try:
        return fresh.restore(manifest.state, manifest.settings, reader).changes
    finally:
        reader.close()


def live_state(model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> LiveState:
    return LiveState(
        models={"": model},
        optimizers={} if optimizer is None else {"": optimizer},
        schedulers={} if scheduler is None else {"": scheduler},
    )


def strides_of(tensor: torch.Tensor) -> list[int]:
    """Strides that matter: those of dimensions with more than one element."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1] if tensor.numel() else []


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Bit for bit, types and memory order included."""
    assert type(one) is type(other) or isinstance(one, torch.Tensor), f"{place}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device), place
        assert strides_of(one) == strides_of(other), f"{place}: {one.stride()} and {other.stride()}"
        flat, back = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(flat, back), place
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}/{index}")
    else:
        assert one == other, place


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert_same(dict(one.named_buffers()), dict(other.named_buffers()))


def scramble(model: nn.Module) -> nn.Module:
    """Other values in every parameter and buffer."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if 0 not in tensor.stride() or not tensor.numel():
                tensor.copy_(torch.ones(tensor.shape).to(tensor.dtype))
    return model


class Everything(nn.Module):
    """Parameters and buffers of every kind that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(2, 3, 4, 5)
        for order in PERMUTATIONS:
            name = "order_" + "".join(map(str, order))
            setattr(self, name, nn.Parameter(base.permute(order).clone(memory_format=torch.preserve_format)))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.small = nn.Parameter(torch.randn(5).half())
        self.brainy = nn.Parameter(torch.randn(5).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.no_parameter = None
        for dtype in (torch.bool, torch.int8, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2):
            self.register_buffer(f"buffer_{str(dtype).removeprefix('torch.')}", sample_tensor(dtype, (3, 2)))
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("nan", torch.tensor([float("nan"), float("inf"), -0.0]))
        self.register_buffer("empty_one", torch.empty(0))
        self.register_buffer("empty_two", torch.empty(0))
        self.register_buffer("gaps", torch.arange(12.0).reshape(3, 4)[:, ::2])
        self.register_buffer("wide", torch.randn(3, 1).expand(3, 4))
        self.register_buffer("hidden", torch.randn(4), persistent=False)
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_kind_of_tensor_comes_back_bit_for_bit_with_its_strides(tmp_path: Path, world_size: int) -> None:
    model = Everything()
    fresh = scramble(Everything())
    places = {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()}
    cycle(live_state(model), live_state(fresh), tmp_path, world_size)
    assert_same_model(model, fresh)
    assert {name: tensor.data_ptr() for name, tensor in fresh.state_dict().items()} == places, "not filled in place"
    assert not fresh.frozen.requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.encoder.weight


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model, fresh = Tied(), scramble(Tied())
    live, back = live_state(model, AdamW(model.parameters())), live_state(fresh, AdamW(fresh.parameters()))
    train(model, live.optimizers[""], torch.tensor([[1, 2]]))
    capture = live.capture()
    assert capture.aliases == {"model/decoder.weight": "model/encoder.weight"}
    assert "model/decoder.weight" not in capture.tensors
    cycle(live, back, tmp_path)
    assert_same_model(model, fresh)
    assert fresh.decoder.weight is fresh.encoder.weight
    assert_same_optimizer(live.optimizers[""], back.optimizers[""])


class Counting(nn.Module):
    """State outside of tensors, by torch's own convention."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra",
    [
        {"count": 3, "scale": torch.tensor([1.5])},
        [1, 2],
        7,
        torch.tensor([1, 2, 3]),
    ],
    ids=["dict", "list", "number", "tensor"],
)
def test_extra_state_of_modules_comes_back(tmp_path: Path, extra: Any) -> None:
    model, fresh = nn.Sequential(Counting(extra)), nn.Sequential(Counting(copy.deepcopy(extra)))
    if isinstance(extra, torch.Tensor):
        fresh[0].extra = None
        fresh[0].get_extra_state = lambda: torch.zeros_like(extra)  # a new tensor at each call, as TransformerEngine's
    else:
        fresh[0].extra = None if not isinstance(extra, dict) else {}
    cycle(live_state(model), live_state(fresh), tmp_path)
    assert_same(model[0].extra, fresh[0].extra)


class Compiled(nn.Module):
    """Named as torch.compile names; its import alone takes seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("wrap", [Compiled, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_names_are_those_of_the_innermost_module(tmp_path: Path, wrap: Callable[[nn.Module], Any]) -> None:
    plain, compiled = nn.Sequential(nn.Linear(2, 2)), wrap(nn.Sequential(nn.Linear(2, 2)))
    inner = nn.Sequential(wrap(nn.Linear(2, 2)))
    assert set(live_state(compiled).capture().tensors) == set(live_state(plain).capture().tensors)
    assert set(live_state(inner).capture().tensors) == {"model/0.weight", "model/0.bias"}
    optimizer = AdamW(inner.parameters())
    assert live_state(inner, optimizer).capture().state["optimizer"]["groups"][0]["params"] == ["0.weight", "0.bias"]
    cycle(live_state(inner), live_state(compiled), tmp_path)
    assert torch.equal(inner[0]._orig_mod.weight, compiled._orig_mod[0].weight)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("_orig_mod.0.weight", "0.weight"),
        ("0._orig_mod.weight", "0.weight"),
        ("a._checkpoint_wrapped_module.b._orig_mod.c", "a.b.c"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("a.weight", "a.weight"),
    ],
)
def test_wrappers_leave_no_trace_in_names(raw: str, clean: str) -> None:
    assert clean_name(raw) == clean


def test_several_models_and_optimizers_keep_apart(tmp_path: Path) -> None:
    def build() -> LiveState:
        models = {"gen": nn.Linear(2, 3), "dis": nn.Linear(2, 3)}
        optimizers = {name: AdamW(model.parameters()) for name, model in models.items()}
        for name, model in models.items():
            train(model, optimizers[name], torch.randn(1, 2))
        return LiveState(models=models, optimizers=optimizers)

    live, fresh = build(), build()
    cycle(live, fresh, tmp_path)
    for name in ("gen", "dis"):
        assert_same_model(live.models[name], fresh.models[name])
        assert_same_optimizer(live.optimizers[name], fresh.optimizers[name])


# Optimizers


def train(model: nn.Module, optimizer: Optimizer, batch: torch.Tensor, steps: int = 2) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        output = batch
        for module in model.children() if isinstance(model, Tied) else [model]:
            output = module(output)
        loss = output.float().square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def assert_same_optimizer(one: Optimizer, other: Optimizer) -> None:
    assert_same(one.state_dict(), other.state_dict())


class Net(nn.Module):
    """bfloat16 and float32 parameters, channels_last weights, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.head = nn.Linear(4, 2).bfloat16()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images).mean((2, 3))
        return self.frozen(self.head(features.bfloat16()).float())


IMAGES = torch.arange(2 * 3 * 3 * 3.0).reshape(2, 3, 3, 3).sin()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(model: nn.Module) -> list[nn.Parameter]:
    """Row-major parameters: LBFGS views the others."""
    return [parameter for parameter in trainable(model) if parameter.is_contiguous()]


class KeepsMasterWeights(AdamW):
    """fp32 moments of bfloat16 parameters, which `load_state_dict` would cast down."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for parameter, state in self.state.items():
            state["exp_avg"] = state["exp_avg"].float()
            state["exp_avg_sq"] = (
                state["exp_avg_sq"].float() if parameter.dtype == torch.float32 else state["exp_avg_sq"]
            )
            state["master"] = parameter.detach().float() + 2**-20
        return result


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1),
    "sgd with momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1),
    "adamw": lambda model: AdamW(model.parameters(), amsgrad=True),
    "adamw of two groups": lambda model: AdamW(
        [{"params": model.conv.parameters(), "lr": 0.5, "name": "conv"}, {"params": model.head.parameters()}]
    ),
    "adagrad": lambda model: Adagrad(trainable(model)),
    "lbfgs": lambda model: torch.optim.LBFGS(plain(model), max_iter=3, history_size=4),
    "lbfgs with line search": lambda model: torch.optim.LBFGS(plain(model), max_iter=3, line_search_fn="strong_wolfe"),
    "adamw with a tensor rate": lambda model: AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False),
    "fp32 state": lambda model: KeepsMasterWeights(model.parameters()),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fresh_has_state", [False, True])
def test_optimizers_come_back_bit_for_bit_and_go_on_alike(tmp_path: Path, kind: str, fresh_has_state: bool) -> None:
    model, fresh = Net(), Net()
    optimizer, restored = OPTIMIZERS[kind](model), OPTIMIZERS[kind](fresh)
    live, back = live_state(model, optimizer), live_state(fresh, restored)
    steps = 1 if kind == "fp32 state" else 2  # torch's AdamW itself cannot go on from there
    train(model, optimizer, IMAGES, steps)
    if fresh_has_state:
        train(fresh, restored, IMAGES.flip(0), steps)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(0.5)
        else:
            group["lr"] *= 0.5
    rate = restored.param_groups[0]["lr"]
    changes = cycle(live, back, tmp_path)
    assert changes == {}
    assert_same_model(model, fresh)
    assert_same_optimizer(optimizer, restored)
    if isinstance(rate, torch.Tensor):
        assert restored.param_groups[0]["lr"] is rate, "a captured graph reads the rate through this very tensor"
    if kind != "fp32 state":
        train(model, optimizer, IMAGES)
        train(fresh, restored, IMAGES)
        assert_same_model(model, fresh)
        assert_same_optimizer(optimizer, restored)


def test_a_fresh_optimizer_is_restored_as_fresh(tmp_path: Path) -> None:
    model, fresh = Net(), Net()
    optimizer, restored = AdamW(model.parameters()), AdamW(fresh.parameters())
    train(fresh, restored, IMAGES)
    cycle(live_state(model, optimizer), live_state(fresh, restored), tmp_path)
    assert not restored.state


def test_what_the_user_writes_now_takes_effect_and_is_told(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    live = live_state(model, SGD(model.parameters(), lr=0.1, momentum=0.9))
    back = live_state(fresh, SGD(fresh.parameters(), lr=0.3, momentum=0.9))
    live.optimizers[""].param_groups[0]["lr"] = 0.05
    live.optimizers[""].param_groups[0]["momentum"] = 0.8
    changes = cycle(live, back, tmp_path)
    assert changes == {"optimizer[0].lr": (0.1, 0.3)}
    assert back.optimizers[""].param_groups[0]["lr"] == 0.3
    assert back.optimizers[""].param_groups[0]["momentum"] == 0.8


def test_a_rate_that_became_a_tensor_takes_effect(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    live = live_state(model, AdamW(model.parameters(), lr=0.1))
    back = live_state(fresh, AdamW(fresh.parameters(), lr=torch.tensor(0.2), foreach=False))
    cycle(live, back, tmp_path)
    assert back.optimizers[""].param_groups[0]["lr"] == torch.tensor(0.2)


def test_another_tensor_rate_takes_effect(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    live = live_state(model, AdamW(model.parameters(), lr=torch.tensor(0.1), foreach=False))
    back = live_state(fresh, AdamW(fresh.parameters(), lr=torch.tensor(0.2), foreach=False))
    cycle(live, back, tmp_path)
    assert back.optimizers[""].param_groups[0]["lr"] == torch.tensor(0.2)


def test_state_follows_its_parameter_when_the_order_changes(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, restored = AdamW(model.parameters()), AdamW(reversed(list(fresh.parameters())))
    train(model, optimizer, torch.ones(1, 2))
    try:
        cycle(live_state(model, optimizer), live_state(fresh, restored), tmp_path)
    except StateMismatchError:
        return  # as good: it is told
    for name in ("weight", "bias"):
        one, other = getattr(model, name), getattr(fresh, name)
        assert_same(optimizer.state[one], restored.state[other])


# Schedulers and other objects

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.4, total_steps=20),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=3), LambdaLR(optimizer, lambda step: 0.5**step)], [3]
    ),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "multi step": lambda optimizer: MultiStepLR(optimizer, [2, 4, 4], gamma=0.5),
}


def step_scheduler(scheduler: Any, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        scheduler.optimizer.step()
        scheduler.step(1.0) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_schedulers_come_back_and_go_on_alike(tmp_path: Path, kind: str, steps: int) -> None:
    def build() -> tuple[LiveState, Any]:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.4, momentum=0.9)
        scheduler = SCHEDULERS[kind](optimizer)
        return live_state(model, optimizer, scheduler), scheduler

    (live, scheduler), (back, restored) = build(), build()
    step_scheduler(scheduler, steps)
    assert cycle(live, back, tmp_path) == {}
    assert step_scheduler(scheduler, 8) == step_scheduler(restored, 8)
    assert scheduler.optimizer.param_groups[0]["momentum"] == restored.optimizer.param_groups[0]["momentum"]


def test_a_scheduler_keeps_its_count_and_takes_the_new_hyper_parameters(tmp_path: Path) -> None:
    def build(gamma: float) -> tuple[LiveState, Any]:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=0.4)
        scheduler = MultiStepLR(optimizer, [2, 8], gamma=gamma)
        return live_state(model, optimizer, scheduler), scheduler

    (live, scheduler), (back, restored) = build(0.5), build(0.1)
    step_scheduler(scheduler, 5)
    changes = cycle(live, back, tmp_path)
    assert changes == {"scheduler.gamma": (0.5, 0.1), "optimizer[0].current_lr": (0.2, 0.4 * 0.1)}
    assert (restored.last_epoch, restored.gamma) == (5, 0.1)
    assert step_scheduler(restored, 3)[-1] == 0.4 * 0.1 * 0.1


class Ema:
    def __init__(self, shadow: Any) -> None:
        self.shadow = shadow

    def state_dict(self) -> Any:
        return {"shadow": self.shadow, 1: "x", "numpy": np.arange(3)}

    def load_state_dict(self, state: Any) -> None:
        self.shadow = state["shadow"]


def test_registered_objects_come_back(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    live, back = live_state(model), live_state(fresh)
    live.registered["ema"] = Ema([torch.randn(2, 3).t(), (1, None)])
    back.registered["ema"] = Ema(None)
    cycle(live, back, tmp_path)
    assert_same(live.registered["ema"].shadow, back.registered["ema"].shadow)


def test_a_late_registration_is_restored_by_itself(tmp_path: Path) -> None:
    live, back = live_state(nn.Linear(2, 2)), live_state(nn.Linear(2, 2))
    live.registered["ema"] = Ema(torch.ones(3))
    write_checkpoint(tmp_path, [live.capture()])
    manifest, reader = open_checkpoint(tmp_path)
    back.registered["ema"] = back.registered["other"] = Ema(None)
    back.restore_registered("ema", manifest.state, reader)
    assert torch.equal(back.registered["ema"].shadow, torch.ones(3))
    with pytest.raises(StateMismatchError, match="nothing for the registered 'other'"):
        back.restore_registered("other", manifest.state, reader)
    reader.close()


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    live = live_state(nn.Linear(2, 2))
    live.registered["ema"] = Ema(object())
    with pytest.raises(UnsaveableStateError, match=r"user/ema/shadow holds a builtins\.object"):
        live.capture()
    with pytest.raises(UnsaveableStateError, match=r"Ema is not a torch\.optim\.Optimizer"):
        live_state(nn.Linear(2, 2), Ema(None))


def test_the_scaler_comes_back(tmp_path: Path) -> None:
    def build() -> LiveState:
        model = nn.Linear(2, 2)
        return LiveState(models={"": model}, optimizers={}, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))

    live, back = build(), build()
    live.scaler.scale(torch.ones(1))
    live.scaler.update(4.0)
    cycle(live, back, tmp_path)
    assert back.scaler.state_dict() == live.scaler.state_dict()
    assert back.scaler.get_scale() == 4.0


# Strictness


def mismatch(saved: nn.Module, here: nn.Module, folder: Path) -> str:
    before = copy.deepcopy(here.state_dict())
    with pytest.raises(StateMismatchError) as caught:
        cycle(live_state(saved), live_state(here), folder)
    assert_same(dict(before), dict(here.state_dict()))
    return str(caught.value)


def test_differences_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    wide = mismatch(nn.Linear(2, 2), nn.Linear(2, 3), tmp_path / "1")
    assert "model/weight is [2, 2] torch.float32 in the checkpoint and [3, 2] torch.float32 in the model" in wide
    assert "torch.bfloat16 in the model" in mismatch(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), tmp_path / "2")
    more = mismatch(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), tmp_path / "3")
    assert more == "model/bias is in the checkpoint and not in the model"
    less = mismatch(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), tmp_path / "4")
    assert less == "model/bias is in the model and not in the checkpoint"
    many = mismatch(nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)]), nn.Sequential(), tmp_path / "5")
    assert "and 10 more" in many


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    model, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    live = live_state(model, SGD(model.parameters(), lr=0.1))
    back = live_state(fresh, SGD([{"params": [fresh.weight]}, {"params": [fresh.bias]}], lr=0.1))
    with pytest.raises(StateMismatchError, match=r"the groups hold \[2\] parameters, here \[1, 1\]"):
        cycle(live, back, tmp_path)


# Capture changes nothing


def test_capture_takes_no_step_fires_no_hook_and_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    live = live_state(model, optimizer, LambdaLR(optimizer, lambda step: 1.0))
    fired: list[str] = []
    model.register_forward_hook(lambda *_: fired.append("forward"))
    model.register_forward_pre_hook(lambda *_: fired.append("pre-forward"))
    model.register_full_backward_hook(lambda *_: fired.append("backward"))
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre-step"))
    optimizer.register_step_post_hook(lambda *_: fired.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *_: fired.append("optimizer.state_dict"))
    for name in ("step", "zero_grad", "load_state_dict"):
        monkeypatch.setattr(AdamW, name, lambda *_, name=name: fired.append(name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    generators = [random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()]

    capture = live.capture()

    assert fired == []
    assert not optimizer.state, "a fresh optimizer's state must stay empty"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert versions == [parameter._version for parameter in model.parameters()]
    assert_same(before, dict(model.state_dict()))
    after = [random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()]
    assert generators[:2] == after[:2]
    assert torch.equal(generators[2], after[2])
    assert capture.tensors["model/head.weight"].data_ptr() == model.head.weight.data_ptr(), "copied"


def test_capture_of_a_stepped_optimizer_leaves_it_as_it_was() -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, IMAGES)
    before = copy.deepcopy(optimizer.state_dict())
    live_state(model, optimizer).capture()
    assert_same(before, optimizer.state_dict())


def test_buffers_are_the_main_rank_s(tmp_path: Path) -> None:
    capture = live_state(nn.Sequential(nn.BatchNorm1d(2), Everything())).capture()
    assert "model/0.running_mean" in capture.main_only
    assert "buffer/model/1.hidden" in capture.main_only
    assert "model/0.weight" not in capture.main_only


# Random numbers


def draw() -> list[Any]:
    python, numpy = [random.random(), random.gauss(0, 1)], [np.random.rand(), np.random.randn()]
    return [*python, *numpy, torch.rand(3).tolist(), torch.randn(1)]


@pytest.mark.parametrize("warm_up", [0, 1, 3])
def test_random_numbers_go_on_where_they_were(warm_up: int) -> None:
    """An odd number of gauss draws leaves one cached in python's and numpy's generators."""
    for _ in range(warm_up):
        random.gauss(0, 1), np.random.randn()
    saved = capture_rng()
    expected = draw()
    draw()
    import json

    restore_rng(json.loads(json.dumps(saved)))
    assert_same(expected, draw())


def test_capturing_random_state_draws_nothing() -> None:
    saved = capture_rng()
    assert capture_rng() == saved


def test_manifest_of_a_capture_round_trips(tmp_path: Path) -> None:
    model = Net()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, IMAGES)
    live = live_state(model, optimizer, OneCycleLR(optimizer, 0.1, total_steps=9))
    written = write_checkpoint(tmp_path, [live.capture()], live.settings)
    manifest, reader = open_checkpoint(tmp_path)
    reader.close()
    assert manifest == written
    assert Manifest.from_json(written.to_json()) == written


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(torch.zeros(2, dtype=torch.complex128), id="complex128"),
        pytest.param(torch.empty(2, device="meta"), id="meta"),
    ],
)
def test_an_unsaveable_buffer_is_refused_by_name(value: torch.Tensor) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("odd", value)
    with pytest.raises(UnsaveableStateError, match="model/odd"):
        make_plan(live_state(model).capture(), 0, 1)


def test_a_lazy_module_that_was_never_called_is_refused_by_name() -> None:
    with pytest.raises(UnsaveableStateError, match="model/weight"):
        make_plan(live_state(nn.LazyLinear(2)).capture(), 0, 1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p), "cpu"),
        (lambda p: torch.optim.AdamW(p, foreach=True), "cpu"),
        (lambda p: torch.optim.RMSprop(p), "cpu"),
        (lambda p: torch.optim.SGD(p, momentum=0.9), "cpu"),
        (lambda p: Flagged(p, {"fused": True}), "meta"),
        (lambda p: Flagged(p, {"capturable": True, "fused": None}), "meta"),
        (lambda p: Flagged(p, {"fused": False}), None),
        (lambda p: Flagged(p, {}), None),
    ],
)
def test_a_count_of_steps_lies_where_the_optimizer_of_today_reads_it(make: Any, expected: str | None) -> None:
    """Whatever wrote the checkpoint: a fused one on a GPU, or a plain one. A meta tensor stands for one of a device."""
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = make([parameter])
    found = step_device(optimizer, optimizer.param_groups[0], parameter)
    assert (found.type if found is not None else None) == expected


class Flagged(torch.optim.Optimizer):
    """Not torch's: one without flags of torch's keeps the device that it chose."""

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError
