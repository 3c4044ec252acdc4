"""Optimizers and schedulers with state that torch's `state_dict` does not tell of, or tells as whole objects."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import optim
from torch.optim import Optimizer
from torch.optim import lr_scheduler as rates

from tests.support.scripts import Kind, network, simple


class Own(Optimizer):
    """Plain descent by a factor that comes of an attribute of any kind."""

    def __init__(self, parameters: Any, make: Callable[[], Any], use: Callable[[Any], float]) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.mine, self._use = make(), use

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        factor = self._use(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * factor * parameter.grad


def own(make: Callable[[], Any], use: Callable[[Any], float], kept: str) -> Kind:
    return Kind(build=simple(network, lambda model: Own(model.parameters(), make, use)), kept=kept)


def remember(optimizer: Own) -> float:
    """As gradient clipping by a history."""
    optimizer.mine.append(len(optimizer.mine) + 1.0)
    return 1 + sum(optimizer.mine) / 10


def count(optimizer: Own) -> float:
    optimizer.mine["calls"] += 1
    return 1 + optimizer.mine["calls"] / 10


def tables() -> dict[str, Any]:
    return {"array": np.zeros(2), "kinds": [defaultdict(int), Counter()], "window": deque([1.0], maxlen=2)}


def move_tables(optimizer: Own) -> float:
    optimizer.mine["array"] += 1
    for one in optimizer.mine["kinds"]:
        one["calls"] += 1
    optimizer.mine["window"].append(float(optimizer.mine["array"][0]))
    return 1 + sum(optimizer.mine["window"]) / 10 + optimizer.mine["kinds"][1]["calls"] / 10


class Ledger:
    """An object that only the optimizer's own state_dict tells of."""

    def __init__(self) -> None:
        self.entries = 0


class Telling(optim.SGD):
    """It adds to its state_dict."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.05, momentum=0.9)
        self.ledger = Ledger()

    def step(self, closure: Any = None) -> Any:
        self.ledger.entries += 1
        self.param_groups[0]["weight_decay"] = 0.1 / self.ledger.entries
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "entries": self.ledger.entries, "table": {1: torch.ones(2)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        self.ledger.entries = rest.pop("entries")
        assert torch.equal(rest.pop("table")[1], torch.ones(2))
        super().load_state_dict(rest)


class Gradual(rates.LRScheduler):
    """As people write a warm-up: it holds the scheduler that comes after it, and functions."""

    def __init__(self, optimizer: Any, total: int, after: Any, shape: Callable[[float], float]) -> None:
        self.total, self.after, self.shape, self.finished = total, after, shape, False
        self.beside = [rates.ConstantLR(optimizer, 1.0, 2)]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * self.shape((self.last_epoch + 1) / (self.total + 1)) for base in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        for one in getattr(self, "beside", ()):
            one.step()
        if self.last_epoch >= self.total:
            self.finished = True
            self.after.step()
            self._last_lr = self.after.get_last_lr()
        else:
            super().step(epoch)


def sgd(model: Any) -> Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def by_schedule(make: Callable[[Any], Any], kept: str) -> Kind:
    return Kind(build=simple(network, sgd, make), kept=kept)


ATTRIBUTES = "attributes of a class that is not torch's: tensors, arrays, plain values, and what is made of them"

OWN_OPTIMIZERS: dict[str, Kind] = {
    "deque in an optimizer": own(lambda: deque(maxlen=3), remember, ATTRIBUTES),
    "defaultdict in an optimizer": own(lambda: defaultdict(int), count, ATTRIBUTES),
    "arrays and tables in an optimizer": own(tables, move_tables, ATTRIBUTES),
    "generator in an optimizer": own(
        lambda: torch.Generator().manual_seed(3),
        lambda optimizer: 1 + float(torch.rand((), generator=optimizer.mine)),
        "each rank's own; nobody need register it",
    ),
    "optimizer that adds to its state_dict": Kind(
        build=simple(network, lambda model: Telling(model.parameters())),
        kept="what it adds, given back through its load_state_dict",
    ),
}
OWN_SCHEDULERS: dict[str, Kind] = {
    "one derived that holds others and functions": by_schedule(
        lambda o: Gradual(o, 2, rates.CosineAnnealingLR(o, 6), lambda share: share**2),
        "its fields, and the state of those inside; functions are the script's",
    ),
    "one derived within SequentialLR": by_schedule(
        lambda o: rates.SequentialLR(
            o,
            [Gradual(o, 2, rates.ExponentialLR(o, 0.9), lambda share: share), rates.CosineAnnealingLR(o, 6)],
            [4],
        ),
        "its fields, and the state of those inside; functions are the script's",
    ),
}
