"""Train one of the three price models, ULTRA, FAST or BLAZING; the metric is SMAPE (0 to 200 %, lower is better).

New here: a real task on `dt.Trainer`: evaluation with a metric, the best checkpoint kept by it, a schedule, mixed
precision, and data of your own. Without `--data` it trains on a SYNTHETIC sample, made up by data.py; a SMAPE reached
on it says nothing about real products.

    python examples/price_prediction/train.py --preset ultra
    torchrun --nproc-per-node 2 --max-restarts 3 examples/price_prediction/train.py --preset blazing --data train.csv
    accelerate launch examples/price_prediction/train.py --preset fast --mixed-precision fp16

Stop it as you like and run the same command: it continues. `--epochs 25` after 20 adds five. `--resume epoch:10 --lr
5e-5` goes back to the end of epoch 10 and tries another learning rate from there, `--resume best` goes back to the
best; what was newer is kept in checkpoints/abandoned/ (`dist-train ls` lists what there is).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass

import torch
from data import DataError, PriceDataset, Product, read_products, split, synthetic_products
from model import PriceModel, price_loss, warm_up_then_cosine
from torch.optim.lr_scheduler import LambdaLR

import dist_train as dt


@dataclass(frozen=True, slots=True)
class Preset:
    """What distinguishes the three models."""

    epochs: int
    lr: float
    """Peak learning rate of AdamW."""
    accumulation: int
    """Micro-batches in one optimizer update on one process; more processes share them, so results stay the same."""


PRESETS = {
    "ultra": Preset(epochs=20, lr=1e-4, accumulation=4),
    "fast": Preset(epochs=12, lr=2e-4, accumulation=4),
    "blazing": Preset(epochs=10, lr=3e-4, accumulation=8),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is not given comes from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="ultra")
    parser.add_argument("--data", help="CSV file: sample_id,catalog_content,image_link,price; default: SYNTHETIC")
    parser.add_argument("--samples", type=int, default=6000, help="size of the SYNTHETIC sample")
    parser.add_argument("--run-dir", help="default: runs/<preset>")
    parser.add_argument("--resume", default="auto", help="auto, must, never; best, epoch:N, step:N or a path")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--accumulation", type=int, help="micro-batches in an update, over all processes together")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="products in one forward pass")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader worker processes per rank")
    parser.add_argument("--keep-last", type=int, default=3, help="newest checkpoints that stay; the best one stays too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    args.run_dir = args.run_dir or f"runs/{args.preset}"
    args.epochs = preset.epochs if args.epochs is None else args.epochs
    args.lr = preset.lr if args.lr is None else args.lr
    args.accumulation = preset.accumulation if args.accumulation is None else args.accumulation
    return args


def say(text: str) -> None:
    """Print once, not once a rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def load_products(data: str | None, samples: int) -> list[Product]:
    """Return the products of the file, or the SYNTHETIC sample, and say which."""
    if data is None:
        say(f"No --data given: training on {samples} SYNTHETIC products, made up by a generator. Not real prices.")
        return synthetic_products(samples)
    products, report = read_products(data, priced=True)
    say(report.describe())
    return products


def build_trainer(args: argparse.Namespace) -> dt.Trainer:
    """Put data, model, optimizer and schedule together. Raises DataError."""
    train_products, val_products = split(load_products(args.data, args.samples))
    train_set, val_set = PriceDataset(train_products), PriceDataset(val_products)
    global_batch_size = args.micro_batch_size * args.accumulation

    dt.seed_everything(args.seed)
    model = PriceModel(start=train_set.mean_log_price())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    total_updates = args.epochs * math.ceil(len(train_set) / global_batch_size)
    scheduler = LambdaLR(optimizer, warm_up_then_cosine(total_updates))

    return dt.Trainer(
        model,
        optimizer,
        train_data=train_set,
        eval_data=val_set,
        loss=price_loss,
        scheduler=scheduler,
        metrics={"val_smape": dt.SMAPE()},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=global_batch_size,
            micro_batch_size=args.micro_batch_size,
            mixed_precision=args.mixed_precision,
            max_grad_norm=1.0,
            seed=args.seed,
            num_workers=args.workers,
            cpu=args.cpu,
            resume=args.resume,
            checkpoint=dt.CheckpointPolicy(
                every_epochs=1, every="10min", keep_last=args.keep_last, keep_best=1, monitor="val_smape", mode="min"
            ),
        ),
    )


def main() -> int:
    """Train; returns the exit code for the shell."""
    try:
        trainer = build_trainer(parse_args())
    except DataError as error:
        sys.exit(f"error: {error}")
    return trainer.fit().exit_code


if __name__ == "__main__":
    sys.exit(main())
