"""Models that training changes, or that hold what no state_dict tells of: buffers that come and grow, generators."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.nn.utils import spectral_norm, weight_norm
from torch.optim import lr_scheduler as rates

from tests.support.scripts import WIDTH, Kind, Script, batch, network, simple, train_step


class Changing(nn.Module):
    """A buffer that each forward pass changes, and that the output depends on."""

    def __init__(
        self, make: Callable[[], torch.Tensor | None], change: Callable[[Any, Any], Any], persistent: bool
    ) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 1), change
        self.register_buffer("moving", make(), persistent=persistent)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.moving = self.change(self.moving, values.detach())
        seen = 0.0 if self.moving is None else self.moving.double().sum().float()
        return self.linear(values) * (1 + seen)


def changing(make: Any, change: Any, kept: str, *, persistent: bool = True) -> Kind:
    return Kind(build=simple(lambda: Changing(make, change, persistent)), kept=kept)


class Registering(nn.Module):
    """The first forward pass registers buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", values.detach().mean(0))
            self.register_buffer("spread", values.detach().std(0), persistent=False)
        self.mean = self.mean * 0.9 + values.detach().mean(0)
        self.spread = self.spread * 0.9 + values.detach().std(0)
        return self.linear((values - self.mean) / self.spread)


class Sharing(nn.Module):
    """One buffer under two names, of which no state_dict has the second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 1), nn.Module()
        self.register_buffer("sums", torch.zeros(4))
        self.inner.register_buffer("sums", self.sums, persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.sums += values.mean(0)
        return self.linear(values * self.inner.sums)


class Expanded(nn.Module):
    """Buffers of fewer elements in memory than their shape says, and views that are read otherwise than they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("places", torch.arange(4).expand((1, -1)))
        self.register_buffer("row", torch.zeros(4, 1).expand(4, 3))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.row = (self.row[:, :1] + values.mean()).expand(4, 3)
        return self.linear(values + self.places) * self.row.detach().sum()


class Scalars(nn.Module):
    """Parameters without a dimension and without an element."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 1), nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.zeros(0, 4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values) * self.scale + self.nothing.sum()


class Noisy(nn.Module):
    """It draws from generators that it holds itself, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(4, 1), torch.Generator().manual_seed(3)
        self.others: list[Any] = [np.random.default_rng(3), {"python": random.Random(3)}]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        factor = 1 + self.others[0].random() + self.others[1]["python"].random()
        return self.linear(values + torch.randn(values.shape, generator=self.noise)) * factor


def old_style(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(norm(nn.Linear(4, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, 1))

    return build


def quantization_aware() -> nn.Module:
    """Observers whose buffers get a value for each channel in the first forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.quantization as quantization

        model = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)).train()
        model.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
        return quantization.prepare_qat(model)  # type: ignore[no-any-return]


def diffusion() -> Script:
    """As people train it: times and noise drawn from a generator, a warm-up, a smoothed copy that begins late."""
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 4))
    smooth = copy.deepcopy(model).requires_grad_(False)
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    scheduler = rates.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
    noise = torch.Generator().manual_seed(1)

    def step(update: int) -> torch.Tensor:
        clean = batch(update)
        time = torch.rand(len(clean), 1, generator=noise)
        drawn = torch.randn(clean.shape, generator=noise)
        loss = (model(torch.cat([clean * (1 - time) + drawn * time, time], 1)) - drawn).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        decay = 0.0 if update < 2 else 0.9
        with torch.no_grad():
            for slow, fast in zip(smooth.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        return loss

    registered = {"noise": noise, "smooth": smooth}
    return Script(model=model, optimizer=optimizer, scheduler=scheduler, registered=registered, step=step)


def unequal_gan() -> Script:
    """The critic is trained at each update, the generator at every third."""
    generator = nn.Sequential(nn.Linear(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4))
    critic = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, WIDTH)), nn.Linear(WIDTH, 1))
    optimizers = {
        "generator": optim.Adam(generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
        "critic": optim.RMSprop(critic.parameters(), lr=0.02),
    }

    def step(update: int) -> torch.Tensor:
        fake = generator(torch.randn(8, 3))
        loss = critic(fake.detach()).mean() - critic(batch(update)).mean()
        loss.backward()
        optimizers["critic"].step()
        critic.zero_grad()
        if update % 3 == 2:
            (-critic(fake).mean()).backward()
            optimizers["generator"].step()
        generator.zero_grad()
        critic.zero_grad()
        return loss

    models = {"generator": generator, "critic": critic}
    return Script(model=models, optimizer=optimizers, step=step)


def in_two_optimizers() -> Script:
    model = network()
    optimizers = {
        "often": optim.AdamW(model.parameters(), lr=0.05),
        "seldom": optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    }

    def step(update: int) -> torch.Tensor:
        return train_step(model, optimizers["seldom" if update % 2 else "often"], update)

    return Script(model=model, optimizer=optimizers, step=step)


def accelerated(*, halves: bool, prepared_first: bool = False) -> Callable[[], Script]:
    """Accelerate on one process, by hand: mixed precision, or an optimizer of the model that was prepared."""

    def build() -> Script:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if halves else "no")
        model = network()
        if prepared_first:
            model = accelerator.prepare(model)
            optimizer = accelerator.prepare(optim.AdamW(model.parameters(), lr=0.05))
        else:
            model, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=0.05))
        return Script(
            model=model,
            optimizer=optimizer,
            accelerator=accelerator,
            step=lambda update: train_step(model, optimizer, update),
        )

    return build


AS_MADE = "as training has made it; the script constructs what it constructed before"
GENERATORS = "each rank's own; nobody need register them"

CHANGING: dict[str, Kind] = {
    "a diffusion loop": Kind(build=diffusion, kept="weights, the smoothed copy and the noise's generator"),
    "GAN of unequal frequencies": Kind(build=unequal_gan, kept="each optimizer's own count"),
    "parameters in two optimizers": Kind(build=in_two_optimizers, kept="the state of each"),
    "Accelerate, prepared in one call": Kind(build=accelerated(halves=True), kept="as without it"),
    "Accelerate, optimizer of the prepared model": Kind(
        build=accelerated(halves=False, prepared_first=True), kept="as without it"
    ),
    "buffer that grows": changing(
        lambda: torch.zeros(0, 4), lambda b, values: torch.cat([b, values.mean(0, keepdim=True)]), AS_MADE
    ),
    "hidden buffer that grows": changing(
        lambda: torch.zeros(0, 4),
        lambda b, values: torch.cat([b, values.mean(0, keepdim=True)]),
        AS_MADE,
        persistent=False,
    ),
    "buffer of another dtype": changing(lambda: torch.zeros(2), lambda b, values: b.double() + 1, AS_MADE),
    "buffer that is dropped": changing(lambda: torch.zeros(2), lambda b, values: None, AS_MADE),
    "buffers that a forward pass registers": Kind(build=simple(Registering), kept=AS_MADE),
    "buffer under two names": Kind(build=simple(Sharing), kept="one tensor again"),
    "expanded buffers": Kind(build=simple(Expanded), kept="their values"),
    "parameters of no dimension, of no element": Kind(build=simple(Scalars), kept="as any"),
    "quantization-aware training": Kind(build=simple(quantization_aware), kept="weights and what observers have seen"),
    "weight_norm as a hook": Kind(build=simple(old_style(weight_norm)), kept="what is trained, not what is computed"),
    "spectral_norm as a hook": Kind(build=simple(old_style(spectral_norm)), kept="with its vectors"),
    "generators in a module": Kind(build=simple(Noisy), kept=GENERATORS),
}
