"""Trains on a device of choice what makes bits hard to have again, to be killed and resumed (see `tests/gpu`).

Convolution, BatchNorm, an embedding (its backward pass scatters), dropout, noisy samples, accumulation with a short
last window, clipping, AdamW of any kind; loss scaling that overflows at first and again and again.

    on_device.py --device cuda|cpu --loop trainer|accelerate|plain|sharded --run-dir DIR [--precision no|bf16|fp16]
                 [--optimizer NAME] [--compile BACKEND] [--sharding fsdp] [--samples DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins

import torch
import torch.distributed as dist
from torch import nn

import dist_train as dt
from dist_train.trainer import seed_everything
from tests.support.specimen import Augmented, record, warm_up

NUM_SAMPLES = 84
GLOBAL_BATCH = 24
MICRO_BATCH = 6
EVALUATED = 31
EPOCHS = 4
SEED = 7
SCALE = {"init_scale": 2.0**20, "growth_interval": 3}
"""Overflows in the first updates, and each time it has grown enough again."""
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Optimizers = Mapping[str, Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "capturable": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, capturable=True),
    "fused capturable": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True, capturable=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, amsgrad=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True),
}
ON_GPU_ALONE = {"capturable", "fused capturable"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.convolution = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Linear(72, 32)
        self.dropout = nn.Dropout(0.2)
        self.outer = nn.Linear(32, 1)

    def forward(self, inputs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        signal = torch.relu(self.norm(self.convolution(inputs.unsqueeze(1)))).flatten(1)
        hidden = torch.cat([signal, self.table(numbers % 10)], dim=1)
        outputs: torch.Tensor = self.outer(self.dropout(torch.tanh(self.inner(hidden))))
        return outputs


def build_model() -> Net:
    seed_everything(0)
    return Net()


def loss_fn(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, targets, indices = batch
    if model.training:
        record.indices = indices.tolist()
    prediction = model(inputs, indices).float().squeeze(1)
    return nn.functional.mse_loss(prediction, targets), prediction, targets


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def make_loader() -> Any:
    return dt.data_loader(
        Augmented(NUM_SAMPLES), global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, seed=SEED
    )


POLICY = dt.CheckpointPolicy(every_steps=2, every_epochs=1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--loop", choices=("trainer", "accelerate", "plain", "sharded"), required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compile", default="", help="backend of torch.compile")
    parser.add_argument("--sharding", default="none")
    parser.add_argument("--samples", default="", help="folder to record consumed samples in")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if args.samples:
        record.install(dt.Run, args.samples)
    loops = {"trainer": train_with_trainer, "accelerate": train_with_accelerate}
    return loops.get(args.loop, train_plainly)(args)


def train_with_trainer(args: argparse.Namespace) -> int:
    model = build_model()
    optimizer = OPTIMIZERS[args.optimizer](model.parameters())
    config = dt.TrainConfig(
        run_dir=args.run_dir,
        epochs=EPOCHS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        mixed_precision=args.precision,
        max_grad_norm=1.0,
        seed=SEED,
        sharding=args.sharding,
        log_every_steps=1,
        deterministic=True,
        cpu=args.device == "cpu",
        checkpoint=POLICY,
    )
    trainer = dt.Trainer(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up),
        train_data=Augmented(NUM_SAMPLES),
        eval_data=Augmented(EVALUATED, noisy=False),
        loss=loss_fn,
        metrics={"val_mae": dt.MAE()},
        config=config,
    )
    assert trainer.accelerator.device.type == args.device
    return trainer.fit().exit_code


def train_with_accelerate(args: argparse.Namespace) -> int:
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    handlers = [GradScalerKwargs(**SCALE)] if args.precision == "fp16" else []
    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.device == "cpu", kwargs_handlers=handlers)
    model = build_model()
    made = OPTIMIZERS[args.optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, warm_up)
    loader = make_loader()
    prepared, optimizer = accelerator.prepare(model, made)
    parts = {"model": prepared, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    options = dt.RunOptions(log_every_steps=1)
    with dt.Run(args.run_dir, accelerator=accelerator, policy=POLICY, options=options, **parts) as run:
        for _ in run.epochs(EPOCHS):
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
    return run.exit_code


def train_plainly(args: argparse.Namespace) -> int:
    """Without Accelerate; `sharded` after fully_shard in a process group of one."""
    model: nn.Module = build_model().to(args.device)
    if args.loop == "sharded":
        make_lone_group(args.device)
        torch.distributed.fsdp.fully_shard(model)
    step = torch.compile(model, backend=args.compile, dynamic=False) if args.compile else model
    optimizer = OPTIMIZERS[args.optimizer](model.parameters())
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16", **SCALE)
    loader = make_loader()
    parts = {"model": step, "optimizer": optimizer, "loader": loader}
    options = dt.RunOptions(log_every_steps=1)
    with dt.Run(args.run_dir, policy=POLICY, options=options, **parts) as run:
        if scaler.is_enabled():
            run.register("scaler", scaler)
        for _ in run.epochs(EPOCHS):
            step.train()
            for batch in run.batches(loader):
                with autocast(args.device, args.precision):
                    loss, _, _ = loss_fn(step, batch)
                scaler.scale(loss * run.loss_weight).backward()
                if run.updates_now:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                run.step(loss=loss.detach())
    if dist.is_initialized():
        dist.destroy_process_group()
    return run.exit_code


def make_lone_group(device: str) -> None:
    if dist.is_initialized():
        return
    if device == "cuda":
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    sys.exit(main())
