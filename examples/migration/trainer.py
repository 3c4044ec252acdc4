"""The old script's model in the Trainer: the loop, the saving and the resuming are no longer yours to write.

New here: a run that begins with an imported file. Once, in a shell:

    dist-train import models/checkpoint_ultra_latest.pth --run runs/ultra

    python examples/migration/trainer.py --run-dir runs/ultra --epochs 6
"""

import argparse
import sys

import torch
from old_script import batches, build
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dist_train as dt


def data_of(epoch: int) -> TensorDataset:
    """Return what the old script generates for an epoch, as a dataset."""
    pairs = list(batches(epoch))
    return TensorDataset(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))


def loss_fn(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean loss, prediction, target)."""
    prediction = model(batch[0])
    return nn.functional.mse_loss(prediction, batch[1]), prediction, batch[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", default="runs/ultra")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    model, optimizer, scheduler = build()
    result = dt.Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        train_data=data_of(0),
        eval_data=data_of(10**6),
        loss=loss_fn,
        metrics={"val_smape": dt.SMAPE()},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=16,
            checkpoint=dt.CheckpointPolicy(every_epochs=1, monitor="val_smape", mode="min"),
        ),
    ).fit()
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
