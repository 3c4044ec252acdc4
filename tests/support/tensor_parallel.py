"""A model cut by tensor parallelism and FSDP2 on a mesh of any shape, in a loop of its own without Accelerate.

Dropout on what the ranks of a place compute alike, noisy samples, accumulation with a short last window, AdamW with a
warm-up schedule, a metric and a sum by hand in the evaluation.

    tensor_parallel.py --mesh 2x2 --run-dir DIR [--samples DIR] [--epochs N]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_train.trainer import seed_everything
from tests.support.specimen import Augmented, loss_fn, record, warm_up

NUM_SAMPLES = 52
GLOBAL_BATCH = 16
MICRO_BATCH = 4
EPOCHS = 3
EVALUATED = 23
WIDTH = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, WIDTH)
        self.down = nn.Linear(WIDTH, 16)
        self.dropout = nn.Dropout(0.1)
        self.outer = nn.Linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.tanh(self.up(self.norm(inputs))))
        outputs: torch.Tensor = self.outer(inputs + self.dropout(hidden))
        return outputs


def build(mesh: DeviceMesh | None, *, averaged: bool = True) -> nn.Module:
    seed_everything(0)
    model: nn.Module = Net()
    if mesh is None:
        return model
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"]) if averaged and mesh["dp"].size() > 1 else model


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", required=True, help="ranks that take different samples x ranks that share a model")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--samples", default="", help="folder to record consumed samples in, one file a place")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    import dist_train as dt

    dt.init_distributed()
    shape = tuple(map(int, args.mesh.split("x")))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")) if shape != (1, 1) else None
    row, column = (0, 0) if mesh is None else mesh.get_coordinate()
    model = build(mesh)
    if args.samples and column == 0:
        record.install(dt.Run, args.samples)
    torch.manual_seed(100 + row)  # what is dropped differs by place, and is one for its ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    sizes = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH}
    loader = dt.data_loader(Augmented(NUM_SAMPLES), **sizes, seed=7, mesh=mesh)
    evaluated = dt.evaluation_loader(Augmented(EVALUATED, noisy=False), batch_size=4, mesh=mesh)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    policy = dt.CheckpointPolicy(every_steps=1)
    with dt.Run(args.run_dir, policy=policy, options=dt.RunOptions(log_every_steps=1), **parts) as run:
        for _ in run.epochs(args.epochs):
            model.train()
            for batch in run.batches(loader):
                loss, _, _ = loss_fn(model, batch)
                (loss * run.loss_weight).backward()
                if run.updates_now:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                run.step(loss=loss.detach())
            metric, by_hand = dt.MAE(), torch.zeros(2, dtype=torch.float64)
            with run.evaluation() as inner:
                for batch in run.batches(evaluated):
                    _, prediction, target = loss_fn(inner, batch)
                    metric.update(prediction, target)
                    errors = (prediction.double() - target.double()).abs()
                    by_hand += torch.tensor([float(errors.sum()), len(errors)], dtype=torch.float64) * run.batch_counts
            if mesh is not None:
                dist.all_reduce(by_hand)
            run.end_epoch(val=metric.compute(run.world), by_hand=float(by_hand[0] / by_hand[1]), count=by_hand[1])
        note_what_is_alike(Path(args.run_dir), model)
    return run.exit_code


def note_what_is_alike(folder: Path, model: nn.Module) -> None:
    """The random generator's state of each rank, and of plain parameters what each rank holds."""
    mine = {
        "rng": torch.get_rng_state().sum().item(),
        "plain": [float(one.detach().double().sum()) for one in model.parameters() if type(one) is nn.Parameter],
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"end-{rank}.json").write_text(json.dumps(mine))


if __name__ == "__main__":
    sys.exit(main())
