"""Optimizers that scripts hold: torch's own, and such as people write or install."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn, optim
from torch.optim import Optimizer

from tests.support.scripts import Kind, Script, loss_of, network, simple, train_step

STATE = "every tensor and number of its state, dtypes included"


def kind(make: Callable[[nn.Module], Any], kept: str = STATE, **arguments: Any) -> Kind:
    return Kind(build=simple(make_optimizer=make, **arguments), kept=kept)


def own(make: Callable[[Any], Optimizer], kept: str = STATE) -> Kind:
    return kind(lambda model: make(model.parameters()), kept)


def of_torch(name: str, **settings: Any) -> Kind:
    return kind(lambda model: getattr(optim, name)(model.parameters(), **{"lr": 0.05, **settings}))


def plain_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


class Nested(Optimizer):
    """As Shampoo: lists and dictionaries of tensors, the count a Python int, a statistic that is made later."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    sizes = enumerate(parameter.shape)
                    state.update(step=0, momentum=None, shapes=tuple(parameter.shape))
                    state["preconditioners"] = {
                        dim: [torch.eye(size, dtype=torch.float64), None] for dim, size in sizes
                    }
                state["step"] += 1
                update = parameter.grad.double()
                for dim, pair in state["preconditioners"].items():
                    turned = update.movedim(dim, 0).reshape(parameter.shape[dim], -1)
                    pair[0] += turned @ turned.T
                    pair[1] = {"inverse": torch.linalg.inv(pair[0])}
                    update = (pair[1]["inverse"] @ turned).reshape(update.movedim(dim, 0).shape).movedim(0, dim)
                if state["step"] > 1:
                    state["momentum"] = update + 0.9 * (0 if state["momentum"] is None else state["momentum"])
                    update = state["momentum"]
                parameter -= (group["lr"] * update).to(parameter.dtype)


class EightBit(Optimizer):
    """As bitsandbytes: blocks of bytes with a scale each, and one lookup table that all parameters share."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})
        self.table = torch.linspace(-1, 1, 256)
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["codes"] = torch.full([parameter.numel()], 128, dtype=torch.uint8)
                    state["scale"] = torch.ones(())
                    state["table"] = self.table
                    state["paged"] = False
                state["step"] += 1
                momentum = 0.9 * state["table"][state["codes"].long()] * state["scale"] + parameter.grad.reshape(-1)
                state["scale"] = momentum.abs().max().clamp(min=1e-12)
                distance = (momentum / state["scale"]).unsqueeze(1) - state["table"]
                state["codes"].copy_(distance.abs().argmin(1).to(torch.uint8))
                parameter -= group["lr"] * momentum.view_as(parameter)


class SharedCount(Optimizer):
    """One counter for all parameters, in the state of each: only the first one's is moved."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self.state:
            count = torch.zeros(())
            for parameter in members:
                self.state[parameter] = {"count": count}
        self.state[members[0]]["count"] += 1
        for parameter in members:
            parameter -= 0.05 / self.state[parameter]["count"] * parameter.grad


class Global(Optimizer):
    """State that belongs to no parameter, under a word and under a number."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        together, by_number = self.state["global"], self.state[0]
        together["count"] = together.get("count", 0) + 1
        norms = [parameter.grad.norm() for group in self.param_groups for parameter in group["params"]]
        by_number["norm"] = 0.9 * by_number.get("norm", torch.zeros(())) + torch.stack(norms).norm()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] / together["count"] / by_number["norm"] * parameter.grad


class BareState(Optimizer):
    """A parameter's state is a tensor, without a dictionary around it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.state = {}  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self.state.get(parameter, 0) * 0.9 + parameter.grad
                parameter -= group["lr"] * self.state[parameter]


class ScheduleFree(Optimizer):
    """As schedule-free SGD: what counts stands in the group, tensors too, of which some are made later."""

    def __init__(self, parameters: Any, lr: float = 0.05) -> None:
        settings = {
            "lr": lr,
            "k": 0,
            "weight_sum": 0.0,
            "train_mode": True,
            "largest": torch.zeros((), dtype=torch.double),
        }
        super().__init__(parameters, {**settings, "trace": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2 / 3
            total = torch.stack([p.grad.double().abs().sum() for p in group["params"]]).sum()
            group["largest"].copy_(torch.maximum(group["largest"], total / 3))
            group["trace"] = total.float() if group["trace"] is None else group["trace"] * 0.9 + total.float()
            for parameter in group["params"]:
                state = self.state[parameter]
                z = state.setdefault("z", parameter.clone())
                z -= group["lr"] * parameter.grad / (group["largest"] + group["trace"]).float()
                parameter.lerp_(z, 1 / group["k"])


class Sam(Optimizer):
    """As written for sharpness-aware minimization: it holds another optimizer, whose groups are its own."""

    def __init__(self, parameters: Any, make: Callable[..., Optimizer], rho: float = 0.05, **settings: Any) -> None:
        super().__init__(parameters, {"rho": rho, **settings})
        self.base_optimizer = make(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        with torch.enable_grad():
            closure()
        for parameter in members:
            self.state[parameter]["old"] = parameter.clone()
            parameter += self.param_groups[0]["rho"] * parameter.grad
        with torch.enable_grad():
            loss = closure()
        for parameter in members:
            parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()
        return loss


class Lookahead(Optimizer):
    """Slow weights beside another optimizer, which keeps its own groups."""

    def __init__(self, inner: Optimizer, every: int = 2, pull: float = 0.5) -> None:
        members = [parameter for group in inner.param_groups for parameter in group["params"]]
        super().__init__(members, {"lr": 0.0, "every": every, "pull": pull, "count": 0})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for parameter in group["params"]:
            self.state[parameter].setdefault("slow", parameter.clone())
        self.inner.step()
        group["count"] += 1
        if group["count"] % group["every"] == 0:
            for parameter in group["params"]:
                slow = self.state[parameter]["slow"].lerp_(parameter, group["pull"])
                parameter.copy_(slow)


class Averager(Optimizer):
    """It holds one optimizer for each half of the parameters, in a list."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        members = list(parameters)
        super().__init__(members, {"lr": 0.0})
        self.parts = [optim.SGD(members[::2], lr=0.05, momentum=0.9), optim.Adam(members[1::2], lr=0.02)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def with_closure(make: Callable[[nn.Module], Optimizer]) -> Callable[[], Script]:
    """A script whose optimizer evaluates the loss by itself."""

    def build() -> Script:
        model = plain_layers()
        optimizer = make(model)

        def step(update: int) -> Any:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, update)
                loss.backward()
                return loss

            return optimizer.step(closure).detach()

        return Script(model=model, optimizer=optimizer, step=step)

    return build


class TwoHeads(nn.Module):
    """The second head has no gradient before update 4."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1)
        self.both = False

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        features = self.body(values).tanh()
        return self.one(features) + (self.two(features) if self.both else 0)


def late_head() -> Script:
    model = TwoHeads()
    optimizer = optim.AdamW(model.parameters(), lr=0.05)

    def step(update: int) -> torch.Tensor:
        model.both = update >= 4
        return train_step(model, optimizer, update)

    return Script(model=model, optimizer=optimizer, step=step)


def one_for_each_parameter() -> Script:
    """In the backward pass: an optimizer steps as soon as its parameter's gradient is there."""
    model = network()
    optimizers = {name: optim.AdamW([parameter], lr=0.05) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():

        def at_once(ready: torch.Tensor, optimizer: Optimizer = optimizers[name]) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(at_once)

    def step(update: int) -> torch.Tensor:
        loss = loss_of(model, update)
        loss.backward()
        return loss

    return Script(model=model, optimizer=optimizers, step=step)


def of_no_model() -> Script:
    """Temperatures that the loss has, in a module beside the model."""
    model, scales = network(), nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.rand(()))])
    optimizer = optim.AdamW([*model.parameters(), *scales], lr=0.05)

    def step(update: int) -> torch.Tensor:
        loss = loss_of(model, update) * scales[0].exp().sum() + scales[1].square()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizer, registered={"scales": scales}, step=step)


class Rows(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rows = values.mul(7).long().abs() % 9
        return self.head(self.table(rows).mean(1))


def sparse_and_dense() -> Script:
    model = Rows()
    optimizers = {
        "rows": optim.SparseAdam(model.table.parameters(), lr=0.05),
        "rest": optim.AdamW(model.head.parameters(), lr=0.05),
    }

    def step(update: int) -> torch.Tensor:
        loss = loss_of(model, update)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizers, step=step)


def matrices_and_rest() -> Script:
    """Muon takes matrices only."""
    model = plain_layers()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizers = {"matrices": optim.Muon(matrices, lr=0.05), "rest": optim.AdamW(rest, lr=0.05)}

    def step(update: int) -> torch.Tensor:
        loss = loss_of(model, update)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizers, step=step)


def groups(model: nn.Module) -> Optimizer:
    layers = list(model.children())
    given = [
        {"params": list(layers[0].parameters()), "lr": 0.02, "name": "first"},
        {"params": [], "lr": 0.5, "note": ("kept", None)},
        {"params": [p for layer in layers[1:] for p in layer.parameters()], "weight_decay": 0.3},
    ]
    return optim.AdamW(given, lr=0.05)


OPTIMIZERS: dict[str, Kind] = {
    "SGD without momentum": of_torch("SGD"),
    "SGD with momentum": of_torch("SGD", momentum=0.9, dampening=0.1),
    "SGD with Nesterov": of_torch("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": of_torch("Adam"),
    "AdamW foreach": of_torch("AdamW", foreach=True),
    "AdamW fused": of_torch("AdamW", fused=True),
    "AdamW amsgrad": of_torch("AdamW", amsgrad=True),
    "AdamW with a tensor rate": kind(lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(0.05, dtype=torch.double))),
    "Adam with tensor betas": kind(
        lambda m: optim.Adam(m.parameters(), lr=0.05, betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False)
    ),
    "AdamW maximize": of_torch("AdamW", maximize=True, weight_decay=0.1),
    "Adamax": of_torch("Adamax"),
    "RMSprop centered": of_torch("RMSprop", momentum=0.9, centered=True),
    "NAdam": of_torch("NAdam", decoupled_weight_decay=True),
    "RAdam": of_torch("RAdam"),
    "Adagrad": of_torch("Adagrad", lr_decay=0.1, initial_accumulator_value=0.1),
    "Adadelta": of_torch("Adadelta"),
    "Rprop": of_torch("Rprop"),
    "ASGD": of_torch("ASGD", t0=2),
    "Adafactor": of_torch("Adafactor"),
    "SparseAdam": Kind(build=sparse_and_dense, kept=STATE),
    "Muon": Kind(build=matrices_and_rest, kept=STATE),
    "LBFGS": Kind(
        build=with_closure(lambda m: optim.LBFGS(m.parameters(), max_iter=3, history_size=2)),
        kept="its history, lists of tensors and of numbers",
    ),
    "LBFGS with line search": Kind(
        build=with_closure(lambda m: optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe")),
        kept="its history, lists of tensors and of numbers",
    ),
    "Shampoo-like, nested": own(Nested, "lists and dictionaries in a state, whatever their keys"),
    "8-bit blocks": own(EightBit, "bytes, scales and the table, once: it is shared again after a resume"),
    "shared counter": own(SharedCount, "a tensor that several states share is one tensor again"),
    "state of no parameter": own(Global, "state under words and numbers"),
    "state without a dictionary": own(BareState),
    "schedule-free": own(ScheduleFree, "what stands in the groups, tensors among it"),
    "SAM": Kind(
        build=with_closure(lambda m: Sam(m.parameters(), optim.SGD, lr=0.05, momentum=0.9)),
        kept="the state of the optimizer inside, too",
    ),
    "Lookahead": kind(
        lambda m: Lookahead(optim.AdamW(m.parameters(), lr=0.05)),
        "the state and the groups of the optimizer inside, too",
    ),
    "several optimizers inside": own(Averager, "the state of each of them"),
    "state that comes later": Kind(
        build=late_head, kept="of parameters that had a gradient so far; the others start then"
    ),
    "one optimizer for each parameter": Kind(build=one_for_each_parameter, kept="each optimizer under its name"),
    "parameters of no model": Kind(build=of_no_model, kept="their module is registered; state by place in the group"),
    "several groups, one empty": kind(groups, "each group's settings, also of your own"),
    "named parameters": kind(lambda m: optim.AdamW(m.named_parameters(), lr=0.05)),
    "accumulation": kind(lambda m: optim.AdamW(m.parameters(), lr=0.05), windows=2),
}
if not hasattr(optim, "Muon"):  # before torch 2.9
    del OPTIMIZERS["Muon"]
