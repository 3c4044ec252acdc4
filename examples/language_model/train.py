"""Train a byte-level GPT, from 1 million to 1 billion parameters, on the source of Python's standard library.

New here: a model with tied weights and two parameter groups, sizes that make checkpoints as large as you like, and
a corpus that needs no network; with --sharding fsdp no rank holds the whole model. The metric is val_bits_per_byte:
8 knows nothing, lower is better.

    python examples/language_model/train.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/language_model/train.py
    accelerate launch examples/language_model/train.py --size 100m --mixed-precision bf16 --corpus-mb 10 --epochs 3

Stop it as you like and run the same command: it continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys

import torch
from corpus import CorpusError, Windows, load_corpus
from model import SIZES, Transformer, language_loss, parameter_groups, warm_up_then_cosine
from torch.optim.lr_scheduler import LambdaLR

import dist_train as dt

DEFAULT_STEPS, DEFAULT_EPOCHS = 100, 4
"""Half a minute for the smallest model on two CPU processes."""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--block", type=int, help="context in bytes; default: the size's own")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, help="optimizer updates in all, in --epochs equal parts, rounded up")
    parser.add_argument("--epochs", type=int, help="without --steps: passes over the whole corpus")
    parser.add_argument("--corpus-mb", type=float, default=4.0, help="upper bound in megabytes; there are about 11")
    parser.add_argument("--eval-windows", type=int, default=128, help="windows of held-out files evaluated an epoch")
    parser.add_argument("--global-batch-size", type=int, default=32, help="windows in an optimizer update")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="windows in one forward pass")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate; lower it for larger sizes")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument(
        "--sharding", choices=("none", "fsdp", "hsdp"), default="none", help="spread the model over ranks"
    )
    parser.add_argument("--run-dir", help="default: runs/lm-<size>")
    parser.add_argument("--resume", default="auto", help="auto, must, never or the path of a checkpoint")
    parser.add_argument("--checkpoint-every", type=int, help="optimizer updates; default: each epoch and 10 minutes")
    parser.add_argument("--log-every", type=int, default=10, help="optimizer updates")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader worker processes per rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true", help="deterministic kernels: exact resume on a GPU")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    args = parser.parse_args(arguments)
    if args.steps is None and args.epochs is None:
        args.steps, args.epochs = DEFAULT_STEPS, DEFAULT_EPOCHS
    args.epochs = args.epochs or min(DEFAULT_EPOCHS, args.steps)
    args.run_dir = args.run_dir or f"runs/lm-{args.size}"
    return args


def build_data(args: argparse.Namespace, block: int) -> tuple[Windows, Windows]:
    """Return the training windows of one epoch and those for evaluation. Raises CorpusError."""
    training, held_out = load_corpus(args.corpus_mb)
    per_epoch = None if args.steps is None else math.ceil(args.steps / args.epochs) * args.global_batch_size
    return Windows(training, block, per_epoch), Windows(held_out, block, args.eval_windows)


def build_trainer(args: argparse.Namespace) -> dt.Trainer:
    """Put data, model, optimizer and schedule together. Raises CorpusError."""
    size = SIZES[args.size]
    size = dataclasses.replace(size, block=args.block or size.block)
    train_set, eval_set = build_data(args, size.block)

    dt.seed_everything(args.seed)
    model = Transformer(size, args.dropout)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=args.lr, betas=(0.9, 0.95))
    total_updates = args.epochs * math.ceil(len(train_set) / args.global_batch_size)
    scheduler = LambdaLR(optimizer, warm_up_then_cosine(total_updates))

    return dt.Trainer(
        model,
        optimizer,
        train_data=train_set,
        eval_data=eval_set,
        loss=language_loss,
        scheduler=scheduler,
        metrics={"val_bits_per_byte": dt.Mean()},
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            mixed_precision=args.mixed_precision,
            sharding=args.sharding,
            max_grad_norm=1.0,
            seed=args.seed,
            num_workers=args.workers,
            log_every_steps=args.log_every,
            deterministic=args.deterministic,
            cpu=args.cpu,
            resume=args.resume,
            checkpoint=dt.CheckpointPolicy(
                every_epochs=1,
                every_steps=args.checkpoint_every,
                every="10min",
                keep_last=3,
                keep_best=1,
                monitor="val_bits_per_byte",
                mode="min",
            ),
        ),
    )


def main() -> int:
    """Train; returns the exit code for the shell."""
    try:
        trainer = build_trainer(parse_args())
    except CorpusError as error:
        sys.exit(f"error: {error}")
    return trainer.fit().exit_code


if __name__ == "__main__":
    sys.exit(main())
