"""Batches into a loop, one micro-batch at a time, and what Accelerate's accumulation must be told.

Invariant: the position moves when a batch was consumed (`consume`), never when a loader read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_train.data import move_batch
from dist_train.errors import ConfigError
from dist_train.order import EpochLayout, MicroBatch

_LONE_UPDATE = MicroBatch(
    start=0, stop=1, weight=1.0, num_samples=1, window_samples=0, ends_window=True, ends_epoch=False
)


class BatchFeed:
    """Where the loop stands inside a window.

    Args:
        accelerator: None for a plain loop, whose every step is an update unless a training loader says otherwise.
    """

    def __init__(self, accelerator: Any | None, device: torch.device, rank: int) -> None:
        self.micro = _LONE_UPDATE
        """The micro-batch that was given out last."""
        self.in_window = False
        """Gradients of a part of a window are accumulated; nothing can be saved."""
        self._accelerator = accelerator
        self._device = device
        self._rank = rank
        self._consumed = True
        self._num_samples = 1

    @property
    def knows_epoch_end(self) -> bool:
        """Whether the batch that was given out last came from a training loader of ours."""
        return self.micro is not _LONE_UPDATE

    @property
    def share_of_epoch(self) -> float | None:
        """How much of the epoch was given out, from 0 to 1; None where nobody knows."""
        return self.micro.stop / self._num_samples if self.knows_epoch_end else None

    def training_batches(self, loader: Any, layout: EpochLayout, should_stop: Callable[[], bool]) -> Iterator[Any]:
        """The rest of the epoch from the loader's position. The loader's iterator is made at once."""
        self._num_samples = layout.num_samples
        if self._accelerator is not None:
            self._accelerator.gradient_accumulation_steps = layout.accumulation_steps
            self._accelerator.step = 0  # a position is a window's beginning; an interrupted one may have left a count
        return self._give_out(iter(loader), layout, should_stop)

    def plain_batches(self, loader: Any, should_stop: Callable[[], bool]) -> Iterator[Any]:
        """Batches that are not trained on."""
        for batch in loader:
            if should_stop():
                return
            yield move_batch(batch, self._device)

    def consume(self) -> MicroBatch:
        """The loop is done with its batch.

        Raises:
            ConfigError: the window is complete, but Accelerate has not synchronised gradients.
        """
        if self._consumed and self.knows_epoch_end:
            raise ConfigError("run.step() was called twice after one batch; call it once a batch, after the update.")
        self._consumed = True
        self.in_window = not self.micro.ends_window
        if not self.in_window and self._accelerator is not None and not self._accelerator.sync_gradients:
            raise ConfigError(
                "The window of the global batch is complete, but Accelerate did not synchronise gradients. Put the "
                "forward and backward pass in `with accelerator.accumulate(model):` and iterate `run.batches(loader)`."
            )
        return self.micro

    def _give_out(self, batches: Iterator[Any], layout: EpochLayout, should_stop: Callable[[], bool]) -> Iterator[Any]:
        with self._epoch_end() as end:
            for micro_step in range(layout.num_micro_steps):
                if should_stop():
                    return
                self.micro = layout.micro_batch(micro_step, self._rank)
                end.end_of_dataloader = self.micro.ends_epoch
                batch = next(batches)
                self._consumed = False
                yield move_batch(batch, self._device)
                self._require_consumed()

    @contextmanager
    def _epoch_end(self) -> Iterator[_EpochEnd]:
        """Tells Accelerate's `accumulate` where the epoch ends: it knows only prepared loaders."""
        end = _EpochEnd()
        if self._accelerator is None:
            yield end
            return
        self._accelerator.gradient_state._add_dataloader(end)
        try:
            yield end
        finally:
            self._accelerator.gradient_state._remove_dataloader(end)

    def _require_consumed(self) -> None:
        if not self._consumed:
            raise ConfigError("run.step() was not called after the last batch; call it once a batch, after the update.")


class _EpochEnd:
    """What Accelerate's gradient state asks of a loader."""

    end_of_dataloader = False
    remainder = -1
