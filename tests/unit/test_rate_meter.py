"""The logged learning rate is the one that the update used, whenever the scheduler is stepped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import dist_train as dt
from dist_train.rate_meter import RateMeter


def train(run_dir: Path, *, epochs: int, where: str, rate: Any = 1.0, prepared: bool = False) -> list[float]:
    """The rates that the updates used."""
    model = nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer: Any = inner
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    accelerator = Accelerator(cpu=True) if prepared else None
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    used = []
    objects: dict[str, Any] = {"accelerator": accelerator, "model": model, "optimizer": optimizer}
    options = dt.RunOptions(log_every_steps=1)
    with dt.Run(str(run_dir), **objects, scheduler=scheduler, options=options) as run:
        for _ in run.epochs(epochs):
            for _ in range(2):
                used.append(float(optimizer.param_groups[0]["lr"]))
                optimizer.step()
                if where == "before run.step":
                    scheduler.step()
                run.step(loss=1.0)
                if where == "after run.step":
                    scheduler.step()
            if where == "each epoch":
                scheduler.step()
    assert not inner._optimizer_step_pre_hooks, "the optimizer is left as it was"
    return used


@pytest.mark.parametrize("where", ["before run.step", "after run.step", "each epoch"])
@pytest.mark.parametrize("kind", ["plain", "tensor", "prepared"])
def test_the_logged_rate_is_the_one_that_the_update_used(where: str, kind: str, tmp_path: Path) -> None:
    options = {"rate": torch.tensor(1.0) if kind == "tensor" else 1.0, "prepared": kind == "prepared"}
    used = train(tmp_path, epochs=2, where=where, **options)
    used += train(tmp_path, epochs=3, where=where, **options)
    logged = [record["lr"] for record in dt.read_metrics(tmp_path) if record["kind"] == "step"]
    assert logged == used
    assert len(set(logged)) == (3 if where == "each epoch" else 6)


def test_without_a_step_of_the_optimizer_it_is_the_rate_that_is_set() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    meter = RateMeter({"": optimizer})
    meter.open()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    assert [meter.of_update(), meter.of_update()] == [0.5, 0.25]
    meter.close()
    assert RateMeter({}).of_update() is None
