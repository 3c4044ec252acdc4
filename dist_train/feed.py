"""Batches into a loop, one micro-batch at a time, and what Accelerate's accumulation must be told.

    training_batches    of our loader: the layout says which batch ends a window
    user_batches        of a training loader of the user's: Accelerate says it, without it every batch does
    plain_batches       not trained on, or of a run that was not given its loader: then as above

Invariant: the position moves when a batch was consumed (`consume`), never when a loader read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_train import phases
from dist_train.data import move_batch
from dist_train.errors import ConfigError
from dist_train.open_window import OpenWindow
from dist_train.order import EpochLayout, MicroBatch
from dist_train.phases import Phase
from dist_train.places import Place
from dist_train.user_loader import UserLoader
from dist_train.world import World

_LONE_UPDATE = MicroBatch(
    start=0, stop=1, weight=1.0, num_samples=1, window_samples=0, ends_window=True, ends_epoch=False
)


class BatchFeed:
    """Where the loop stands inside a window.

    Args:
        accelerator: None for a plain loop, whose every step is an update unless a training loader says otherwise.
        models: those that are trained, by name.
    """

    def __init__(
        self, accelerator: Any | None, device: torch.device, rank: int, models: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.micro = _LONE_UPDATE
        """The micro-batch that was given out last."""
        self.in_window = False
        """Gradients of a part of a window are accumulated; nothing can be saved."""
        self.window_start = 0
        """The first batch of the window at hand, of a training loader of the user's."""
        self.place = Place(rank, rank + 1)
        """Which samples of a window are this rank's."""
        self.needs_batch = False
        """The run has a training loader: what is consumed must come from it."""
        self.is_left_out: Callable[[int, int], bool] = lambda first, stop: False
        """Whether a window is not to be trained on: its places in the epoch, from the first to before the last."""
        self.leave_out: Callable[[MicroBatch], None] = lambda micro: None
        """Told when such a window was taken from the loader, with its last micro-batch."""
        self._accelerator = accelerator
        self._device = device
        self._open = OpenWindow(models or {})
        self._consumed = True
        self._length: int | None = None
        self._windows_are_laid_out = False
        self._user: UserLoader | None = None

    @property
    def knows_epoch_end(self) -> bool:
        """Whether the batch that was given out last came from the run's training loader."""
        return self.micro is not _LONE_UPDATE

    @property
    def share_of_epoch(self) -> float | None:
        """How much of the epoch was given out, from 0 to 1; None where nobody knows."""
        return self.micro.stop / self._length if self._length and self.knows_epoch_end else None

    @property
    def ends_window(self) -> bool:
        """Whether an optimizer update belongs to the batch at hand."""
        if self._windows_are_laid_out:
            return self.micro.ends_window
        return self._accelerator is None or bool(self._accelerator.sync_gradients)

    def training_batches(self, loader: Any, layout: EpochLayout, should_stop: Callable[[], bool]) -> Iterator[Any]:
        """The rest of the epoch from the loader's position. The loader's iterator is made at once."""
        self._windows_are_laid_out, self._user, self._length = True, None, layout.num_samples
        if self._accelerator is not None:
            self._accelerator.gradient_accumulation_steps = layout.accumulation_steps
            self._accelerator.step = 0  # a position is a window's beginning; an interrupted one may have left a count
        return self._give_out(iter(loader), layout, should_stop)

    def user_batches(self, user: UserLoader, should_stop: Callable[[], bool], *, is_complete: bool) -> Iterator[Any]:
        """The rest of the epoch from the loader's position, which is found at once. An epoch of a loader of unknown
        length may end inside a window.
        """
        self._windows_are_laid_out, self._user, self._length = False, user, user.num_batches
        if self._accelerator is not None:
            self._accelerator.step = 0
        return self._give_out_user(user, user.iterate(is_complete=is_complete), should_stop)

    def plain_batches(self, loader: Any, should_stop: Callable[[], bool]) -> Iterator[Any]:
        """Batches that are not trained on."""
        for batch in loader:
            if should_stop():
                return
            phases.beat()
            yield move_batch(batch, self._device)

    def consume(self) -> MicroBatch:
        """The loop is done with its batch; afterwards `in_window` says whether an update was made.

        Raises:
            ConfigError: there is no such batch, or Accelerate has not synchronised gradients at the window's end.
        """
        if self._consumed and self.knows_epoch_end:
            raise ConfigError("run.step() was called twice after one batch; call it once a batch, after the update.")
        if self._consumed and self.needs_batch:
            raise ConfigError(
                "run.step() was called without a batch of the training loader: iterate `run.batches(loader)` over the "
                "very loader that the Run was given (not a wrapper of it, and no other one)."
            )
        self._consumed = True
        if self._user is not None:
            self._user.batches += 1
        self.in_window = not self.ends_window
        if not self.in_window and self._accelerator is not None and not self._accelerator.sync_gradients:
            raise ConfigError(
                "The window of the global batch is complete, but Accelerate did not synchronise gradients. Put the "
                "forward and backward pass in `with accelerator.accumulate(model):` and iterate `run.batches(loader)`."
            )
        if not self.in_window:
            self._open.close()
        return self.micro

    def must_wait(self, world: World) -> bool:
        """Whether gradients of a part of a window are accumulated, also of one that the run was not told of, on any
        rank. Collective.
        """
        return self.in_window or world.max([self._open.is_open()], "whether a window of micro-batches is open")[0] > 0

    def _give_out_user(
        self, user: UserLoader, batches: Iterator[Any], should_stop: Callable[[], bool]
    ) -> Iterator[Any]:
        first, steps = user.batches, self._accumulation_steps
        with self._epoch_end() as end:
            # The end is asked for even when a stop is known: what comes after it must not depend on when it came.
            while user.batches == self._length or not should_stop():
                phases.switch(Phase.DATA)
                try:
                    batch = next(batches)
                except StopIteration:
                    user.is_exhausted = True
                    return
                index = user.batches
                begun = index - (index - first) % steps
                self.window_start = begun
                in_window = steps if self._length is None else max(min(steps, self._length - begun), 1)
                end.end_of_dataloader = index + 1 == self._length
                weight, ends_epoch = steps / in_window, end.end_of_dataloader
                micro = replace(_LONE_UPDATE, start=index, stop=index + 1, weight=weight, ends_epoch=ends_epoch)
                if self.is_left_out(begun, begun + in_window):
                    user.batches += 1
                    if user.batches == begun + in_window:
                        self.leave_out(micro)
                    continue
                self.micro = micro
                self._consumed = False
                moved = move_batch(batch, self._device)
                phases.switch(Phase.STEP)
                yield moved
                self._require_consumed()

    @property
    def _accumulation_steps(self) -> int:
        return 1 if self._accelerator is None else int(self._accelerator.gradient_accumulation_steps)

    def _give_out(self, batches: Iterator[Any], layout: EpochLayout, should_stop: Callable[[], bool]) -> Iterator[Any]:
        with self._epoch_end() as end:
            for micro_step in range(layout.num_micro_steps):
                if should_stop():
                    return
                micro = layout.micro_batch(micro_step, self.place.index)
                phases.switch(Phase.DATA)
                if self.is_left_out(*layout.window_of(micro_step)):
                    next(batches)
                    if micro.ends_window:
                        self.leave_out(micro)
                    continue
                self.micro = self._weighed(micro, layout)
                end.end_of_dataloader = self.micro.ends_epoch
                batch = next(batches)
                if not self.in_window and should_stop():  # alone, and told to leave during the wait
                    return
                self._consumed = False
                moved = move_batch(batch, self._device)
                phases.switch(Phase.STEP)
                yield moved
                self._require_consumed()

    def _weighed(self, micro: MicroBatch, layout: EpochLayout) -> MicroBatch:
        """The layout's weight counts on Accelerate's `backward`, which divides by the accumulation; a bare one does
        not. Samples that another rank counts are none here.
        """
        if not self.place.counts:
            micro = replace(micro, num_samples=0)
        return micro if self._accelerator else replace(micro, weight=micro.weight / layout.accumulation_steps)

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

    end_of_dataloader: bool = False
    remainder = -1
