"""Replicas in one process: what evaluation puts back, and models that are not DistributedDataParallel.

DDP itself is in tests/distributed/test_world.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.replicas import broadcast_buffers, evaluating, fix_bucket_layout
from dist_train.rng import capture_rng
from dist_train.world import SoloWorld
from tests.support.small_run import small_model


class TwoRanks(SoloWorld):
    """As a rank that receives: each tensor is overwritten by the main rank's, here 7."""

    world_size, rank = 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        tensor.fill_(7)
        self.received += 1


def test_a_plain_model_needs_no_bucket_layout() -> None:
    model = small_model()
    before, rng = [parameter.clone() for parameter in model.parameters()], capture_rng()
    fix_bucket_layout(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert capture_rng() == rng


def test_alone_no_buffer_is_broadcast() -> None:
    model = small_model()
    before = [buffer.clone() for buffer in model.buffers()]
    broadcast_buffers(model, SoloWorld())
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_every_buffer_is_taken_from_the_main_rank() -> None:
    model, world = small_model(), TwoRanks()
    broadcast_buffers(model, world)
    assert world.received == len(list(model.buffers())) == 3
    assert all((buffer == 7).all() for buffer in model.buffers())


def test_evaluating_uses_the_main_ranks_buffers() -> None:
    model = small_model()
    with evaluating(model, TwoRanks()) as inner:
        assert all((buffer == 7).all() for buffer in inner.buffers())


def test_evaluating_gives_the_unwrapped_model_in_eval_mode_without_gradients() -> None:
    model = small_model()
    with evaluating(nn.DataParallel(model), SoloWorld()) as inner:
        assert inner is model
        assert not any(module.training for module in inner.modules())
        assert not inner(torch.ones(2, 3)).requires_grad
    assert all(module.training for module in model.modules())


def test_evaluating_puts_each_modules_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].eval()
    with pytest.raises(RuntimeError, match="half way"), evaluating(model, SoloWorld()):
        raise RuntimeError("half way")
    assert [module.training for module in model.modules()] == [True, True, False, False]
