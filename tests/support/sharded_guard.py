"""Gradients and weights of a `fully_shard`ed model on two ranks: what one of them holds is known to both.

sharded_guard.py FOLDER     writes FOLDER/rank-N.json: what was found
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dist_train as dt
from dist_train.health.nonfinite import GradientGuard, find_not_finite, total_norm
from dist_train.health.policy import HealthPolicy


def build(*, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))  # a bias of one element: rank 1 holds nothing
    if sharded:
        fully_shard(model)
    return model


def backward(model: nn.Module) -> list[Any]:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    model(inputs).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def spoil(tensor: Any, rank: int) -> None:
    """One element that this rank holds."""
    if dist.get_rank() == rank:
        tensor.to_local().view(-1)[-1] = math.nan


def main() -> None:
    dt.init_distributed()
    model, whole = build(sharded=True), build(sharded=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"))
    guard.open()
    found: dict[str, Any] = {}
    gradients = backward(model)
    found["norm"], found["expected"] = float(total_norm(gradients)), float(total_norm(backward(whole)))
    before = [parameter.to_local().clone() for parameter in model.parameters()]  # type: ignore[attr-defined]
    spoil(gradients[0], 1)
    optimizer.step()
    guard.end_window(3)
    found["bad"] = [(bad.window, bad.kind) for bad in guard.find_bad()]
    after = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]
    found["kept"] = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    found["sound"] = find_not_finite({"": model})
    spoil(model[2].weight.detach(), 0)
    found["ruined"] = find_not_finite({"": model})
    (Path(sys.argv[1]) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
