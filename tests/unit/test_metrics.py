"""Metrics against their definitions, and the same value however the samples are split."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.errors import ConfigError
from dist_train.metrics import MAE, SMAPE, Accuracy, Mean, Metric

finite = st.floats(-1e6, 1e6, width=32)


@dataclass
class FakeWorld:
    """Answers with the other ranks' lists after our own."""

    others: list[list[float]] = field(default_factory=list)

    def gather_floats(self, values: list[float]) -> list[list[float]]:
        return [values, *self.others]


def value_of(metric: Metric, prediction: Tensor, target: Tensor) -> float:
    metric.update(prediction, target)
    return metric.compute()


def test_smape_follows_its_definition() -> None:
    assert value_of(SMAPE(), torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])) == 50.0
    assert value_of(SMAPE(), torch.tensor([-1.0]), torch.tensor([1.0])) == 200.0


def test_smape_counts_zero_against_zero_as_right() -> None:
    assert value_of(SMAPE(), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 5.0])) == 100.0


def test_mae_follows_its_definition() -> None:
    assert value_of(MAE(), torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]])) == 1.5


def test_accuracy_takes_scores_or_classes() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert value_of(Accuracy(), scores, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
    assert value_of(Accuracy(), torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)


def test_mean_weighs_each_value() -> None:
    metric = Mean()
    metric.update(torch.tensor(2.0), 3)
    metric.update(6.0)
    assert metric.compute() == 3.0
    metric.update(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]))
    assert metric.sums() == [20.0, 8.0]
    metric.update(torch.tensor([1.0, 1.0]), torch.tensor(2.0))
    assert metric.sums() == [24.0, 12.0]


@pytest.mark.parametrize("metric", [MAE(), SMAPE(), Accuracy(), Mean()])
@pytest.mark.parametrize(("first", "second"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (1,)), ((4, 3, 2), (4, 2))])
def test_shapes_that_differ_are_refused_and_named(
    metric: Metric, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        metric.update(torch.zeros(first), torch.zeros(second))
    assert str(first) in str(caught.value)
    assert str(second) in str(caught.value)
    assert metric.sums() == [0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(pairs=st.lists(st.tuples(finite, finite), min_size=1, max_size=40), data=st.data())
@pytest.mark.parametrize("make", [MAE, SMAPE, Accuracy])
def test_any_split_over_batches_and_ranks_gives_the_same_value(
    make: Callable[[], Metric], pairs: list[tuple[float, float]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(pairs)), max_size=4)))
    bounds = [0, *cuts, len(pairs)]
    columns = torch.tensor(pairs)
    whole, ranks = make(), [make() for _ in bounds[1:]]
    whole.update(columns[:, 0], columns[:, 1])
    for rank, start, stop in zip(ranks, bounds, bounds[1:], strict=False):
        rank.update(columns[start:stop, 0], columns[start:stop, 1])
    world = FakeWorld([rank.sums() for rank in ranks[1:]])
    assert ranks[0].compute(world) == pytest.approx(whole.compute(), rel=1e-12, abs=1e-12)


def test_a_long_evaluation_in_half_precision_is_summed_in_float64() -> None:
    metric = MAE()
    for _ in range(1000):
        metric.update(torch.full((100,), 3.0, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.bfloat16))
    assert metric.sums() == [300_000.0, 100_000.0]


def test_nothing_counted_is_nan_and_a_rank_without_samples_still_takes_part() -> None:
    assert math.isnan(MAE().compute())
    assert math.isnan(MAE().compute(FakeWorld([[0.0, 0.0]])))
    assert MAE().compute(FakeWorld([[6.0, 3.0]])) == 2.0


def test_reset_forgets() -> None:
    metric = MAE()
    metric.update(torch.ones(3), torch.zeros(3))
    metric.reset()
    assert metric.sums() == [0.0, 0.0]


def test_metrics_keep_no_graph() -> None:
    metric, mean = MAE(), Mean()
    prediction = torch.ones(3, requires_grad=True)
    metric.update(prediction, torch.zeros(3))
    mean.update(prediction.sum(), prediction.sum())
    assert not any(
        isinstance(part, Tensor) and part.requires_grad for part in [*vars(metric).values(), *vars(mean).values()]
    )


def test_updates_inside_and_outside_of_inference_mode_add_up() -> None:
    metric = MAE()
    with torch.inference_mode():
        metric.update(torch.ones(1), torch.zeros(1))
    metric.update(torch.ones(1), torch.zeros(1))
    assert metric.sums() == [2.0, 2.0]


def test_a_diverged_rank_makes_nan_not_an_exception() -> None:
    assert math.isnan(Mean().compute(FakeWorld([[math.inf, 1.0], [-math.inf, 1.0]])))
    assert math.isnan(value_of(SMAPE(), torch.tensor([math.nan]), torch.tensor([1.0])))


def test_a_metric_that_defines_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match="values"):
        Metric().update(torch.ones(1), torch.ones(1))


class NoReads(TorchDispatchMode):
    """Fails on every operation that makes the host wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("metric", [MAE(), SMAPE(), Accuracy(), Mean()])
def test_updating_does_not_wait_for_the_device(metric: Metric) -> None:
    tensors = torch.ones(3), torch.ones(3)
    with NoReads():
        metric.update(*tensors)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            metric.sums()
