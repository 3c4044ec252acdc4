"""Your own Accelerate loop with a model that no rank holds whole (FSDP2), made crash-proof.

New here: Accelerate's plugin, made into an Accelerator by `make_accelerator`, which shards on CPUs, too; all else is as
in own_loop.py. Each rank writes its own share of a checkpoint, and any number of ranks reads it: kill the run and
start it again with another `--nproc-per-node`. Each forward pass needs all ranks, so an evaluation has as many
batches on every rank; a rank that has no sample left takes part with one that its metrics leave out.

The data is generated: Friedman's first regression problem, where 5 of 10 inputs matter.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/own_loop_fsdp.py --cpu
    torchrun --nproc-per-node 2 --max-restarts 3 examples/own_loop_fsdp.py --mixed-precision bf16
"""

import argparse
import sys

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from own_loop import friedman_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dist_train as dt
from dist_train.sharding import make_accelerator


class Block(nn.Module):
    """A residual layer: what FSDP2 gathers at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Network(nn.Module):
    """Blocks between two linear layers: inputs [batch, 10] to [batch, 1]."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(10, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return self.outer(x)


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean squared error over the batch."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs).float().flatten(), targets)


def evaluate(run: dt.Run, eval_loader: DataLoader) -> float:
    """Return the mean absolute error over the whole validation set. Collective: all ranks call this."""
    metric = dt.MAE()
    with run.evaluation() as eval_model:
        for inputs, targets in run.batches(eval_loader):
            metric.update(eval_model(inputs).float().flatten(), targets)
    return metric.compute(run.world)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/own-fsdp", help="what survives lives here")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    return parser.parse_args()


def main() -> int:
    """Train; returns the exit code for the shell."""
    args = parse_args()
    dt.init_distributed()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = make_accelerator(plugin, mixed_precision=args.mixed_precision, cpu=args.cpu)

    dt.seed_everything(0)  # the same weights on all ranks, of which each keeps its share
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.7)

    train_set, eval_set = friedman_data(args.samples, seed=1), friedman_data(1001, seed=2)
    loader = dt.data_loader(train_set, global_batch_size=128, micro_batch_size=32, seed=0)
    eval_loader = dt.evaluation_loader(eval_set, batch_size=128)
    model, optimizer = accelerator.prepare(model, optimizer)  # together, and neither the loaders nor the scheduler

    with dt.Run(
        args.run_dir,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        policy=dt.CheckpointPolicy(every_steps=20, every_epochs=1),
    ) as run:
        for _ in run.epochs(args.epochs):
            model.train()
            for batch in run.batches(loader):
                with accelerator.accumulate(model):
                    loss = loss_fn(model, batch)
                    accelerator.backward(loss * run.loss_weight)
                    if accelerator.sync_gradients:
                        run.tell_norm(accelerator.clip_grad_norm_(model.parameters(), 1.0))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                run.step(loss=loss)
            run.end_epoch(val_mae=evaluate(run, eval_loader))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
