"""What comes up in training and no checkpoint can hold: the first save refuses it, with the way out."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from tests.support.kinds_objects import Holder
from tests.support.kinds_refused import Refused
from tests.support.scripts import Script, network, simple, train_step


class Phase(enum.Enum):
    """Of an optimizer, say."""

    WARM_UP = 1


class Marking(Optimizer):
    """It puts a value into the state of each parameter."""

    def __init__(self, parameters: Any, value: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self._make = value

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mark"] = self._make()
                parameter -= group["lr"] * parameter.grad


class Flat(Optimizer):
    """All momenta in one flat tensor, and a view of its part in the state of each parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        members = self.param_groups[0]["params"]
        self.flat = torch.zeros(sum(one.numel() for one in members))
        for one, part in zip(members, self.flat.split([one.numel() for one in members]), strict=True):
            self.state[one]["momentum"] = part.view_as(one)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.flat *= 0.9
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum"] += parameter.grad
            parameter -= 0.05 * self.state[parameter]["momentum"]


def later(make: Callable[[nn.Module], Optimizer], change: Callable[[nn.Module, Any], None]) -> Callable[[], Script]:
    """After the first update the script changes its objects."""

    def build() -> Script:
        model = network()
        optimizer = make(model)

        def step(update: int) -> torch.Tensor:
            loss = train_step(model, optimizer, update)
            change(model, optimizer)
            return loss

        return Script(model=model, optimizer=optimizer, step=step)

    return build


def first_layer(model: nn.Module) -> Optimizer:
    return optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]


def whole(model: nn.Module) -> Optimizer:
    return optim.SGD(model.parameters(), lr=0.1)


def add_head(model: nn.Module, optimizer: Any) -> None:
    model.add_module("head", nn.Linear(1, 1))


def views() -> Any:
    whole = torch.zeros(3)
    return {"all": whole, "rest": whole[1:]}


def holding(make: Callable[[], Any]) -> Callable[[], Script]:
    """A registered object gets such a value by the first update."""

    def after(script: Script, update: int) -> None:
        script.registered["mine"].value = make()

    return simple(registered=lambda *_: {"mine": Holder(0, lambda *_: None)}, after=after)


def loop() -> Any:
    value: dict[str, Any] = {}
    value["me"] = value
    return value


REFUSED_LATER: dict[str, Refused] = {
    "object in an optimizer's state": Refused(
        build=simple(make_optimizer=lambda model: Marking(model.parameters(), lambda: Phase.WARM_UP)),
        says=r"optimizer/0\.weight/mark holds a .*Phase.*\.name or \.value",
        instead="its name or value",
    ),
    "generator in an optimizer's state": Refused(
        build=simple(make_optimizer=lambda model: Marking(model.parameters(), torch.Generator)),
        says=r"optimizer/0\.weight/mark holds a .*Generator",
        instead="an attribute of the optimizer: those are kept",
    ),
    "views of one flat tensor": Refused(
        build=simple(make_optimizer=lambda model: Flat(model.parameters())),
        says=r"optimizer/0\.weight/momentum and optimizer/~own/flat share memory.*make the view of it where it is used",
        instead="the flat tensor alone, and the views made where they are used",
    ),
    "views in a registered object": Refused(
        build=holding(views), says=r"user/mine/value/all and user/mine/value/rest share memory", instead="the whole"
    ),
    "value that holds itself": Refused(
        build=holding(loop),
        says=r"user/mine holds itself.*load_state_dict",
        instead="what points back, set at the load",
    ),
    "parameters made in training": Refused(
        build=later(whole, add_head),
        says=r"added: head\.bias, head\.weight.*then the Run",
        instead="made before the Run",
    ),
    "parameter group added in training": Refused(
        build=later(first_layer, lambda model, o: o.add_param_group({"params": list(model[-1].parameters())})),  # type: ignore[index]
        says="parameter groups were changed.*learning rate of 0",
        instead="every group before the Run, at a rate of 0",
    ),
}
