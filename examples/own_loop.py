"""Your own Accelerate loop, made crash-proof.

New here: the loop stays yours. `dt.Run` owns what must survive (epochs, batches, counters, checkpoints), you own the
forward pass, the backward pass and the steps. Two traps it takes care of: BatchNorm statistics, which DDP keeps
different on each rank, and dropout, whose random state must continue exactly where a killed run stood.

The data is generated: Friedman's first regression problem, where 5 of 10 inputs matter. This script prints nothing by
itself; what you see comes from dist_train.

    python examples/own_loop.py --run-dir runs/own
    torchrun --nproc-per-node 2 --max-restarts 3 examples/own_loop.py --cpu
    accelerate launch examples/own_loop.py --mixed-precision bf16
"""

import argparse
import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dist_train as dt


def friedman_data(samples: int, seed: int) -> TensorDataset:
    """Generate `samples` pairs (inputs [10] uniform in 0..1, target, a number of about 0 to 30).

    Source: J. H. Friedman, "Multivariate Adaptive Regression Splines", Annals of Statistics 19 (1991), section 4.3.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(samples, 10, generator=generator)
    noise = torch.randn(samples, generator=generator)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4] + noise
    return TensorDataset(x, y)


def build_model() -> nn.Module:
    """Return a small network with BatchNorm (buffers that differ by rank) and dropout (random state)."""
    return nn.Sequential(
        nn.Linear(10, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 1),
        nn.Flatten(0),
    )


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean squared error over the batch."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs).float(), targets)


def evaluate(run: dt.Run, eval_loader: DataLoader) -> float:
    """Return the mean absolute error over the whole validation set. Collective: all ranks call this."""
    metric = dt.MAE()
    with run.evaluation() as eval_model:  # rank 0's buffers on every rank, eval mode, no gradients
        for inputs, targets in run.batches(eval_loader):
            metric.update(eval_model(inputs).float(), targets)
    return metric.compute(run.world)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/own", help="what survives lives here")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader worker processes per rank")
    return parser.parse_args()


def main() -> int:
    """Train; returns the exit code for the shell."""
    args = parse_args()
    dt.init_distributed()  # before Accelerator(): a process group that survives elastic restarts
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)

    dt.seed_everything(0)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=200, gamma=0.7)  # counts optimizer updates

    loader = dt.data_loader(
        friedman_data(4096, seed=1),
        global_batch_size=128,
        micro_batch_size=32,
        shuffle=True,
        seed=0,
        num_workers=args.workers,
    )
    eval_loader = dt.evaluation_loader(friedman_data(1000, seed=2), batch_size=128)
    model, optimizer = accelerator.prepare(model, optimizer)  # neither the loaders nor the scheduler

    with dt.Run(
        args.run_dir,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        policy=dt.CheckpointPolicy(every_steps=50),
    ) as run:
        for _ in run.epochs(args.epochs):  # from where the checkpoint says; ends on a stop
            for batch in run.batches(loader):  # on the device, from the exact next sample
                with accelerator.accumulate(model):
                    loss = loss_fn(model, batch)
                    accelerator.backward(loss * run.loss_weight)  # weight 1 but for a short last window
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                run.step(loss=loss)
            run.end_epoch(val_mae=evaluate(run, eval_loader))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
