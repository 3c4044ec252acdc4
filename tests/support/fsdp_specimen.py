"""The specimen made of blocks and sharded by FSDP2: by the Trainer, or in a loop of its own with Accelerate's plugin.

Widths that no number of ranks divides, a bias smaller than the world, BatchNorm (whose buffers nobody makes equal),
dropout, noise, accumulation 2 with a short last window, clipping, AdamW with a warm-up schedule.

    fsdp_specimen.py --loop trainer|own --run-dir DIR [--sharding fsdp|hsdp|none] [--hosts 2] [--samples DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from torch import nn

from tests.support.specimen import Augmented, loss_fn, record, warm_up

NUM_SAMPLES = 84
GLOBAL_BATCH = 24
ACCUMULATION = 2
EPOCHS = 3
EVALUATED = 31
SEED = 7
WIDTH = 13


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.dropout(torch.tanh(self.linear(self.norm(inputs))))


class Blocks(nn.Module):
    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.LayerNorm(WIDTH)
        self.outer = nn.Linear(WIDTH, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        outputs: torch.Tensor = self.outer(self.norm(hidden))
        return outputs


def build_model(precision: str = "no") -> Blocks:
    """BatchNorm only in full precision: see `dist_train.sharding`."""
    from dist_train.trainer import seed_everything

    seed_everything(0)
    return Blocks(batch_norm=precision == "no")


def build_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)


def micro_batch_size() -> int:
    return GLOBAL_BATCH // (ACCUMULATION * int(os.environ.get("WORLD_SIZE", "1")))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loop", choices=("trainer", "own"), default="trainer")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--sharding", default="fsdp")
    parser.add_argument("--hosts", type=int, default=0, help="so many hosts are pretended")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--every-steps", type=int, default=3)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--samples", default="", help="folder to record consumed samples in")
    args = parser.parse_args()
    import dist_train as dt

    if args.samples:
        record.install(dt.Run, args.samples)
    if args.hosts:
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // args.hosts)
    return train_with_trainer(args) if args.loop == "trainer" else train_in_own_loop(args)


def train_with_trainer(args: argparse.Namespace) -> int:
    import dist_train as dt

    model = build_model(args.mixed_precision)
    optimizer, scheduler = build_optimizer(model)
    trainer = dt.Trainer(
        model,
        optimizer,
        scheduler=scheduler,
        train_data=Augmented(NUM_SAMPLES),
        eval_data=Augmented(EVALUATED, noisy=False),
        loss=loss_fn,
        metrics={"val_mae": dt.MAE()},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size(),
            mixed_precision=args.mixed_precision,
            max_grad_norm=1.0,
            seed=SEED,
            sharding=args.sharding,
            log_every_steps=1,
            cpu=True,
            checkpoint=dt.CheckpointPolicy(every_steps=args.every_steps, every_epochs=1, monitor="val_mae"),
        ),
    )
    return trainer.fit().exit_code


def train_in_own_loop(args: argparse.Namespace) -> int:
    from accelerate.utils import FullyShardedDataParallelPlugin

    import dist_train as dt
    from dist_train.sharding import make_accelerator

    dt.init_distributed()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = make_accelerator(plugin, cpu=True, mixed_precision=args.mixed_precision)
    model = build_model(args.mixed_precision)
    optimizer, scheduler = build_optimizer(model)
    train_set = Augmented(NUM_SAMPLES)
    loader = dt.data_loader(
        train_set, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size(), seed=SEED, num_workers=1
    )
    eval_loader = dt.evaluation_loader(Augmented(EVALUATED, noisy=False), batch_size=4)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    parts = {"model": prepared, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    policy = dt.CheckpointPolicy(every_steps=args.every_steps, every_epochs=1)
    options = dt.RunOptions(log_every_steps=1)
    with dt.Run(args.run_dir, accelerator=accelerator, policy=policy, options=options, **parts) as run:
        for _ in run.epochs(args.epochs):
            prepared.train()
            for batch in run.batches(loader):
                with accelerator.accumulate(prepared):
                    loss, _, _ = loss_fn(prepared, batch)
                    accelerator.backward(loss * run.loss_weight)
                    if accelerator.sync_gradients:
                        run.tell_norm(accelerator.clip_grad_norm_(prepared.parameters(), 1.0))
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
