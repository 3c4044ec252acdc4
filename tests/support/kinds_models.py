"""Models that scripts hold, and what they do to them while they train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.support.scripts import WIDTH, Kind, Script, batch, loss_of, network, simple, train_step

WEIGHTS = "parameters and buffers, in their dtype and memory order"


def kind(make: Callable[[], nn.Module], kept: str = WEIGHTS, **arguments: Any) -> Kind:
    return Kind(build=simple(make, **arguments), kept=kept)


def adamw(*models: nn.Module, lr: float = 0.05) -> optim.Optimizer:
    return optim.AdamW([p for model in models for p in model.parameters()], lr=lr)


def gan() -> Script:
    """Two models, two optimizers, two updates a step."""
    models = {"generator": nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), "critic": network()}
    optimizers = {name: adamw(model) for name, model in models.items()}

    def step(update: int) -> torch.Tensor:
        fake = models["generator"](torch.randn(8, 3))
        models["critic"].zero_grad()
        loss = models["critic"](fake.detach()).mean() - models["critic"](batch(update)).mean()
        loss.backward()
        optimizers["critic"].step()
        models["critic"].zero_grad()
        (-models["critic"](fake).mean()).backward()
        optimizers["generator"].step()
        models["generator"].zero_grad()
        return loss

    return Script(model=models, optimizer=optimizers, step=step)


def teacher_and_student() -> Script:
    """The teacher is an average of the student and has no optimizer."""
    student = network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = adamw(student)

    def step(update: int) -> torch.Tensor:
        loss = (student(batch(update)) - teacher(batch(update)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)
        return loss

    return Script(model={"student": student, "teacher": teacher}, optimizer=optimizer, step=step)


class Ema:
    """As people write it: a dictionary of tensors, a decay and a count."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 / (10 + self.updates))

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def partly_frozen() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


def thawing() -> Script:
    """From update 3 on the first layer trains, and the last one does no longer."""
    model = partly_frozen()
    optimizer = adamw(model)

    def step(update: int) -> torch.Tensor:
        if update >= 3:
            model[0].requires_grad_(True)
        model[-1].requires_grad_(update < 4)
        return train_step(model, optimizer, update)

    return Script(model=model, optimizer=optimizer, step=step)


class Tied(nn.Module):
    """The head is the embedding's table."""

    def __init__(self, table: nn.Embedding | None = None) -> None:
        super().__init__()
        self.table = table or nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rows = values.mul(5).long().abs() % 7
        return self.head(self.body(self.table(rows)).tanh())


def tied_across_models() -> Script:
    encoder = Tied()
    decoder = Tied(encoder.table)
    optimizer = optim.AdamW({id(p): p for m in (encoder, decoder) for p in m.parameters()}.values(), lr=0.05)

    def step(update: int) -> torch.Tensor:
        loss = loss_of(encoder, update) + loss_of(decoder, update).sqrt()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Script(model={"encoder": encoder, "decoder": decoder}, optimizer=optimizer, step=step)


def compiled() -> Any:
    return torch.compile(network(), backend="eager")


def compiled_in_place() -> nn.Module:
    model = network()
    model.compile(backend="eager")
    return model


def compiled_part() -> nn.Module:
    model = network()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    return model


def checkpointed() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(4, WIDTH), nn.Dropout(0.2))), nn.Linear(WIDTH, 1))


class Recomputing(nn.Module):
    """Activations of the body are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Linear(1, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, values, use_reentrant=False))


class Images(nn.Module):
    """channels_last."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        images = values.reshape(4, 2, 2, 2).to(memory_format=torch.channels_last)
        return self.layers(images).mean((1, 2, 3))


def scaled(model: nn.Module | None = None) -> Script:
    """fp16 in a plain loop: update 1 overflows and is skipped, and the scale grows at times; gradients are clipped."""
    model = network() if model is None else model
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # type: ignore[attr-defined]

    def step(update: int) -> torch.Tensor:
        loss = loss_of(model, update)
        scaler.scale(loss * (float("inf") if update == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizer, registered={"scaler": scaler}, step=step)


def accelerated() -> Script:
    """Accelerate: bf16, windows of two micro-batches, clipped; its scheduler is not prepared."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = network()
    scheduler_of = adamw(model)
    scheduler = optim.lr_scheduler.CosineAnnealingLR(scheduler_of, 20)
    prepared, optimizer = accelerator.prepare(model, scheduler_of)

    def step(update: int) -> torch.Tensor:
        for part in range(2):
            with accelerator.accumulate(prepared):
                loss = loss_of(prepared, 2 * update + part)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        return loss.detach()

    return Script(model=prepared, optimizer=optimizer, scheduler=scheduler, step=step)


def low_precision(dtype: torch.dtype) -> Callable[[], Script]:
    def build() -> Script:
        model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).to(dtype)
        optimizer = optim.AdamW(model.parameters(), lr=0.05, eps=1e-4)

        def step(update: int) -> torch.Tensor:
            loss = model(batch(update).to(dtype)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return Script(model=model, optimizer=optimizer, step=step)

    return build


FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]


class Float8(nn.Module):
    """Weights in eight bits with a scale, and a master copy that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.master = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Buffer(torch.ones(()))
        for dtype in FLOAT8:
            name = str(dtype).removeprefix("torch.")
            self.register_parameter(name, nn.Parameter(torch.randn(4, 4).exp().to(dtype), requires_grad=False))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.scale.copy_(self.master.detach().abs().max())
        for dtype in FLOAT8:
            low = getattr(self, str(dtype).removeprefix("torch."))
            low.data.copy_((self.master.detach() / self.scale).exp())
        return values @ (
            self.master + sum(getattr(self, str(dtype).removeprefix("torch.")).float() for dtype in FLOAT8)
        )


class Waves(nn.Module):
    """Complex weights, and buffers of numbers that are not floats."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.seen = nn.Buffer(torch.zeros(4, dtype=torch.bool))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.bytes = nn.Buffer(torch.arange(4, dtype=torch.uint8))
        self.phase = nn.Buffer(torch.zeros(2, dtype=torch.complex64))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen |= values[0] > 0
        self.count += 1
        self.bytes += 3
        self.phase += self.weight.detach()[0, :2]
        return (values.to(torch.complex64) @ self.weight).abs() * self.bytes.float() / self.count


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, 1))


def spectral_normed() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, 1))


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 1))


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 1))


def pruned() -> nn.Module:
    model = network()
    prune.random_unstructured(model[0], "weight", amount=0.3)
    return model


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.Linear(WIDTH, 1))
    model(batch(99))
    return model


class Collections(nn.Module):
    """Lists and dictionaries of parameters and modules, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(4), torch.rand(4)])
        self.biases = nn.ParameterDict({"in": torch.zeros(4)})
        self.parts = nn.ModuleDict({"up/down": nn.Linear(4, 4)})
        self.again = self.parts["up/down"]
        self.head = nn.Linear(4, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.parts["up/down"](values * self.scales[0]).tanh() + self.biases["in"]
        return self.head(self.again(values * self.scales[1]))


class Watching(nn.Module):
    """State in get_extra_state, hidden buffers, and one that is made while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.watched: dict[str, Any] = {"calls": 0, "largest": torch.zeros(()), "last": ()}
        self.register_buffer("hidden", torch.zeros(4), persistent=False)
        self.register_buffer("late", None)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.watched["calls"] += 1
        self.watched["largest"] = torch.maximum(self.watched["largest"], values.max())
        self.watched["last"] = (self.watched["calls"], "seen")
        self.hidden = self.hidden * 0.9 + values.mean(0)
        self.late = values.std(0) if self.late is None else self.late * 0.9 + values.std(0)
        return self.linear(values + self.hidden - self.late) / self.watched["largest"]

    def get_extra_state(self) -> dict[str, Any]:
        return self.watched

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.watched = state


class Recurrent(nn.Module):
    """Its weights are kept a second time, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, num_layers=2, dropout=0.1), nn.Linear(3, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(values.reshape(8, 2, 2))[0])


def warmed_up_average(script: Script, update: int) -> None:
    script.registered["ema"].update(script.model)


def averaged_model_step(script: Script, update: int) -> None:
    script.registered["average"].update_parameters(script.model)


def synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network())


MODELS: dict[str, Kind] = {
    "several models and optimizers (GAN)": Kind(build=gan, kept="each under its name"),
    "teacher without an optimizer": Kind(build=teacher_and_student, kept="as any model"),
    "an average of one's own (EMA)": kind(
        network,
        "what its state_dict returns, once it is registered",
        registered=lambda model, _: {"ema": Ema(model)},
        after=warmed_up_average,
    ),
    "AveragedModel of torch": kind(
        network,
        "its tensors, filled in place, and its count, once it is registered",
        registered=lambda model, _: {"average": averaged(model)},
        after=averaged_model_step,
    ),
    "partly frozen": kind(partly_frozen, "frozen weights, too; which are frozen is the script's to say"),
    "frozen and thawed in training": Kind(build=thawing, kept="state of what is frozen goes on when it is thawed"),
    "tied weights": kind(Tied, "once; tied they come back"),
    "weights tied across two models": Kind(build=tied_across_models, kept="tied they come back"),
    "torch.compile(model)": kind(compiled, "as the model that is not compiled: either loads the other"),
    "model.compile()": kind(compiled_in_place, "as the model that is not compiled"),
    "compiled part": kind(compiled_part, "as the part that is not compiled"),
    "checkpoint_wrapper": kind(checkpointed, "as the part that is not wrapped"),
    "activation checkpointing": kind(Recomputing),
    "channels_last": kind(Images),
    "GradScaler in a plain loop": Kind(build=scaled, kept="scale and growth, once it is registered"),
    "Accelerate, bf16, accumulation": Kind(build=accelerated, kept="as without it; its scaler, too"),
    "bf16 weights": Kind(build=low_precision(torch.bfloat16), kept=WEIGHTS),
    "fp16 weights": Kind(build=low_precision(torch.float16), kept=WEIGHTS),
    "fp64 weights": Kind(build=low_precision(torch.float64), kept=WEIGHTS),
    "fp8 weights": kind(Float8, "e4m3fn, e5m2, their fnuz kinds and e8m0fnu"),
    "complex weights, bool and int buffers": kind(Waves),
    "weight_norm": kind(weight_normed, "what is trained, not what is computed of it"),
    "spectral_norm": kind(spectral_normed, "with the vectors of its power iteration"),
    "orthogonal": kind(orthogonal, "with its base"),
    "parametrization of one's own": kind(symmetric, "what is trained, not what is computed of it"),
    "pruned": kind(pruned, "weights and masks"),
    "lazy modules": kind(lazy, "once they have been called on a batch"),
    "SyncBatchNorm": kind(synchronized),
    "lists and dictionaries of parameters, shared modules": kind(Collections, "once, under the first of their names"),
    "extra state, hidden and late buffers": kind(Watching, "get_extra_state; buffers that no state_dict has, too"),
    "recurrent": kind(Recurrent),
    "DataParallel": kind(lambda: nn.DataParallel(network()), "as the model inside"),
    "accumulation over two micro-batches": kind(network, windows=2),
}
