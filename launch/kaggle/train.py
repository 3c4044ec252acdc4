"""Predict prices on Kaggle: one or two GPUs, a session that ends, a quota. SMAPE is the metric (0 to 200 %).

`notebook.ipynb` starts it. The data are made up here, so that the notebook runs with nothing attached but the library;
put your own in place of `make_products` (and of `PriceModel`): everything below them stays as it is.

    torchrun --nproc-per-node 2 train.py --run-dir runs/price --max-time 11h30m --search '/kaggle/input/*'
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import dist_train as dt

NUM_FEATURES = 24


def make_products(samples: int, seed: int) -> Dataset[tuple[Tensor, ...]]:
    """SYNTHETIC products: features [samples, NUM_FEATURES] and prices [samples], the same on every rank and restart."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(samples, NUM_FEATURES, generator=generator)
    taste = torch.linspace(-1.0, 2.0, NUM_FEATURES)
    noise = 0.1 * torch.randn(samples, generator=generator)
    return TensorDataset(features, torch.exp(0.3 * (features @ taste) + torch.sin(4 * features[:, 0]) + noise))


class PriceModel(nn.Module):
    """Features -> log(1 + price)."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1).float()


def price_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, predicted prices, true prices)."""
    features, prices = batch
    log_price = model(features)
    loss = nn.functional.smooth_l1_loss(log_price, torch.log1p(prices), beta=0.1)
    return loss, torch.expm1(log_price.detach()), prices


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/price", help="the same in every session")
    parser.add_argument("--max-time", help="stop and save by itself before so much of the session is over: 11h30m")
    parser.add_argument("--search", nargs="*", default=(), help="where the output of an earlier session is attached")
    parser.add_argument("--max-bytes", type=int, default=15 * 10**9, help="budget of the run directory")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=20_000, help="size of the SYNTHETIC data")
    parser.add_argument("--batch-size", type=int, default=256, help="global, over all GPUs")
    parser.add_argument("--lr", type=float, default=2e-3)
    return parser.parse_args()


def main() -> int:
    """Train; returns the exit code, which is 0 when the time is over, too."""
    args = parse_args()
    dt.seed_everything(0)
    model = PriceModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    updates = args.epochs * -(-args.samples // args.batch_size)
    result = dt.Trainer(
        model,
        optimizer,
        train_data=make_products(args.samples, seed=1),
        eval_data=make_products(max(args.samples // 10, 1), seed=2),
        loss=price_loss,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=updates),
        metrics={"val_smape": dt.SMAPE()},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=args.batch_size,
            mixed_precision="auto",  # fp16 on a T4 or P100, which have no bf16
            max_grad_norm=1.0,
            max_time=args.max_time,
            search=args.search,
            checkpoint=dt.CheckpointPolicy(
                every_epochs=1,
                every="15min",
                keep_last=3,
                keep_best=1,
                monitor="val_smape",
                mode="min",
                max_bytes=args.max_bytes,
            ),
        ),
    ).fit()
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
