"""What no checkpoint can hold: each is refused before the first step, with the way out."""

from __future__ import annotations

import enum
from collections import defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn, optim

from tests.support.kinds_objects import Holder
from tests.support.scripts import Script, network, simple


@dataclass(frozen=True, kw_only=True)
class Refused:
    """One thing that a Run refuses."""

    build: Callable[[], Script]
    says: str
    """A pattern of the message: the place, and what to do."""
    instead: str
    """What to do, for people."""


class Mine(torch.Tensor):
    """A subclass that says nothing of what else there is to it."""


class DeepSpeedEngine(nn.Module):
    """Named as DeepSpeed's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1's, which needs a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


class Slow:
    """A wrapper with state that is no optimizer of torch."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer, self.slow = optimizer, [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    def state_dict(self) -> Any:
        return {"slow": self.slow}

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Color(enum.Enum):
    """Of a callback, say."""

    RED = 1


@dataclass
class Settings:
    """Of a callback, say."""

    patience: int = 3


Best = namedtuple("Best", "value step")


def with_buffer(make: Callable[[], torch.Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = network()
        model.register_buffer("odd", make())
        return model

    return build


def of_model(make: Callable[[], nn.Module], says: str, instead: str) -> Refused:
    return Refused(build=simple(make), says=says, instead=instead)


def of_tensor(make: Callable[[], torch.Tensor], says: str, instead: str) -> Refused:
    return of_model(with_buffer(make), f"model/odd .*{says}", instead)


def of_optimizer(make: Callable[[nn.Module], Any], says: str, instead: str) -> Refused:
    return Refused(build=simple(make_optimizer=make), says=says, instead=instead)


def of_object(value: Any, says: str, instead: str) -> Refused:
    build = simple(registered=lambda *_: {"mine": Holder(value, lambda *_: None)})
    return Refused(build=build, says=f"user/mine/value holds a .*{says}", instead=instead)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def group_of_functions(model: nn.Module) -> optim.Optimizer:
    return optim.SGD([{"params": model.parameters(), "decay": lambda step: 0.9**step}], lr=0.1)


def registered_with_accelerate() -> Script:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(network())
    accelerator.register_for_checkpointing(Holder(1, lambda *_: None))
    optimizer = accelerator.prepare(optim.SGD(model.parameters(), lr=0.1))
    return Script(model=model, optimizer=optimizer, accelerator=accelerator, step=lambda update: None)


def stranger(model: nn.Module) -> optim.Optimizer:
    return optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(7))], lr=0.1)


class ZeroRedundancyOptimizer(optim.SGD):
    """Named as torch's, which needs a process group."""


class WithTable(optim.SGD):
    """Of the user's own, with a table that makes what it lacks."""

    table: Any


def with_table(model: nn.Module) -> optim.Optimizer:
    optimizer = WithTable(model.parameters(), lr=0.1)
    optimizer.table = defaultdict(lambda: 3)
    return optimizer


def strange_state(model: nn.Module) -> optim.Optimizer:
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[torch.zeros(7)] = {"momentum": torch.zeros(7)}
    return optimizer


def twice(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"again": optim.Adam(model.parameters())}


REFUSED: dict[str, Refused] = {
    "complex128": of_tensor(
        lambda: torch.zeros(2, dtype=torch.complex128), "view_as_real", "`torch.view_as_real`, complex where it is used"
    ),
    "sparse tensor": of_tensor(lambda: torch.eye(3).to_sparse(), "indices and its values", "its indices and values"),
    "sparse CSR tensor": of_tensor(lambda: torch.eye(3).to_sparse_csr(), "to_dense", "its indices and values"),
    "nested tensor": of_tensor(
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "values.. and offsets",
        "its values and offsets",
    ),
    "quantized tensor": of_tensor(quantized, "model of floats", "train the model of floats, quantize a copy"),
    "meta tensor": of_tensor(lambda: torch.empty(2, device="meta"), "to_empty", "`model.to_empty(device=...)` first"),
    "tensor subclass": of_tensor(
        lambda: torch.zeros(2).as_subclass(Mine), "Mine.*plain tensors", "the plain tensors that it is made of"
    ),
    "lazy module, not called yet": of_model(
        lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)), "no shape yet: call the model", "call it on a batch"
    ),
    "DeepSpeed engine": of_model(
        DeepSpeedEngine, "DeepSpeedEngine.*fsdp_version=2", "FSDP2, or `engine.save_checkpoint`"
    ),
    "FSDP1": of_model(FullyShardedDataParallel, "FSDP1.*fsdp_version=2", "`fsdp_version=2`, or `fully_shard`"),
    "wrapper with state that is no torch optimizer": of_optimizer(
        lambda model: Slow(optim.SGD(model.parameters(), lr=0.1)),
        r"Slow .*optimizer=that\.optimizer.*run\.register",
        "the optimizer inside, and the rest registered; or derive it from `torch.optim.Optimizer`",
    ),
    "ZeroRedundancyOptimizer": of_optimizer(
        lambda model: ZeroRedundancyOptimizer(model.parameters(), lr=0.1),
        r"ZeroRedundancyOptimizer .*fsdp_version=2",
        "FSDP2, or the plain optimizer",
    ),
    "function in a parameter group": of_optimizer(
        group_of_functions, r"optimizer/settings/0/decay .*a name", "a name that tells which function it is"
    ),
    "defaultdict of a lambda in an optimizer": of_optimizer(
        with_table, r"optimizer/~own/table holds a .*dict\(it\)", "`dict(it)`, or a factory such as int"
    ),
    "parameters of nothing that is saved": of_optimizer(
        stranger, r"trains 1 tensors.*run\.register", "register their module"
    ),
    "state of a tensor in no group": of_optimizer(strange_state, r"none of its groups.*lr=0", "a group with `lr=0`"),
    "optimizer given to register": Refused(
        build=simple(registered=twice), says=r"optimizer=\{'main'.*'again'", instead="`optimizer={...}`"
    ),
    "object registered with Accelerate": Refused(
        build=registered_with_accelerate,
        says=r"register_for_checkpointing was given Holder.*run\.register",
        instead="`run.register(name, it)`",
    ),
    "Enum": of_object(Color.RED, r"Color.*\.name or \.value", "its name or value"),
    "dataclass": of_object(Settings(), r"Settings.*asdict", "`dataclasses.asdict`"),
    "namedtuple": of_object(Best(1.0, 2), r"Best.*_asdict", "`tuple(it)` or `it._asdict()`"),
    "defaultdict of a lambda": of_object(defaultdict(lambda: 3), r"defaultdict.*dict\(it\)", "`dict(it)`"),
    "generator inside of a state": of_object(torch.Generator(), r"Generator.*run\.register", "register the generator"),
    "function": of_object(len, "a name", "a name that tells which function it is"),
    "array of objects": of_object(np.array([None]), "ndarray.*fields", "arrays of numbers"),
    "object with a state_dict": of_object(
        optim.SGD([torch.zeros(1)], lr=0.1), r"SGD.*its state_dict\(\)", "its `state_dict()`"
    ),
    "anything else": of_object(object(), r"object.*Leave it out", "plain values"),
}
