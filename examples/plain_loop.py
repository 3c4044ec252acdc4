"""A plain PyTorch loop, without Accelerate, over data that it samples by weight.

New here: accumulation without Accelerate (`run.updates_now` says when the optimizer steps), an order of samples of your
own (`order=`: rare classes as often as common ones), early stopping, and a callback with a state that survives a kill.

    python examples/plain_loop.py --run-dir runs/plain
"""

import argparse
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dist_train as dt


def blobs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points [samples, 4] of three classes, of which the third is one in twenty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), samples, replacement=True, generator=generator)
    centres = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    return centres[labels] + 0.7 * torch.randn(samples, 4, generator=generator), labels


class SlowEpochs:
    """A callback: counts the epochs in which the metric did not get better."""

    def __init__(self) -> None:
        self.best, self.count = 0.0, 0

    def __call__(self, now: Any) -> None:
        self.count += now.metrics["val_accuracy"] <= self.best
        self.best = max(self.best, now.metrics["val_accuracy"])

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.count = state["best"], int(state["count"])


def main() -> int:
    """Train; returns the exit code for the shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/plain")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    points, labels = blobs(1200, seed=0)
    shares = Counter(labels.tolist())
    weights = np.array([1 / shares[label] for label in labels.tolist()])

    def balanced(epoch: int) -> np.ndarray:
        """As many samples as there are, each class equally often; a function of the epoch alone."""
        return np.random.default_rng(epoch).choice(len(labels), size=len(labels), p=weights / weights.sum())

    dt.seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=800)
    dataset = torch.utils.data.TensorDataset(points, labels)
    loader = dt.data_loader(dataset, global_batch_size=64, micro_batch_size=16, order=balanced)
    val_points, val_labels = blobs(400, seed=1)

    slow = SlowEpochs()
    policy = dt.CheckpointPolicy(every_steps=25, every_epochs=1, monitor="val_accuracy", mode="max")
    options = dt.RunOptions(early_stopping=dt.EarlyStopping(patience=6))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with dt.Run(args.run_dir, policy=policy, options=options, **parts) as run:
        run.on("epoch_end", slow)
        for _ in run.epochs(args.epochs):
            for inputs, targets in run.batches(loader):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                (loss * run.loss_weight).backward()  # the micro-batch's share of its window of 64
                if run.updates_now:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                run.step(loss=loss)
            with run.evaluation() as trained:
                right = trained(val_points).argmax(1) == val_labels
            run.end_epoch(val_accuracy=float(right.float().mean()))
    print(f"{slow.count} epochs were no better than one before")
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
