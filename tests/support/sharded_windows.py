"""Windows of accumulated micro-batches over a model after `fully_shard`, with a save asked for in their middle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

import dist_train as dt
from dist_train.errors import ConfigError
from dist_train.sharding import make_accelerator
from tests.support.kinds_sharded import shard
from tests.support.scripts import Script, batch, differences, everything, network

UPDATES, LEFT_AT = 5, 3


class LeftError(Exception):
    """The process dies here, as far as the run can tell."""


def build() -> Script:
    dt.seed_everything(0)
    model = shard(network())
    return Script(model=model, optimizer=optim.AdamW(model.parameters(), lr=0.05), step=lambda update: None)


def update_by_hand(script: Script, update: int, in_middle: Any = lambda: None) -> None:
    for part in range(2):
        script.model.set_requires_gradient_sync(part == 1)
        script.model(batch(2 * update + part)).square().mean().backward()
        if part == 0:
            in_middle()
    script.optimizer.step()
    script.optimizer.zero_grad()


def by_hand(folder: str) -> list[str]:
    """What differs between a run that was left with a save asked for within a window, resumed, and the bare loop."""
    straight = build()
    for update in range(UPDATES):
        update_by_hand(straight, update)
    for life in range(2):
        script = build()
        try:
            policy = dt.CheckpointPolicy(every_epochs=100, at_end=False)
            with dt.Run(folder, model=script.model, optimizer=script.optimizer, policy=policy) as run:
                for update in _updates(run):
                    saves = life == 0 and update == LEFT_AT - 1
                    update_by_hand(script, update, partial(run.save, wait=True) if saves else lambda: None)
                    run.step()
                    if life == 0 and update == LEFT_AT:
                        raise LeftError
        except LeftError:
            found = [one.name for one in (Path(folder) / "checkpoints").glob("step-*")]
            assert found == [f"step-{LEFT_AT:08d}"], "the save within the window is that of the update that ends it"
    return differences(everything(straight), everything(script))


def _updates(run: Any) -> Iterator[int]:
    """All of one epoch: a loop without a loader counts by the run's steps."""
    for _ in run.epochs(1):
        while run.global_step < UPDATES:
            yield run.global_step


def told_at_each_micro_batch(folder: str) -> str:
    script = build()
    with dt.Run(folder, model=script.model, optimizer=script.optimizer) as run:
        for update in run.epochs(1):
            try:
                update_by_hand(script, update, run.step)
            except ConfigError as error:
                return str(error)
    return "not refused"


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """Each row is a sample."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        return batch(index)[0]


def with_accelerate(folder: str, lives: int = 2) -> Any:
    """Everything that Accelerate's FSDP2 ends with: left in mid-epoch right after a save that was asked for in the
    middle of a window, and resumed; with one life it is not left.
    """
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    for life in range(lives):
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state()
        GradientState._reset_state()
        dt.seed_everything(0)
        accelerator = make_accelerator(FullyShardedDataParallelPlugin(fsdp_version=2), gradient_accumulation_steps=2)
        model = network()
        model, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=0.05))
        loader = dt.data_loader(Rows(), global_batch_size=16, micro_batch_size=4, shuffle=True)
        parts: Any = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader}
        is_left = lives == 2 and life == 0
        try:
            with dt.Run(folder, **parts) as run:
                train(run, parts, is_left)
        except LeftError:
            continue
    return everything(Script(model=model, optimizer=optimizer.optimizer, step=lambda update: None))


def train(run: Any, parts: dict[str, Any], is_left: bool) -> None:
    accelerator, model, optimizer = parts["accelerator"], parts["model"], parts["optimizer"]
    for _ in run.epochs(2):
        for number, inputs in enumerate(run.batches(parts["loader"])):
            with accelerator.accumulate(model):
                loss = model(inputs).square().mean()
                accelerator.backward(loss * run.loss_weight)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            run.step(loss=loss)
            if number == 2 and is_left:
                run.save(wait=True)  # the second window has begun
            if number == 3 and is_left:
                assert run.committed_step == 2 or not run.world.is_main
                raise LeftError
