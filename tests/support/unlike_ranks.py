"""A script that says something else on each rank; each function runs on every rank of two."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dist_train as dt
from tests.support.small_run import Numbered, smooth_model, squared_error


def train(folder: str, whats: list[str]) -> dict[str, Any]:
    """By what differs: the message that the rank got, or the epochs that were done."""
    return {what: _train(f"{folder}/{what}", what) for what in whats}


def _train(folder: str, what: str) -> Any:
    rank = dist.get_rank()

    def other(name: str, value: Any, otherwise: Any) -> Any:
        return otherwise if name == what and rank else value

    model = DistributedDataParallel(smooth_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = dt.data_loader(Numbered(), global_batch_size=4, seed=other("seed", 0, 1))
    policy = dt.CheckpointPolicy(every_steps=other("every_steps", 2, None))
    options = dt.RunOptions(
        max_steps=other("max_steps", None, 7),
        early_stopping=dt.EarlyStopping(patience=1) if what == "metrics" else None,
    )
    parts = {"model": model, "optimizer": optimizer, "loader": loader}
    try:
        with dt.Run(folder, **parts, policy=policy, options=options) as run:
            for epoch in run.epochs(other("epochs", 2, 3)):
                for batch in run.batches(loader):
                    squared_error(model, batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step()
                run.end_epoch(val=float(epoch) if what == "metrics" and rank else -float(epoch))
        return run.epochs_completed
    except dt.DistTrainError as error:
        return str(error)
