"""A model that grows between two starts of its run: another head, an adapter; and a loop of one update an epoch.

Each update's gradient follows from the step and the values alone, so that whatever is not restored shows.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist_train as dt

Optimizer = torch.optim.Optimizer


def network(head: str = "head", width: int = 2, *, adapter: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Module()
    model.body = nn.Linear(3, 4)
    if adapter:
        model.adapter = nn.Linear(4, 4)
    setattr(model, head, nn.Linear(4, width))
    model.register_buffer("seen", torch.zeros(()))
    return model


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def no_scheduler(optimizer: Optimizer) -> Any:
    return ()


def train(
    run_dir: Path,
    model: Any,
    make_optimizer: Callable[[Any], Any] = adam,
    make_scheduler: Callable[[Any], Any] = no_scheduler,
    *,
    steps: int,
    kill_at: int | None = None,
    resume: str = "auto",
    **options: Any,
) -> tuple[Any, Any]:
    """To that many updates; every one is saved.

    Args:
        kill_at: the process dies by SIGKILL in this update, before it is counted.
    """
    optimizer, policy = make_optimizer(model), dt.CheckpointPolicy(every_epochs=1, keep_last=9)
    scheduler = make_scheduler(optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with dt.Run(str(run_dir), **parts, policy=policy, resume=resume, options=dt.RunOptions(**options)) as run:
        for step in run.epochs(steps):
            losses = [(p * (p + step)).sum() for p in model.parameters() if p.requires_grad]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            getattr(model, "seen", torch.zeros(())).add_(1)
            if scheduler:
                scheduler.step()
            if step == kill_at:
                run._checkpointer.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            run.step()
    return model, optimizer


def values(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """All that training has made, by name."""
    found = dict(model.state_dict())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}/{key}"] = torch.as_tensor(value)
    for index, group in enumerate(optimizer.param_groups):
        found[f"group {index}"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
