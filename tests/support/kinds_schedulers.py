"""Schedulers that scripts hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import optim
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR, AveragedModel

from tests.support.scripts import Kind, Script, network, simple, train_step


def sgd(model: torch.nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def kind(make: Callable[[Any], Any], kept: str, optimizer: Callable[[torch.nn.Module], Any] = sgd) -> Kind:
    return Kind(build=simple(network, optimizer, make), kept=kept)


COUNTERS = "its counters; what it was constructed with is the script's"


class Warmup:
    """A callable object, with a memory of its own."""

    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return min(1.0, (step + 1) / self.steps)


class Wrapping:
    """As written on top of another one: it warms up, then hands over; it is none of torch's."""

    def __init__(self, after: Any, steps: int) -> None:
        self.after, self.steps, self.count = after, steps, 0
        self.optimizer = after.optimizer
        self.target = [group["lr"] for group in self.optimizer.param_groups]

    def step(self) -> None:
        self.count += 1
        if self.count > self.steps:
            self.after.step()
            return
        for group, rate in zip(self.optimizer.param_groups, self.target, strict=True):
            group["lr"] = rate * self.count / self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "target": self.target, "after": self.after.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.target = state["count"], state["target"]
        self.after.load_state_dict(state["after"])


class OneGroup:
    """It moves the second group of several, and tells nobody which optimizer that is."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self._opt, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        self._opt.param_groups[1]["lr"] *= 0.8

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Cosine(rates.LRScheduler):
    """Derived from torch's, with a field of its own that steps change."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.drift = 1.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.drift *= 0.97
        return [base * self.drift / (1 + self.last_epoch) for base in self.base_lrs]


def two_groups(model: torch.nn.Module) -> optim.Optimizer:
    first, *rest = model.children()
    groups = [{"params": first.parameters(), "lr": 0.2}, {"params": [p for part in rest for p in part.parameters()]}]
    return optim.SGD(groups, lr=0.05, momentum=0.9)


def plateau() -> Script:
    model = network()
    optimizer = sgd(model)
    scheduler = rates.ReduceLROnPlateau(optimizer, patience=0, cooldown=1)

    def step(update: int) -> torch.Tensor:
        loss = train_step(model, optimizer, update)
        scheduler.step([3.0, 3.0, 2.0, 2.0, 2.0, 2.0][update])
        return loss

    return Script(model=model, optimizer=optimizer, scheduler=scheduler, step=step)


def averaging() -> Script:
    """The last updates are averaged at a rate of their own: two schedulers of one optimizer."""
    model = network()
    optimizer = sgd(model)
    average = AveragedModel(model)
    schedulers = {
        "cosine": rates.CosineAnnealingLR(optimizer, 4),
        "swa": SWALR(optimizer, swa_lr=0.02, anneal_epochs=2),
    }

    def step(update: int) -> torch.Tensor:
        loss = train_step(model, optimizer, update)
        if update >= 2:
            average.update_parameters(model)
            schedulers["swa"].step()
        else:
            schedulers["cosine"].step()
        return loss

    return Script(model=model, optimizer=optimizer, scheduler=schedulers, registered={"swa": average}, step=step)


def unequal() -> Script:
    """Two optimizers with a scheduler each, stepped unequally often."""
    model = network()
    first, *rest = model.children()
    optimizers = {"a": sgd(first), "b": optim.AdamW([p for part in rest for p in part.parameters()], lr=0.05)}
    schedulers = {"a": rates.StepLR(optimizers["a"], 2, 0.5), "b": rates.LinearLR(optimizers["b"], 0.2, total_iters=5)}

    def step(update: int) -> torch.Tensor:
        loss = model(torch.ones(8, 4) * update).square().mean()
        loss.backward()
        for name, optimizer in optimizers.items():
            optimizer.step()
            optimizer.zero_grad()
            if name == "a" or update % 2:
                schedulers[name].step()
        return loss

    return Script(model=model, optimizer=optimizers, scheduler=schedulers, step=step)


SCHEDULERS: dict[str, Kind] = {
    "LambdaLR with a lambda": kind(
        lambda o: rates.LambdaLR(o, lambda step: 0.9**step), "its count; a changed lambda is noticed by what it gives"
    ),
    "LambdaLR with an object": kind(lambda o: rates.LambdaLR(o, Warmup(4)), "its count and the object's attributes"),
    "MultiplicativeLR": kind(lambda o: rates.MultiplicativeLR(o, lambda step: 0.9), COUNTERS),
    "MultiStepLR": kind(lambda o: rates.MultiStepLR(o, [1, 4, 4], 0.5), COUNTERS),
    "ExponentialLR": kind(lambda o: rates.ExponentialLR(o, 0.9), COUNTERS),
    "PolynomialLR": kind(lambda o: rates.PolynomialLR(o, 20, 2.0), COUNTERS),
    "CosineAnnealingLR": kind(lambda o: rates.CosineAnnealingLR(o, 4), COUNTERS),
    "CosineAnnealingWarmRestarts": kind(lambda o: rates.CosineAnnealingWarmRestarts(o, 2, 2), COUNTERS),
    "OneCycleLR": kind(lambda o: rates.OneCycleLR(o, 0.3, total_steps=9), "its count; the momentum that it cycles"),
    "OneCycleLR of AdamW": kind(
        lambda o: rates.OneCycleLR(o, 0.1, total_steps=9),
        "its count; the betas that it cycles",
        lambda model: optim.AdamW(model.parameters(), lr=0.05),
    ),
    "CyclicLR": kind(
        lambda o: rates.CyclicLR(o, 0.01, 0.2, step_size_up=2, mode="exp_range", gamma=0.99, cycle_momentum=True),
        "its count; the momentum that it cycles",
    ),
    "CyclicLR with a function": kind(
        lambda o: rates.CyclicLR(o, 0.01, 0.2, step_size_up=2, scale_fn=lambda x: 1 / (1 + x)), "its count"
    ),
    "SequentialLR": kind(
        lambda o: rates.SequentialLR(o, [rates.LinearLR(o, 0.1, total_iters=2), rates.CosineAnnealingLR(o, 6)], [2]),
        "the counters of those inside",
    ),
    "ChainedScheduler": kind(
        lambda o: rates.ChainedScheduler([rates.LinearLR(o, 0.1, total_iters=4), rates.ExponentialLR(o, 0.9)], o),
        "the counters of those inside",
    ),
    "ReduceLROnPlateau": Kind(build=plateau, kept="the best value, bad epochs, cooldown"),
    "SWALR beside another one": Kind(build=averaging, kept="the counters of both, and the average"),
    "two optimizers, two schedulers": Kind(build=unequal, kept="the counters of each"),
    "one that wraps others": kind(lambda o: Wrapping(rates.ExponentialLR(o, 0.7), 2), "what its state_dict returns"),
    "one derived from torch's": kind(Cosine, "its fields, also its own"),
    "one over one group of several": kind(OneGroup, "what its state_dict returns; each group's rate", two_groups),
    "rates of several groups": kind(
        lambda o: rates.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]), COUNTERS, two_groups
    ),
    "rates that are tensors": kind(
        lambda o: rates.CosineAnnealingLR(o, 8),
        COUNTERS,
        lambda model: optim.AdamW(model.parameters(), lr=torch.tensor(0.05)),
    ),
}
