"""The model, data and loops that the kill tests train: everything that makes an exact resume hard, in a few seconds.

BatchNorm and dropout, random augmentation from three generators, shuffling, accumulation 4 at 1, 2 and 3 ranks, a
short last window, AdamW with a warm-up schedule, clipping. Run as a script under python or torchrun:

    specimen.py --loop trainer|own --run-dir DIR [--mixed-precision bf16] [--workers 2] [--lr RATE] [--resume HOW]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

NUM_SAMPLES = 156
GLOBAL_BATCH = 24
ACCUMULATION = 4
EPOCHS = 8
SEED = 7


class Augmented(Dataset[Any]):
    """Inputs with noise from each of the three global generators; returns the index too, to prove what was consumed."""

    def __init__(self, num_samples: int = NUM_SAMPLES, *, noisy: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(num_samples, 16, generator=generator)
        self.targets = self.inputs[:, :4].sum(1).sin()
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        noise = torch.randn(16) * 0.1 + random.random() * 0.01 + np.random.rand() * 0.01 if self.noisy else 0.0
        return (self.inputs[index] + noise).float(), self.targets[index], index


def build_model(*, plain: bool = False) -> nn.Module:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    odd = [] if plain else [nn.BatchNorm1d(32), nn.Dropout(0.2)]
    return nn.Sequential(nn.Linear(16, 32), *odd, nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def build_optimizer(model: nn.Module, lr: float = 1e-2) -> tuple[torch.optim.Optimizer, Any]:
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 20)


def loss_fn(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets, indices = batch
    if model.training:
        record.indices = indices.tolist()
    prediction = model(inputs).float().squeeze(1)
    return nn.functional.mse_loss(prediction, targets), prediction, targets


@dataclass
class Recorder:
    """Writes down which samples each micro-step consumed, one line each, by attempt and rank."""

    indices: list[int] = field(default_factory=list)

    def install(self, run_class: Any, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        step = run_class.step

        def recording_step(run: Any, loss: Any = None) -> None:
            used = self.indices if run.loss_weight else []
            line = json.dumps({"step": run.global_step + 1, "epoch": run.epoch, "indices": used})
            with (Path(folder) / f"a{run.attempt:06d}-r{run.world.rank}.jsonl").open("a") as file:
                file.write(line + "\n")
            step(run, loss)

        run_class.step = recording_step


record = Recorder()


def slow_down(run_class: Any, seconds: Callable[[], float]) -> None:
    step = run_class.step

    def slow_step(run: Any, loss: Any = None) -> None:
        time.sleep(seconds())
        step(run, loss)

    run_class.step = slow_step


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=("trainer", "own"), default="trainer")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--every-steps", type=int, default=3)
    parser.add_argument("--keep-last", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="no BatchNorm, dropout and noise")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep at each micro-step")
    parser.add_argument("--pace", default="", help="file that holds the same, read at each micro-step")
    parser.add_argument("--micro", type=int, default=0, help="samples of a micro-batch; 0 for 4 micro-steps an update")
    parser.add_argument("--hang-timeout", default="auto")
    parser.add_argument("--samples", default="", help="folder to record consumed samples in")
    parser.add_argument("--world-size", type=int, default=0, help="how many ranks there must be; 0 for any number")
    args = parser.parse_args()

    import dist_train as dt

    if args.samples:
        record.install(dt.Run, args.samples)
    if args.pause or args.pace:
        slow_down(dt.Run, lambda: float(Path(args.pace).read_text()) if args.pace else args.pause)
    return train_with_trainer(args) if args.loop == "trainer" else train_in_own_loop(args)


def micro_batch_size() -> int:
    return GLOBAL_BATCH // (ACCUMULATION * int(os.environ.get("WORLD_SIZE", "1")))


def train_with_trainer(args: argparse.Namespace) -> int:
    import dist_train as dt

    model = build_model(plain=args.plain)
    optimizer, scheduler = build_optimizer(model, args.lr)
    config = dt.TrainConfig(
        run_dir=args.run_dir,
        epochs=args.epochs,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=args.micro or micro_batch_size(),
        mixed_precision=args.mixed_precision,
        max_grad_norm=1.0,
        seed=SEED,
        num_workers=args.workers,
        log_every_steps=1,
        resume=args.resume,
        hang_timeout=args.hang_timeout,
        cpu=True,
        checkpoint=dt.CheckpointPolicy(
            every_steps=args.every_steps, every_epochs=1, keep_last=args.keep_last, monitor="val_mae"
        ),
    )
    trainer = dt.Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        train_data=Augmented(noisy=not args.plain),
        eval_data=Augmented(31, noisy=False),
        loss=loss_fn,
        metrics={"val_mae": dt.MAE()},
        config=config,
    )
    assert args.world_size in (0, trainer.accelerator.num_processes), f"{trainer.accelerator.num_processes} ranks"
    return trainer.fit().exit_code


def train_in_own_loop(args: argparse.Namespace) -> int:
    from accelerate import Accelerator

    import dist_train as dt

    dt.init_distributed()
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    model = build_model(plain=args.plain)
    optimizer, scheduler = build_optimizer(model, args.lr)
    loader = dt.data_loader(
        Augmented(noisy=not args.plain),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=args.micro or micro_batch_size(),
        seed=SEED,
        num_workers=args.workers,
    )
    eval_loader = dt.evaluation_loader(Augmented(31, noisy=False), batch_size=6)
    model, optimizer = accelerator.prepare(model, optimizer)
    policy = dt.CheckpointPolicy(every_steps=args.every_steps, every_epochs=1, keep_last=args.keep_last)
    with dt.Run(
        args.run_dir,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        policy=policy,
        resume=args.resume,
        options=dt.RunOptions(log_every_steps=1, hang_timeout=args.hang_timeout),
    ) as run:
        for _ in run.epochs(args.epochs):
            model.train()
            for batch in run.batches(loader):
                with accelerator.accumulate(model):
                    loss, _, _ = loss_fn(model, batch)
                    accelerator.backward(loss * run.loss_weight)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
                run.step(loss=loss)
            metric = dt.MAE()
            with run.evaluation() as inner:
                for batch in run.batches(eval_loader):
                    metric.update(*loss_fn(inner, batch)[1:])
            run.end_epoch(val_mae=metric.compute(run.world))
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
