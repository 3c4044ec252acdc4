"""Metrics that are a sum divided by a count, and so exact at any world size.

Invariant: `compute` gives the same value, to the order of float64 summation, however the samples were split over
batches and ranks. Updating never forces a device synchronisation; reading (`sums`, `compute`) does.
A metric has no name and no direction: those belong to whoever monitors it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_train.errors import ConfigError


class FloatGatherer(Protocol):
    """The part of a world that `Metric.compute` needs."""

    def gather_floats(self, values: list[float], /) -> list[list[float]]:
        """Every rank's list, in rank order, on every rank. Collective: all ranks call this."""


_ignored: list[Metric] | None = None


@contextmanager
def counting_nothing() -> Iterator[list[Metric]]:
    """No metric counts what it is given meanwhile: of a sample that another batch or rank counts. Yields those that
    were given something.
    """
    global _ignored
    before, _ignored = _ignored, []
    try:
        yield _ignored
    finally:
        _ignored = before


class Metric:
    """The mean over all elements of what `values` gives for each.

    Subclass and define `values`. For a metric whose count is not the number of values, define `update` and call `add`.
    """

    _total: Tensor | float
    _count: Tensor | float

    def __init__(self) -> None:
        self.reset()

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """What is averaged: one number an element. Both tensors are detached and of their own dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines neither values() nor update()")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds a batch, in float64 on the tensors' device.

        Raises:
            ConfigError: The shapes do not fit; they are never broadcast.
        """
        values = self.values(prediction.detach(), target.detach())
        self.add(as_float64(values).sum(), values.numel())

    def add(self, total: Tensor | float, count: Tensor | float) -> None:
        """Adds to the sum and to the count: scalars, tensors of them in float64."""
        if _ignored is not None:
            _ignored.append(self)
            return
        # Not in place: a tensor made under inference_mode refuses in-place changes outside of it.
        self._total = self._total + total
        self._count = self._count + count

    def reset(self) -> None:
        """Forgets every update."""
        self._total = self._count = 0.0

    def sums(self) -> list[float]:
        """[sum, count] of this process. Waits for the device."""
        return [float(self._total), float(self._count)]

    def compute(self, world: FloatGatherer | None = None) -> float:
        """Sum / count over all ranks, the same value on each; NaN if nothing was counted.

        Args:
            world: Collective: all ranks call this, those without a sample too. None: this process only.
        """
        rows = [self.sums()] if world is None else world.gather_floats(self.sums())
        total, count = (_total(column) for column in zip(*rows, strict=True))
        return total / count if count else math.nan


class MAE(Metric):
    """Mean absolute error, in the unit of the target."""

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """|p - t|, any equal shapes."""
        _require_same_shape(self, prediction=prediction, target=target)
        return (as_float64(prediction) - as_float64(target)).abs()


class SMAPE(Metric):
    """Symmetric mean absolute percentage error, 0 to 200 %; 0 against 0 is no error.

    Source: Makridakis, "Accuracy measures: theoretical and practical concerns", Int. J. Forecasting 9(4), 1993.
    """

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """100 |p - t| / ((|p| + |t|) / 2), any equal shapes."""
        _require_same_shape(self, prediction=prediction, target=target)
        prediction, target = as_float64(prediction), as_float64(target)
        scale = (prediction.abs() + target.abs()) / 2
        return 100 * (prediction - target).abs() / scale.where(scale != 0, 1.0)


class Accuracy(Metric):
    """Share of right answers, 0 to 1."""

    def values(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Classes against classes of one shape, or scores (..., classes) against classes (...): argmax of the last."""
        # One score has only one argmax: (N, 1) against (N,) is a forgotten squeeze, not a classification.
        if prediction.ndim == target.ndim + 1 and prediction.shape[-1] > 1 and prediction.shape[:-1] == target.shape:
            return prediction.argmax(dim=-1) == target
        _require_same_shape(self, prediction=prediction, target=target)
        return prediction == target


class Mean(Metric):
    """Weighted mean, such as that of a loss: `update(loss, num_samples)`."""

    def update(self, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Adds a number, or each element of a tensor, with one weight for all or a weight each.

        Raises:
            ConfigError: Weights of another shape than the values; they are never broadcast.
        """
        values = as_float64(torch.as_tensor(value)).detach()
        if not isinstance(weight, Tensor) or weight.ndim == 0:
            weight = weight.detach() if isinstance(weight, Tensor) else weight
            return self.add((values * weight).sum(), weight * values.numel())
        _require_same_shape(self, value=values, weight=weight)
        weights = as_float64(weight.detach())
        self.add((values * weights).sum(), weights.sum())


class LossMeter:
    """Sums of the training loss, weighted by samples: since the epoch's start and since the last log record.

    Kept by rank, bit for bit, in every checkpoint, so that a resumed epoch reports what the uninterrupted one does.
    """

    def __init__(self) -> None:
        self._epoch: Tensor | float = 0.0
        self._recent: Tensor | float = 0.0
        self._epoch_samples = 0
        self._recent_samples = 0

    def add(self, loss: Tensor | float, num_samples: int) -> None:
        """One micro-batch's mean loss; a filler batch (no samples) does not count. Never waits for the device."""
        if num_samples == 0:
            return
        total = (as_float64(loss.detach()).reshape(()) if isinstance(loss, Tensor) else float(loss)) * num_samples
        self._epoch = self._epoch + total
        self._recent = self._recent + total
        self._epoch_samples += num_samples
        self._recent_samples += num_samples

    def take_recent(self, world: FloatGatherer) -> float | None:
        """Mean loss over all ranks since the last call, None without samples. Collective."""
        mean = _mean_over_ranks(world, float(self._recent), self._recent_samples)
        self._recent, self._recent_samples = 0.0, 0
        return mean

    def take_epoch(self, world: FloatGatherer) -> float | None:
        """Mean loss of the epoch over all ranks, None without samples; the next epoch starts at nothing. Collective."""
        mean = _mean_over_ranks(world, float(self._epoch), self._epoch_samples)
        self._epoch, self._epoch_samples = 0.0, 0
        return mean

    def epoch_mean(self, world: FloatGatherer) -> float | None:
        """Mean loss of the epoch so far. Collective."""
        return _mean_over_ranks(world, float(self._epoch), self._epoch_samples)

    def state(self) -> list[float]:
        """This rank's sums. Waits for the device."""
        return [float(self._epoch), self._epoch_samples, float(self._recent), self._recent_samples]

    def load(self, state: list[float]) -> None:
        self._epoch, self._recent = state[0], state[2]
        self._epoch_samples, self._recent_samples = int(state[1]), int(state[3])


def _mean_over_ranks(world: FloatGatherer, total: float, count: int) -> float | None:
    totals, counts = zip(*world.gather_floats([total, float(count)]), strict=True)
    return _total(totals) / sum(counts) if sum(counts) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """Stops a run whose monitored metric has not improved for some epochs."""

    patience: int
    """Evaluations in a row without an improvement after which the run stops."""
    min_delta: float = 0.0
    """A smaller change than this is no improvement; in the metric's unit."""

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ConfigError(f"EarlyStopping needs patience >= 1 and min_delta >= 0, got {self}.")


def is_better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a monitored value beats the best so far; NaN beats nothing and anything beats no value."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def as_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device; on the CPU where the device has none (MPS)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


def _require_same_shape(metric: Metric, **tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1:
        found = ", ".join(f"{name} has shape {shape}" for name, shape in zip(tensors, shapes, strict=True))
        raise ConfigError(f"{type(metric).__name__}: {found}; shapes are never broadcast, reshape one of them")


def _total(values: Iterable[float]) -> float:
    """`math.fsum`, but infinities of both signs are NaN instead of an exception that ends an evaluation."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
