"""State that moves between devices, kinds of optimizers that keep it on the device or not, and random generators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train as dt
from dist_train.rng import capture_rng, restore_rng
from tests.support.gpu import EACH_DEVICE, on_gpu
from tests.support.on_device import ON_GPU_ALONE, OPTIMIZERS, Net, build_model, loss_fn, make_loader
from tests.support.twins import same_bits

POLICY = dt.CheckpointPolicy(every_steps=1)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def train(
    folder: Path, device: str, kind: str, until: int, before: Any = lambda model, optimizer: None
) -> tuple[Net, torch.optim.Optimizer]:
    """Goes on to a number of updates; `before` is called with what a checkpoint has given back."""
    model = build_model().to(device)
    optimizer = OPTIMIZERS[kind](model.parameters())
    loader = make_loader()
    options = dt.RunOptions(log_every_steps=1, max_steps=until)
    with dt.Run(str(folder), model=model, optimizer=optimizer, loader=loader, policy=POLICY, options=options) as run:
        before(model, optimizer)
        for _ in run.epochs(10):
            for batch in run.batches(loader):
                loss, _, _ = loss_fn(model, batch)
                (loss * run.loss_weight).backward()
                if run.updates_now:
                    optimizer.step()
                    optimizer.zero_grad()
                run.step(loss=loss.detach())
    return model, optimizer


def values_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that was trained, on the CPU."""
    found = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                found[f"{name}/{key}"] = value.detach().cpu().clone()
    return found


def step_device(kind: str, device: str) -> str | None:
    """Where an optimizer that never was in a checkpoint keeps its count of steps."""
    parameter = nn.Parameter(torch.ones(2, device=device))
    optimizer = OPTIMIZERS[kind]([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    step = optimizer.state[parameter].get("step")
    return None if step is None else step.device.type


def pairs() -> list[Any]:
    """(device, kind) that saves and that resumes."""
    found: list[Any] = []
    kinds = ("adamw", "foreach", "fused", "capturable", "fused capturable")
    for here, there in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")):
        for first in kinds:
            for then in kinds:
                on_cpu = [kind for kind, device in ((first, here), (then, there)) if device == "cpu"]
                if ON_GPU_ALONE & set(on_cpu):
                    continue
                values = (here, first, there, then)
                name = "-".join(values).replace(" ", "_")
                is_twin = here == there == "cpu"
                found.append(pytest.param(*values, id=name) if is_twin else on_gpu(*values, id=name))
    for kind in ("amsgrad", "fused sgd"):
        found += [pytest.param("cpu", kind, "cpu", kind, id=f"cpu-{kind}"), on_gpu("cuda", kind, "cuda", kind)]
        found += [on_gpu("cuda", kind, "cpu", kind), on_gpu("cpu", kind, "cuda", kind)]
    return found


@pytest.mark.parametrize(("here", "first", "there", "then"), pairs())
def test_state_goes_on_bit_for_bit_on_another_device_and_in_an_optimizer_of_another_kind(
    here: str, first: str, there: str, then: str, tmp_path: Path
) -> None:
    saved = values_of(*train(tmp_path, here, first, until=3))
    seen = []

    def look(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        restored = values_of(model, optimizer)
        assert restored.keys() == saved.keys()
        assert [name for name in saved if not same_bits(restored[name], saved[name])] == []
        for parameter in model.parameters():
            assert parameter.device.type == there
            for key, value in optimizer.state[parameter].items():
                expected = step_device(then, there) if key == "step" else there
                assert value is None or value.device.type == expected, f"{key} lies on {value.device}"
        seen.append(True)

    model, optimizer = train(tmp_path, there, then, until=5, before=look)
    assert seen
    steps = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert steps in ({5.0}, set())
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("device", EACH_DEVICE)
def test_random_numbers_of_a_device_go_on_where_they_were(device: str) -> None:
    torch.manual_seed(3)
    torch.rand(5, device=device)
    captured = capture_rng()
    assert ("cuda" in captured) == (device == "cuda" or torch.cuda.is_initialized())
    first = [torch.rand(7, device=device).tolist(), torch.randn(3, device=device).tolist()]
    torch.nn.functional.dropout(torch.ones(100, device=device), 0.5)
    restore_rng(captured)
    assert [torch.rand(7, device=device).tolist(), torch.randn(3, device=device).tolist()] == first


@pytest.mark.gpu
def test_a_checkpoint_of_a_cpu_leaves_the_gpus_generator_alone() -> None:
    torch.cuda.init()
    captured = {key: value for key, value in capture_rng().items() if key != "cuda"}
    torch.cuda.manual_seed(11)
    expected = torch.cuda.get_rng_state()
    restore_rng(captured)
    assert torch.equal(torch.cuda.get_rng_state(), expected)


@pytest.mark.parametrize("device", EACH_DEVICE)
def test_dropout_after_a_resume_is_that_of_the_run_that_went_on(device: str, tmp_path: Path) -> None:
    whole = values_of(*train(tmp_path / "whole", device, "adamw", until=5))
    train(tmp_path / "parts", device, "adamw", until=2)
    parts = values_of(*train(tmp_path / "parts", device, "adamw", until=5))
    assert [name for name in whole if not same_bits(whole[name], parts[name])] == []
