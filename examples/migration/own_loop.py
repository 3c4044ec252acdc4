"""The old script's loop, crash-proof: what was saving and resuming is gone, the rest stays as it was.

New here: a run that begins with an imported file. The first two lines are for a shell, once:

    dist-train import models/checkpoint_ultra_latest.pth --run runs/ultra
    dist-train export runs/ultra latest --to back.pth        (and back again: the old script resumes from it)

    python examples/migration/own_loop.py --run-dir runs/ultra --epochs 6
"""

import argparse
import sys

from old_script import batches, build, validate
from torch import nn

import dist_train as dt


class Batches:
    """The old script's batches as something to iterate once an epoch: the run finds its place in them again."""

    epoch = 0

    def __iter__(self):
        return batches(self.epoch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", default="runs/ultra")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    model, optimizer, scheduler = build()
    policy = dt.CheckpointPolicy(every_epochs=1, monitor="val_smape", mode="min")
    loader = Batches()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    with dt.Run(args.run_dir, policy=policy, **parts) as run:
        for loader.epoch in run.epochs(args.epochs):
            model.train()
            for x, y in run.batches(loader):
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.step(loss=loss)
            run.end_epoch(val_smape=validate(model))
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main()
