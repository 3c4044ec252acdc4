"""Predict the prices of a test file with a trained run and write a submission: `sample_id,price`.

New here: `dt.load_model`, which finds a checkpoint by name, verifies it and loads only the weights. Every sample_id of
the input comes out exactly once, in input order.

    python examples/price_prediction/data.py --out test.csv --samples 500 --seed 1 --without-price     a SYNTHETIC test
    python examples/price_prediction/predict.py --run runs/ultra --data test.csv --out submission.csv
    python examples/price_prediction/predict.py --run runs/ultra --checkpoint epoch:15 --data test.csv --out fifteen.csv
"""

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from data import DataError, PriceDataset, read_products
from model import PriceModel, to_price
from torch.utils.data import DataLoader

import dist_train as dt


@torch.inference_mode()
def predict_prices(
    model: PriceModel, dataset: PriceDataset, device: torch.device, batch_size: int = 512
) -> list[float]:
    """Return one price per product, in order, each at least 0.01."""
    model.to(device).eval()
    prices: list[float] = []
    for batch in DataLoader(dataset, batch_size=batch_size):
        prices += to_price(model(batch["tokens"].to(device), batch["numbers"].to(device))).tolist()
    return prices


def write_submission(path: str | Path, sample_ids: Sequence[str], prices: Sequence[float]) -> None:
    """Write the file under a temporary name and rename it, so that a half-written submission never exists."""
    temporary = Path(f"{path}.part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "price"])
        writer.writerows([sample_id, f"{price:.2f}"] for sample_id, price in zip(sample_ids, prices, strict=True))
    os.replace(temporary, path)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory of train.py")
    parser.add_argument("--checkpoint", default="best", help="best, latest, epoch:N, step:N or a path")
    parser.add_argument("--data", required=True, help="CSV file: sample_id,catalog_content,image_link")
    parser.add_argument("--out", default="submission.csv")
    return parser.parse_args()


def main() -> int:
    """Predict; returns the exit code for the shell."""
    args = parse_args()
    try:
        products, report = read_products(args.data, priced=False)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(report.describe())
    model = dt.load_model(args.run, args.checkpoint, PriceModel())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prices = predict_prices(model, PriceDataset(products), device)
    write_submission(args.out, [product.sample_id for product in products], prices)
    print(f"{args.out}: {len(prices)} prices from the {args.checkpoint} checkpoint of {args.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
