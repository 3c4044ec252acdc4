"""A script that a drill passes: a plain loop over data_loader, dropout, a schedule, an evaluation."""

import argparse
import sys

import torch
from torch import nn

import dist_train as dt


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", default="runs/sound")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    dt.init_distributed()
    dt.seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
    if torch.distributed.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.7)
    loader = dt.data_loader(data, global_batch_size=4, num_workers=args.workers)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with dt.Run(args.run_dir, policy=dt.CheckpointPolicy(every_steps=3, every_epochs=1), **parts) as run:
        for _ in run.epochs(args.epochs):
            for x, y in run.batches(loader):
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.step(loss=loss)
            with run.evaluation() as trained:
                error = float((trained(inputs) - inputs.sum(1, keepdim=True).sin()).abs().mean())
            run.end_epoch(val_error=error)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
