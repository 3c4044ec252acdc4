"""Buffers after a window that was left out: as they were before it, however the forward changes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.health.nonfinite import GradientGuard
from dist_train.health.policy import HealthPolicy


class Normed(nn.Module):
    """Its running mean is written into, replaced, or made by the first forward, which also grows a history."""

    mean: Any
    seen: Any

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.way = way
        self.register_buffer("mean", None if way == "made" else torch.zeros(2))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        before = torch.zeros(2) if self.mean is None else self.mean
        mean = 0.5 * before + batch.mean(0) + 0 * self.weight.detach()
        if self.way == "written":
            self.mean.copy_(mean)
        else:
            self.mean = mean
        if self.way != "written":
            self.seen = torch.cat([self.seen, batch.mean().reshape(1)])
        return ((self.weight + 1) * batch).sum()


def updated(way: str, lag: int, batches: list[torch.Tensor]) -> Normed:
    model = Normed(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"), models=[model], lag=lag)
    guard.open()
    for window, batch in enumerate(batches):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        guard.end_window(window)
        guard.find_bad()
    guard.close()
    return model


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("way", ["written", "replaced", "made"])
def test_a_window_that_was_left_out_shows_in_no_buffer(way: str, lag: int) -> None:
    bad, good = torch.full((3, 2), math.nan), [torch.full((3, 2), value) for value in (1.0, 2.0, 3.0)]
    model = updated(way, lag, [bad, good[0], good[1], bad, bad, good[2]])
    twin = updated(way, lag, good)
    assert torch.equal(model.mean, twin.mean)
    assert torch.equal(model.seen, twin.seen)
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_tensor_that_took_a_buffer_s_place_is_not_written_into(lag: int) -> None:
    """It may be the batch itself, or a view of the data."""

    class Last(nn.Linear):
        last: Any

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            self.last = batch
            return super().forward(batch)

    model = Last(2, 1)
    model.register_buffer("last", torch.zeros(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"), models=[model], lag=lag)
    guard.open()
    good, bad = torch.ones(3, 2), torch.full((3, 2), math.nan)
    for window, batch in enumerate([good, bad]):
        model(batch).sum().backward()
        optimizer.step()
        guard.end_window(window)
    guard.close()
    assert bool(bad.isnan().all())
    assert torch.equal(model.last, good)
