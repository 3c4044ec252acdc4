"""What scripts hold, under `fully_shard` on forked ranks: the same objects, sharded between model and optimizer.

Each rank trains on batches of its own. `save_all`, `resume_all` and `load_all` run on every rank, over all kinds.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler as rates

import dist_train as dt
from tests.support import kinds_models
from tests.support.kinds_changing import Changing, Noisy, Registering
from tests.support.kinds_models import (
    Ema,
    Float8,
    Recomputing,
    Tied,
    Watching,
    adamw,
    checkpointed,
    partly_frozen,
    spectral_normed,
    weight_normed,
)
from tests.support.kinds_optimizers import (
    Lookahead,
    Sam,
    ScheduleFree,
    SharedCount,
    plain_layers,
    with_closure,
)
from tests.support.kinds_own import Own, Telling, remember
from tests.support.scripts import (
    WIDTH,
    Script,
    batch,
    differences,
    everything,
    loss_of,
    network,
    simple,
    train,
    train_bare,
)

LEFT_AT, UPDATES = 3, 5


def shard(model: nn.Module) -> nn.Module:
    """Layers with weights, then the rest; alone it stays as it is."""
    if dist.is_initialized():
        for part in model.children():
            if any(True for _ in part.parameters()) and not isinstance(part, nn.BatchNorm1d):
                fully_shard(part)
        fully_shard(model)
    return model


def at_once(model: nn.Module) -> nn.Module:
    """Sharded as one: what is tied belongs to one group."""
    return fully_shard(model) if dist.is_initialized() else model


def of(
    make: Callable[[], nn.Module], optimizer: Any = adamw, scheduler: Any = None, **more: Any
) -> Callable[[], Script]:
    return simple(lambda: shard(make()), optimizer, scheduler, **more)


class Small(Tied):
    """Of two rows: on three ranks one has nothing of it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.table, self.body, self.head = nn.Embedding(2, 4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
        self.head.weight = self.table.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table((values > 0).long())).tanh())


def low() -> nn.Module:
    class Casting(nn.Sequential):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return super().forward(values.bfloat16()).float()

    return Casting(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).bfloat16()


def tied_around_body() -> nn.Module:
    model = Tied()
    if dist.is_initialized():
        fully_shard(model.body)
    return at_once(model)


def grow(buffer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.cat([buffer, values.mean(0, keepdim=True)])


def two_models() -> Script:
    models = {"one": shard(network()), "two": shard(plain_layers())}
    optimizers = {name: adamw(model) for name, model in models.items()}

    def step(update: int) -> torch.Tensor:
        loss = torch.zeros(())
        for name, model in models.items():
            loss = loss_of(model, update)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
        return loss

    return Script(model=models, optimizer=optimizers, step=step)


def accumulating() -> Script:
    """Two micro-batches, of which the last one reduces the gradients."""
    model = shard(network())
    optimizer = adamw(model)

    def step(update: int) -> torch.Tensor:
        loss = torch.zeros(())
        for part in range(2):
            if dist.is_initialized():
                model.set_requires_gradient_sync(part == 1)  # type: ignore[operator]
            loss = loss_of(model, 2 * update + part)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizer, step=step)


def noise(script: Script, update: int) -> None:
    for parameter in list(script.model.parameters())[:1]:
        local = parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data
        local.add_(torch.rand((), generator=script.registered["noise"]))


def own_generator(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {"noise": torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)}


class Buffer:
    """A replay buffer, of another length on each rank."""

    def __init__(self) -> None:
        self.items: list[torch.Tensor] = []

    def state_dict(self) -> Any:
        return {"items": self.items}

    def load_state_dict(self, state: Any) -> None:
        self.items = state["items"]


def replaying() -> Script:
    model = shard(plain_layers())
    optimizer, buffer = adamw(model), Buffer()

    def step(update: int) -> torch.Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        buffer.items += [batch(update)[:1]] * (rank + 1)
        loss = model(torch.cat(buffer.items)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Script(model=model, optimizer=optimizer, registered={"buffer": buffer}, each_rank=("buffer",), step=step)


def scaled() -> Script:
    """Skipped on every rank where one overflows, and clipped by the whole norm."""
    return kinds_models.scaled(shard(plain_layers()))


def compiled_layers() -> nn.Module:
    model = network()
    for part in (model[0], model[-1]):
        part.compile(backend="eager")
    return model


def momentum(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.05, momentum=0.9, dampening=0.1)


def ema_step(script: Script, update: int) -> None:
    script.registered["ema"].update(script.model)


SHARDED: dict[str, Callable[[], Script]] = {
    "GradScaler in a plain loop": scaled,
    "torch.compile(model)": simple(lambda: torch.compile(shard(network()), backend="eager"), adamw),  # type: ignore[arg-type,return-value]
    "compiled part": of(compiled_layers),
    "activation checkpointing": of(Recomputing),
    "embedding and head tied, the body sharded by itself": simple(tied_around_body, adamw),
    "fp8 weights": simple(lambda: at_once(Float8()), lambda m: optim.AdamW([m.master], lr=0.05)),
    "AdamW with a tensor rate": of(network, lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(0.05))),
    "SGD without momentum": of(network, lambda m: optim.SGD(m.parameters(), lr=0.05)),
    "Adagrad": of(network, lambda m: optim.Adagrad(m.parameters(), lr=0.05)),
    "weight_norm": of(weight_normed),
    "spectral_norm": of(spectral_normed),
    "buffer that grows": of(lambda: Changing(lambda: torch.zeros(0, 4), grow, True)),
    "buffers that a forward pass registers": of(Registering),
    "generators in a module": of(Noisy),
    "deque in an optimizer": of(network, lambda m: Own(m.parameters(), lambda: deque(maxlen=3), remember)),
    "optimizer that adds to its state_dict": of(network, lambda m: Telling(m.parameters())),
    "AdamW fused": of(network, lambda m: optim.AdamW(m.parameters(), lr=0.05, fused=True)),
    "SGD with momentum": of(network, momentum),
    "schedule-free": of(plain_layers, lambda m: ScheduleFree(m.parameters())),
    "shared counter": of(plain_layers, lambda m: SharedCount(m.parameters())),
    "SAM": with_closure(lambda m: Sam(m.parameters(), optim.SGD, lr=0.05, momentum=0.9), shard),
    "Lookahead": of(plain_layers, lambda m: Lookahead(adamw(m))),
    "several models and optimizers (GAN)": two_models,
    "partly frozen": of(partly_frozen),
    "tied weights": simple(lambda: at_once(Small()), adamw),
    "checkpoint_wrapper": of(checkpointed),
    "bf16 weights": of(low),
    "extra state, hidden and late buffers": of(Watching),
    "accumulation over two micro-batches": accumulating,
    "an average of one's own (EMA)": of(network, registered=lambda m, _: {"ema": Ema(m)}, after=ema_step),
    "torch.Generator": of(network, registered=own_generator, after=noise),
    "state of each rank": replaying,
    "OneCycleLR": of(network, momentum, lambda o: rates.OneCycleLR(o, 0.3, total_steps=9)),
}


def save_all(folder: str) -> dict[str, Any]:
    """Of each kind what this rank ends with: without the library, and left and resumed; and what was left, whole."""
    return {name: save_one(name, Path(folder) / str(index)) for index, name in enumerate(SHARDED)}


def save_one(name: str, run_dir: Path) -> Any:
    """Of one kind, an error as text."""
    return _guarded(_save, name, run_dir)


def _save(name: str, run_dir: Path) -> Any:
    dt.seed_everything(0)
    straight = SHARDED[name]()
    losses = train_bare(straight, range(UPDATES))
    dt.seed_everything(0)
    left = SHARDED[name]()
    train(left, run_dir, LEFT_AT)
    whole = whole_tensors(left)
    dt.seed_everything(1)
    resumed = SHARDED[name]()
    again = train(resumed, run_dir, UPDATES)
    found = differences(everything(straight), everything(resumed))
    found += [] if again == losses[LEFT_AT:] else ["the losses"]
    return {"differences": found, "whole": whole}


def torch_refuses() -> dict[str, str]:
    """What torch says, without the library, of what it cannot do sharded; empty where it can."""
    from tests.support.kinds_torch_refuses import TORCH_REFUSES

    told = {}
    for name, (build, _) in TORCH_REFUSES.items():
        try:
            train_bare(build(), range(1))
            told[name] = ""
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def load_all(folder: str) -> dict[str, Any]:
    """Of each kind what this world restores of what two ranks left, whole."""
    return {name: _guarded(_load, name, Path(folder) / str(index)) for index, name in enumerate(SHARDED)}


def _load(name: str, run_dir: Path) -> Any:
    dt.seed_everything(2)
    script = SHARDED[name]()
    parts = {"model": script.model, "optimizer": script.optimizer, "scheduler": script.scheduler}
    policy = dt.CheckpointPolicy(at_end=False)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    left = f"{run_dir}/checkpoints/step-{LEFT_AT:08d}"
    with dt.Run(f"{run_dir}-{world_size}", **parts, policy=policy, resume=left) as run:
        for key, one in script.registered.items():
            run.register(key, one, each_rank=key in script.each_rank)
        for _ in run.epochs(0):
            pass
    return {"whole": whole_tensors(script)}


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        return {"error": traceback.format_exc()}


def whole_tensors(script: Script) -> dict[str, Any]:
    """name -> dtype and bytes, of models, optimizers and averages, put together from all ranks. Collective."""
    models = script.model if isinstance(script.model, dict) else {"": script.model}
    optimizers = script.optimizer if isinstance(script.optimizer, dict) else {"": script.optimizer}
    found: dict[str, Any] = {}
    for name, model in models.items():
        for part in model.modules():
            if hasattr(part, "reshard"):
                part.reshard()
        found |= {f"{name}/{key}": value for key, value in model.named_parameters(remove_duplicate=False)}
    for name, optimizer in optimizers.items():
        inner = [one for one in vars(optimizer).values() if isinstance(one, optim.Optimizer)]
        for which, one in enumerate([optimizer, *inner]):
            members = [p for group in one.param_groups for p in group["params"]]
            for number, parameter in enumerate(members):
                for key, value in one.state.get(parameter, {}).items():
                    found[f"{name}~{which}/{number}/{key}"] = value
            for key, value in one.param_groups[0].items():
                found[f"{name}~{which}/{key}"] = value
    for key, value in getattr(script.registered.get("ema"), "shadow", {}).items():
        found[f"ema/{key}"] = value
    return {key: _whole(value) for key, value in found.items() if key.rpartition("/")[2] != "params"}


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if isinstance(value, DTensor):
        value = _whole_of(value)
    flat = value.detach().contiguous().reshape(-1)
    return (str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())


def _whole_of(value: DTensor) -> torch.Tensor:
    """Of eight bits as bytes: gloo knows no such floats."""
    if value.dtype.itemsize > 1:
        return value.full_tensor()
    local = value.to_local().detach().view(torch.uint8)
    whole = DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
    return whole.full_tensor().view(value.dtype)
