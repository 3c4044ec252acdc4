"""Loops over loaders that are not from `data_loader`: dropout in the model, randomness in the samples, a loop that
writes down what it was given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dist_train as dt

NUM_SAMPLES = 26
BATCH = 4
UPDATES_PER_EPOCH = 7
"""Six batches of four and one of two."""


class LeaveError(Exception):
    """Ends a loop from outside."""


class Augmented(Dataset[Any]):
    """Sample i, with noise from all three global generators."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([float(index), *noise])


class Stream(IterableDataset[Any]):
    """Goes on for ever, an epoch at a time; where it stands is its own business, and so is its randomness."""

    def __init__(self, per_epoch: int = NUM_SAMPLES) -> None:
        self.at = 0
        self.per_epoch = per_epoch
        self.generator = torch.Generator().manual_seed(9)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.at += 1
            yield torch.tensor([float(self.at), *torch.rand(3, generator=self.generator).tolist()])
            if self.at % self.per_epoch == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.generator.set_state(state["generator"])


class Countdown(IterableDataset[Any]):
    """Begins again each time, from the global generator; it has no state to save."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in torch.randperm(NUM_SAMPLES).tolist():
            yield torch.tensor([float(index), 0.0, 0.0, 0.0])


class StatefulLoader:
    """The shape of torchdata's StatefulDataLoader: batches of a permutation, with the place in it as its state."""

    def __init__(self, *, has_length: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self._order: list[int] | None = None
        self._at = 0
        self._resumes = False
        if has_length:
            self.dataset = Augmented()

    def __len__(self) -> int:
        return UPDATES_PER_EPOCH

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self._resumes:
            self._order, self._at = torch.randperm(NUM_SAMPLES, generator=self.generator).tolist(), 0
        self._resumes = False
        assert self._order is not None
        while self._at < NUM_SAMPLES:
            chosen = self._order[self._at : self._at + BATCH]
            self._at += BATCH
            yield torch.tensor([[float(index), 0.0, 0.0, 0.0] for index in chosen])
        self._order = None

    def state_dict(self) -> dict[str, Any]:
        if self._order is None and not self._at:
            torch.rand(())  # as torchdata, which makes an iterator here and draws its seed
        order = None if self._order is None else np.array(self._order)
        return {"order": order, "at": self._at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order = None if state["order"] is None else state["order"].tolist()
        self._at = state["at"]
        self.generator.set_state(state["generator"])
        self._resumes = self._order is not None


class SeedingLoader(StatefulLoader):
    """What torchdata's does besides: a seed from the global generator for each iterator, two after a finished one."""

    _initial_iter_for_state_dict = False
    _finished_state = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.rand(())
        if self._finished_state:
            self._finished_state = False
            torch.rand(())
        return super().__iter__()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._finished_state = not self._resumes


def plain(num_workers: int = 0, *, own_generator: bool = False, **options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(8) if own_generator else None
    return DataLoader(
        Augmented(), batch_size=BATCH, shuffle=True, num_workers=num_workers, generator=generator, **options
    )


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    dt.seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch / NUM_SAMPLES).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@dataclass
class Trained:
    """What came of a loop."""

    weights: dict[str, torch.Tensor]
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    """By the number of updates before it."""
    run: Any = None


def train(
    run_dir: Path,
    make_loader: Callable[[], Any],
    *,
    leave_at: int | None = None,
    epochs: int = 3,
    policy: dt.CheckpointPolicy | None = None,
    register: Callable[[dt.Run], None] = lambda run: None,
    **options: Any,
) -> Trained:
    """Until the end, or until it leaves after an update; an evaluation draws random numbers, as some do."""
    model, optimizer = build()
    loader = make_loader()
    ended = Trained(model.state_dict())
    policy = policy or dt.CheckpointPolicy()
    try:
        with dt.Run(
            str(run_dir),
            model=model,
            optimizer=optimizer,
            loader=loader,
            policy=policy,
            options=dt.RunOptions(**options),
        ) as run:
            ended.run = run
            register(run)
            for _ in run.epochs(epochs):
                torch.rand(())  # what a loop does at the top of an epoch may draw, too
                for batch in run.batches(loader):
                    ended.seen[run.global_step] = batch.clone()
                    run.step(loss=update(model, optimizer, batch))
                    if run.global_step == leave_at:
                        run.save(wait=True)
                        raise LeaveError
                if run.epoch_is_complete:
                    run.end_epoch(val=float(torch.rand(())))
    except LeaveError:
        pass
    return ended


def train_bare(make_loader: Callable[[], Any], epochs: int = 3) -> Trained:
    """The same loop without the library."""
    model, optimizer = build()
    loader = make_loader()
    ended = Trained(model.state_dict())
    for _ in range(epochs):
        torch.rand(())
        for batch in loader:
            ended.seen[len(ended.seen)] = batch.clone()
            update(model, optimizer, batch)
        torch.rand(())
    return ended


def assert_same(one: Trained, other: Trained) -> None:
    """Equal weights, and equal batches wherever both have seen one."""
    for step in one.seen.keys() & other.seen.keys():
        assert torch.equal(one.seen[step], other.seen[step]), f"the batch after {step} updates differs"
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
