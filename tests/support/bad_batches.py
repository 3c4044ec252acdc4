"""A small run in which some updates get a gradient that is not finite, whichever attempt makes them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_train.health.policy import HealthPolicy
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.small_run import SmallRun

BAD_UPDATE = 8
"""The third of the second epoch's five."""


@dataclass(kw_only=True)
class BadRun(SmallRun):
    bad_updates: Collection[int] = ()
    """Global steps whose gradient is ruined."""
    bad_samples: Collection[tuple[int, int]] = ()
    """(epoch, index) of samples that ruin the gradient of their window."""
    large_updates: Collection[int] = ()
    """Global steps whose inputs are far too large."""
    health: HealthPolicy = field(default_factory=HealthPolicy)

    def options(self) -> RunOptions:
        return RunOptions(
            early_stopping=self.early_stopping,
            max_steps=self.max_steps,
            log_every_steps=self.log_every_steps,
            open_store=self.open_store,
            health=self.health,
        )

    def _train_on(self, batch: Any, run: Run, micro_step: int) -> None:
        ruined = any((run.epoch, index) in self.bad_samples for index in batch[2].tolist())
        if ruined or run.global_step + 1 in self.bad_updates:
            batch = (torch.full_like(batch[0], math.nan), *batch[1:])
        if run.global_step + 1 in self.large_updates:
            batch = (batch[0], batch[1] * 1e4, *batch[2:])
        super()._train_on(batch, run, micro_step)
