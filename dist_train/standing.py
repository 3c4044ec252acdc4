"""What a loop may ask of its run: counts, what is saved, whether to stop, why it ended.

Invariant: asking changes nothing and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_train.beginning import Beginning
from dist_train.boundary import Boundary
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.ending import Ending
from dist_train.errors import StopReason
from dist_train.feed import BatchFeed
from dist_train.intake import Intake
from dist_train.progress import RunProgress


class Standing:
    """The readable side of `Run`, which makes the parts."""

    accelerator: Any | None
    _models: Mapping[str, nn.Module]
    _progress: RunProgress
    _checkpointer: Checkpointer
    _boundary: Boundary
    _beginning: Beginning
    _intake: Intake
    _feed: BatchFeed
    _ending: Ending

    @property
    def global_step(self) -> int:
        """Completed optimizer updates."""
        return self._progress.now.global_step

    @property
    def epoch(self) -> int:
        """0-based index of the pass in progress."""
        return self._progress.now.epoch

    @property
    def attempt(self) -> int:
        """Number of this life of the run, from 1."""
        return self._checkpointer.attempt

    @property
    def epochs_completed(self) -> int:
        """Passes finished."""
        return self._progress.now.epochs_completed

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation."""
        return dict(self._progress.metrics)

    @property
    def best(self) -> float | None:
        """Best value of the monitored metric so far."""
        return self._progress.best.value if self._progress.best else None

    @property
    def committed_step(self) -> int:
        """Step of the newest durable checkpoint, -1 before the first; as of the last agreement on other ranks."""
        return self._boundary.committed_step

    @property
    def resumed_from(self) -> str | None:
        """Path of the checkpoint that this attempt goes on from; None is a fresh start."""
        return self._beginning.resumed_from

    @property
    def epoch_is_complete(self) -> bool:
        """Whether every batch of the epoch is trained on, and its evaluation is what remains."""
        return self._intake.epoch_is_complete

    @property
    def should_stop(self) -> bool:
        """Agreed by all ranks at a step boundary."""
        return self._boundary.stop is not None

    @property
    def loss_weight(self) -> float:
        """Multiply the micro-batch's mean loss by it: 1 but for short windows and uneven shares; without Accelerate,
        whose `backward` divides by the accumulation, the micro-batch's share of its window."""
        return self._feed.micro.weight

    @property
    def updates_now(self) -> bool:
        """Whether the batch at hand ends its window: the optimizer steps now (with Accelerate: `sync_gradients`)."""
        return self._feed.ends_window

    @property
    def batch_counts(self) -> bool:
        """Whether the evaluation's batch at hand is this rank's to count. False where the model is sharded, so that all
        ranks run each forward pass, and this one has no sample left; and where ranks of a mesh share their samples, on
        all of them but the first. Metrics of dist_train then count nothing.
        """
        return self._intake.batch_counts

    @property
    def exit_code(self) -> int:
        """For `sys.exit`."""
        return self._ending.exit_code

    @property
    def reason(self) -> StopReason | None:
        """Why the run ended, None before it has."""
        return self._ending.reason

    @property
    def device(self) -> torch.device:
        """Where batches are moved to."""
        if self.accelerator is not None:
            return torch.device(self.accelerator.device)
        devices = (parameter.device for model in self._models.values() for parameter in model.parameters())
        return next(devices, torch.device("cpu"))
