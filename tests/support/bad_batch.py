"""A Trainer whose gradients one sample ruins: on two ranks it lies in the batch of one of them.

bad_batch.py RUN_DIR [--bad INDEX] [--left-out FIRST]     a sample of epoch 1; a window left out from the start
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from torch import nn

import dist_train as dt
from dist_train.intake import Intake
from dist_train.ledger import Skipped

EPOCH = 1
GLOBAL_BATCH = 4


class Numbered(torch.utils.data.Dataset[Any]):
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.inputs[index], self.inputs[index].sum().sin(), index


def leave_out(first: int) -> None:
    """As a run that knew from the start."""
    entry = {"global_step": 0, "kind": "not_finite", "back_to": 0}
    real = Intake.prepare

    def prepare(intake: Intake) -> None:
        intake.ledger.add(Skipped(epoch=EPOCH, first=first, last=first + GLOBAL_BATCH - 1, **entry))  # type: ignore[arg-type]
        real(intake)

    Intake.prepare = prepare  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("--bad", type=int, default=-1)
    parser.add_argument("--left-out", type=int, default=-1)
    parser.add_argument("--sharding", default="none")
    args = parser.parse_args()
    if args.left_out >= 0:
        leave_out(args.left_out)
    dt.seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    def loss(trained: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets, indices = batch
        if trained.training and int(args.bad) in indices.tolist() and optimizer.epoch == EPOCH:
            inputs = inputs * math.nan
        return nn.functional.mse_loss(trained(inputs).squeeze(1), targets)

    def note(happening: Any) -> None:
        optimizer.epoch = happening.run.epoch

    optimizer.epoch = 0  # type: ignore[attr-defined]
    trainer = dt.Trainer(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.7),
        train_data=Numbered(),
        eval_data=Numbered(),
        loss=loss,
        callbacks={"epoch_end": note, "resumed": note, "started": note},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=3,
            global_batch_size=GLOBAL_BATCH,
            max_grad_norm=1.0,
            log_every_steps=1,
            cpu=True,
            sharding=args.sharding,
            checkpoint=dt.CheckpointPolicy(every_steps=3, every_epochs=1),
            health=dt.HealthPolicy(not_finite="roll_back", clean_steps=4),
        ),
    )
    return trainer.fit().exit_code


if __name__ == "__main__":
    sys.exit(main())
