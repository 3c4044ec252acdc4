"""Two ranks whose models nothing averages, and those that something does: what the Run says of each.

apart.py FOLDER      writes FOLDER/rank-N.json: the message by model, "" where the Run takes it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel

import dist_train as dt


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def parts(accelerator: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """What the Run is given, by what makes it so."""
    mine = net()
    optimizer = sgd(mine)

    def of(model: nn.Module, **more: Any) -> dict[str, Any]:
        return {"model": model, "optimizer": sgd(model), **more}

    def half_prepared() -> dict[str, Any]:
        one, two = accelerator.prepare(net()), net()
        return {"model": {"g": one, "d": two}, "optimizer": {"g": sgd(one), "d": sgd(two)}}

    def sharded() -> nn.Module:
        model = net()
        fully_shard(model)
        return model

    def tensor_parallel() -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(net(), mesh, {"0": ColwiseParallel()})

    def judge() -> dict[str, Any]:
        one, frozen = accelerator.prepare(net()), net().requires_grad_(False)
        return {"model": {"one": one, "judge": frozen, "average": AveragedModel(net())}, "optimizer": sgd(one)}

    return {
        "bare": lambda: of(mine, accelerator=accelerator),
        "bare without an accelerator": lambda: of(net()),
        "bare without an optimizer": lambda: {"model": net(), "accelerator": accelerator},
        "bare beside a prepared one": lambda: {**half_prepared(), "accelerator": accelerator},
        "what was prepared, by its old name": lambda: (accelerator.prepare(mine), of(mine))[1],
        "its own average": lambda: {**of(mine), "options": dt.RunOptions(own_gradients=True)},
        "prepared": lambda: {
            "model": accelerator.prepare(mine),
            "optimizer": accelerator.prepare(optimizer),
            "accelerator": accelerator,
        },
        "compiled": lambda: of(torch.compile(accelerator.prepare(net())), accelerator=accelerator),
        "inside another module": lambda: of(nn.Sequential(nn.Flatten(), accelerator.prepare(net()))),
        "sharded": lambda: of(sharded()),
        "tensor parallel": lambda: of(tensor_parallel()),
        "frozen, and an average": lambda: {**judge(), "accelerator": accelerator},
    }


def message_of(folder: Path, make: Callable[[], dict[str, Any]]) -> str:
    try:
        with dt.Run(str(folder), **make()):
            return ""
    except dt.DistTrainError as error:
        return str(error)


def main() -> None:
    folder = Path(sys.argv[1])
    dt.init_distributed()
    accelerator = Accelerator(cpu=True)
    told = {name: message_of(folder / name, make) for name, make in parts(accelerator).items()}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
