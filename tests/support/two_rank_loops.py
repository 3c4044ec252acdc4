"""Loops on two ranks over an order of their own and over a loader of their own, left in mid-epoch and resumed.

two_rank_loops.py FOLDER      writes FOLDER/rank-N.json: what differs, by loop; nothing should
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler

import dist_train as dt
from tests.support.own_loaders import BATCH, NUM_SAMPLES, Augmented, LeaveError, StatefulLoader, build


def order(epoch: int) -> Any:
    return np.random.default_rng(epoch).integers(NUM_SAMPLES, size=22 + 6 * epoch)


def ordered() -> Any:
    return dt.data_loader(Augmented(), global_batch_size=8, micro_batch_size=2, order=order)


def distributed() -> Any:
    return DataLoader(Augmented(), batch_size=BATCH, sampler=DistributedSampler(Augmented(), seed=1))


def stateful() -> Any:
    """Each rank's has a state of its own."""
    loader = StatefulLoader()
    loader.generator.manual_seed(40 + torch.distributed.get_rank())
    return loader


def train(run_dir: Path, make_loader: Callable[[], Any], leave_at: int | None = None) -> dict[str, list[float]]:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*build())
    torch.manual_seed(accelerator.process_index)
    loader, seen = make_loader(), {}
    try:
        with dt.Run(str(run_dir), accelerator=accelerator, model=model, optimizer=optimizer, loader=loader) as run:
            for epoch in run.epochs(2):
                if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                    loader.sampler.set_epoch(epoch)
                for batch in run.batches(loader):
                    with accelerator.accumulate(model):
                        loss = model(batch / NUM_SAMPLES).square().mean()
                        accelerator.backward(loss * run.loss_weight)
                        optimizer.step()
                        optimizer.zero_grad()
                    seen.setdefault(f"batch {run.global_step}", []).extend(batch.flatten().tolist())
                    run.step(loss=loss)
                    if run.global_step == leave_at and not run._feed.in_window:
                        run.save(wait=True)
                        raise LeaveError
    except LeaveError:
        pass
    weights = accelerator.unwrap_model(model).state_dict()
    return {**seen, **{name: value.flatten().tolist() for name, value in weights.items()}}


def main() -> None:
    folder = Path(sys.argv[1])
    dt.init_distributed()
    found: dict[str, Any] = {}
    for make_loader in (ordered, distributed, stateful):
        name = make_loader.__name__
        straight = train(folder / name / "straight", make_loader)
        train(folder / name / "left", make_loader, leave_at=2)
        resumed = train(folder / name / "left", make_loader)
        found[name] = {
            "differs": [key for key, value in resumed.items() if straight[key] != value],
            "batches": sorted(key for key in resumed if key.startswith("batch")),
            "first": straight["batch 0"],
        }
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
