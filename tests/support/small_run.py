"""A run small enough for unit tests: any part of the loop can be replaced, and it writes down what it used.

Twenty samples in batches of four, so five updates an epoch; dropout, BatchNorm and a decaying schedule, so that
whatever is not restored shows in the weights.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.data import data_loader
from dist_train.metrics import EarlyStopping
from dist_train.options import RunOptions
from dist_train.run import Run

NUM_SAMPLES = 20
GLOBAL_BATCH = 4
UPDATES_PER_EPOCH = 5
AT_THE_END = CheckpointPolicy()
EACH_EPOCH = CheckpointPolicy(every_epochs=1)


class Numbered(Dataset[Any]):
    """Sample i is three numbers, their target and i."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(num_samples, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.inputs[index], self.inputs[index].sum().sin(), index


def small_model() -> nn.Module:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))


def smooth_model() -> nn.Module:
    """Without dropout and BatchNorm: its gradient is that of the samples, however they are batched."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def small_optimizer(model: nn.Module, lr: float = 0.05) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


def squared_error(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets, _ = batch
    return nn.functional.mse_loss(model(inputs).squeeze(1), targets)


def nothing(run: Run) -> None:
    """A hook that does nothing."""


def metric_of_step(run: Run) -> dict[str, float]:
    """Another value each epoch, the best one in the middle."""
    return {"val": abs(run.global_step - 12) / 7}


@dataclass(kw_only=True)
class SmallRun:
    """One attempt; `train` makes new objects, as a new process would, unless some are given."""

    run_dir: Path
    epochs: int = 3
    policy: CheckpointPolicy = EACH_EPOCH
    accelerator: Any | None = None
    micro_batch_size: int | None = None
    global_batch_size: int = GLOBAL_BATCH
    num_samples: int = NUM_SAMPLES
    lr: float = 0.05
    resume: str = "auto"
    max_steps: int | None = None
    max_time: str | None = None
    hang_timeout: str | float | None = "auto"
    search: Sequence[str] = ()
    log_every_steps: int = 1
    early_stopping: EarlyStopping | None = None
    open_store: Callable[[str], Store] = Store
    model: nn.Module | None = None
    registered: Mapping[str, Any] = field(default_factory=dict)
    """Before entry."""
    registered_inside: Mapping[str, Any] = field(default_factory=dict)
    at_epoch: Callable[[Run], None] = nothing
    at_batch: Callable[[Run], None] = nothing
    """After the update and before `run.step`."""
    at_step: Callable[[Run], None] = nothing
    """After `run.step`."""
    metrics: Callable[[Run], dict[str, float]] = metric_of_step
    used: list[tuple[int, list[int]]] = field(default_factory=list)
    """(epoch, indices) of each micro-step."""
    updates: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, micro-steps of this epoch and attempt) at each update."""
    evaluated: list[int] = field(default_factory=list)
    """`run.epoch` at each evaluation."""
    rates: list[float] = field(default_factory=list)
    """Learning rate of each update."""
    run: Run | None = None

    def train(self) -> Run:
        model = small_model() if self.model is None else self.model
        optimizer, scheduler = small_optimizer(model, self.lr)
        if self.accelerator is not None:
            model, optimizer = self.accelerator.prepare(model, optimizer)
        self.prepared, self.optimizer, self.scheduler = model, optimizer, scheduler
        loader = data_loader(
            Numbered(self.num_samples),
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=3,
        )
        self.run = run = Run(
            str(self.run_dir),
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=loader,
            accelerator=self.accelerator,
            policy=self.policy,
            resume=self.resume,
            options=self.options(),
        )
        for name, one in self.registered.items():
            run.register(name, one)
        with run:
            for name, one in self.registered_inside.items():
                run.register(name, one)
            for _ in run.epochs(self.epochs):
                self._train_epoch(run, loader)
        return run

    def options(self) -> RunOptions:
        return RunOptions(
            early_stopping=self.early_stopping,
            max_steps=self.max_steps,
            max_time=self.max_time,
            hang_timeout=self.hang_timeout,
            search=self.search,
            log_every_steps=self.log_every_steps,
            open_store=self.open_store,
        )

    def _train_epoch(self, run: Run, loader: Any) -> None:
        self.at_epoch(run)
        self.prepared.train()
        for micro_step, batch in enumerate(run.batches(loader), 1):
            self.used.append((run.epoch, batch[2].tolist()))
            self._train_on(batch, run, micro_step)
            self.at_batch(run)
            run.step(loss=self._loss)
            self.at_step(run)
        if run.epoch_is_complete:
            self.evaluated.append(run.epoch)
            run.end_epoch(**self.metrics(run))

    def _train_on(self, batch: Any, run: Run, micro_step: int) -> None:
        if self.accelerator is not None:
            with self.accelerator.accumulate(self.prepared):
                self._loss = squared_error(self.prepared, batch)
                self.accelerator.backward(self._loss * run.loss_weight)
                self.optimizer.step()
                self.optimizer.zero_grad()
            updated = self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped
        else:
            self._loss = squared_error(self.prepared, batch)
            self._loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            updated = True
        if updated:
            self.rates.append(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
            self.updates.append((run.epoch, micro_step))


class StandIn:
    """What a Run and this loop ask of an Accelerator, in one process; `skip` says which updates AMP leaves out."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    gradient_accumulation_steps = 1

    def __init__(self, *, scaler: Any | None = None, skip: Callable[[int], bool] = lambda update: False) -> None:
        self.scaler = scaler
        self.log_with: list[Any] = []
        self.trackers: list[Any] = []
        self.gradient_state = self
        self.step = 0
        self.optimizer_step_was_skipped = False
        self._skip = skip
        self._update = 0

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return model, _SkippingOptimizer(optimizer, self)

    @contextmanager
    def accumulate(self, model: nn.Module) -> Iterator[None]:
        yield
        self._update += 1

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer_step_was_skipped = self._skip(self._update)

    def init_trackers(self, name: str, init_kwargs: Mapping[str, Any]) -> None:
        for tracker in self.log_with:
            tracker.start(name, init_kwargs)
            self.trackers.append(tracker)

    def _add_dataloader(self, end: Any) -> None: ...

    def _remove_dataloader(self, end: Any) -> None: ...


class _SkippingOptimizer:
    """As Accelerate's wrapper: leaves an update out when the scaler found an infinity."""

    def __init__(self, optimizer: torch.optim.Optimizer, stand_in: StandIn) -> None:
        self.optimizer = optimizer
        self._stand_in = stand_in

    def step(self) -> None:
        if not self._stand_in.optimizer_step_was_skipped:
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def events_of(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of run.jsonl, of one kind if given."""
    lines = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def status_of(run_dir: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return status


def manifests_of(run_dir: Path) -> list[dict[str, Any]]:
    """Manifests of all committed checkpoints, oldest first."""
    found = [json.loads(path.read_text()) for path in (run_dir / "checkpoints").glob("step-*/manifest.json")]
    return sorted(found, key=lambda one: one["sequence"])


@dataclass
class BrokenDisk:
    """A store whose data files cannot be created while `broken` is set."""

    broken: bool = False
    error: int = errno.EROFS
    refused: int = 0

    def __call__(self, operation: Operation) -> None:
        if self.broken and operation.kind == "create" and operation.path.endswith(".safetensors"):
            self.refused += 1
            raise OSError(self.error, "the disk is broken", operation.path)

    def open_store(self, root: str) -> Store:
        return Store(root, observer=self)
