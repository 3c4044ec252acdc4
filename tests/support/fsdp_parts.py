"""What a test asks of ranks with sharded models; each function runs on every rank (see `tests.support.forked`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dist_train as dt
from dist_train.fully_sharded import drop_unreduced_gradients
from dist_train.model_state import clean_name
from dist_train.sharding import make_accelerator
from tests.support.small_run import Numbered, squared_error

TRAINED = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.linear = nn.Linear(7, 7)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.tanh(self.linear(self.norm(inputs)))


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 7), Block(), Block(), nn.Linear(7, 1))


def plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")


def train(run_dir: str, options: dict[str, Any], num_evaluated: int = 7, seed_by_rank: bool = False) -> dict[str, Any]:
    """With the Trainer. What every rank ends with: metrics, the whole weights, and how they are placed."""
    if "hosts" in options:
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // options.pop("hosts"))
    rank = int(os.environ.get("RANK", "0"))
    model: nn.Module = build(rank if seed_by_rank else 0)
    if options.pop("compiled", False):
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    trainer = dt.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        train_data=Numbered(TRAINED),
        eval_data=Numbered(num_evaluated),
        loss=lambda one, batch: (squared_error(one, batch), one(batch[0]).squeeze(1), batch[1]),
        metrics={"val_mae": dt.MAE()},
        config=dt.TrainConfig(
            **{"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2, "cpu": True, **options}, run_dir=run_dir
        ),
    )
    result = trainer.fit()
    parameters = {clean_name(name): one for name, one in trainer.model.named_parameters()}
    return {
        "metrics": result.metrics,
        "step": result.global_step,
        "weights": {name: whole(one).tolist() for name, one in parameters.items()},
        "placements": sorted({str(one.placements) for one in parameters.values() if isinstance(one, DTensor)}),
        "units": [
            name for name, module in trainer.model.named_modules() if hasattr(module, "set_reshard_after_forward")
        ],
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def evaluate(folder: str, num_samples: int, batch_size: int) -> dict[str, Any]:
    """In a loop of its own, by a metric and by hand; then goes on training, saves and looks at names."""
    dt.init_distributed()
    accelerator = make_accelerator(plugin(), cpu=True)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = dt.data_loader(Numbered(TRAINED), global_batch_size=8, micro_batch_size=2)
    evaluated = dt.evaluation_loader(Numbered(num_samples), batch_size=batch_size)
    batches, by_hand, found = 0, torch.zeros(2, dtype=torch.float64), {}
    with dt.Run(folder, accelerator=accelerator, model=model, optimizer=optimizer, loader=loader) as run:
        for _ in run.epochs(1):
            for batch in run.batches(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(squared_error(model, batch) * run.loss_weight)
                    optimizer.step()
                    optimizer.zero_grad()
                run.step()
                if run.global_step == 1 and run.updates_now:
                    with torch.no_grad():
                        model(batch[0])  # a look of the loop's own leaves the root gathered
                    run.save(wait=True)
            metric = dt.MAE()
            with run.evaluation() as inner:
                for inputs, targets, _ in run.batches(evaluated):
                    prediction = inner(inputs).squeeze(1)
                    metric.update(prediction, targets)
                    batches += 1
                    if run.batch_counts:
                        errors = (prediction - targets).abs().double()
                        by_hand += torch.stack([errors.sum(), torch.tensor(float(len(errors)))])
            found["all_sharded"] = all(isinstance(one, DTensor) for one in model.parameters())
            run.end_epoch(val=metric.compute(run.world))
        rows = run.world.gather_floats(by_hand.tolist())
        total, count = (sum(column) for column in zip(*rows, strict=True))
        return {**found, "val": run.metrics["val"], "by_hand": total / count, "count": count, "batches": batches}


def drop_window() -> bool:
    """Whether gradients of a window that was given up are gone from the next one's."""
    dt.init_distributed()
    models = [build(), build()]
    for model in models:
        fully_shard(model)
    given_up, fresh = models
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    given_up.set_requires_gradient_sync(False)  # type: ignore[operator]
    given_up(inputs * 3).square().mean().backward()
    given_up.set_requires_gradient_sync(True)  # type: ignore[operator]
    drop_unreduced_gradients(given_up)
    for model in models:
        model(inputs).square().mean().backward()
    pairs = zip(given_up.parameters(), fresh.parameters(), strict=True)
    return all(torch.equal(whole(one.grad), whole(other.grad)) for one, other in pairs)  # type: ignore[arg-type]


def refused(what: str, folder: str) -> str:
    """The message with which a Run, or a Trainer, is refused."""
    dt.init_distributed()
    try:
        _refused_case(what, folder)
    except dt.DistTrainError as error:
        return str(error)
    return "not refused"


def _refused_case(what: str, folder: str) -> None:
    model = build()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    if what == "ignored plugin":
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin())
        prepared, optimizer = accelerator.prepare(model, optimizer)
        dt.Run(folder, accelerator=accelerator, model=prepared, optimizer=optimizer)
    elif what == "first version":
        make_accelerator(FullyShardedDataParallelPlugin(fsdp_version=1), cpu=True)
    elif what == "mixture":
        fully_shard(model, ignored_params=set(model[3].parameters()))
        dt.Run(folder, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    elif what == "uneven hosts":
        os.environ["LOCAL_WORLD_SIZE"] = "3" if int(os.environ["RANK"]) < 3 else "1"
        train(folder, {"sharding": "hsdp"})
    elif what == "half a batch norm":
        model.append(nn.BatchNorm1d(1))
        options: dict[str, Any] = {"mixed_precision": "bf16", "sharding": "fsdp", "cpu": True}
        config = dt.TrainConfig(run_dir=folder, epochs=1, global_batch_size=8, **options)
        dt.Trainer(model, optimizer, train_data=Numbered(8), loss=squared_error, config=config)
    elif what == "state before the first step":
        config = dt.TrainConfig(run_dir=folder, epochs=1, global_batch_size=8, cpu=True, sharding="fsdp")
        adagrad = torch.optim.Adagrad(model.parameters())
        dt.Trainer(model, adagrad, train_data=Numbered(8), loss=squared_error, config=config)
    else:
        config = dt.TrainConfig(run_dir=folder, epochs=1, global_batch_size=8, cpu=True, sharding="fsdp")
        if what == "sharded already":
            fully_shard(model)
        elif what == "wrapped already":
            model = nn.Sequential(DistributedDataParallel(model))
        elif what == "a scalar":
            model.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
        elif what == "another model's optimizer":
            optimizer = torch.optim.AdamW(build().parameters())
        dt.Trainer(model, optimizer, train_data=Numbered(8), loss=squared_error, config=config)
