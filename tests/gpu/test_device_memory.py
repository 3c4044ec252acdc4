"""A save and a resume take no memory of the device but what training has there: the state that a resume makes, once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dist_train as dt
from tests.support.on_device import make_lone_group

pytestmark = pytest.mark.gpu

WIDTH, LAYERS = 4096, 8
WEIGHTS_MB = LAYERS * WIDTH * WIDTH * 4 / 1e6
BUFFER_MB = 32
"""Norms, counters, what the allocator rounds up; a layer is twice that, so that a copy of one would show."""
POLICY = dt.CheckpointPolicy(at_end=False)


@pytest.fixture(autouse=True)
def nothing_of_others() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.device("cuda"):
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    if kind == "sharded":
        make_lone_group("cuda")
        fully_shard(model)
    fused = kind == "fused"
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused, foreach=False)


def allocated_mb() -> float:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / 1e6


def peak_mb() -> float:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def save(folder: str, kind: str) -> list[float]:
    """What each of two saves took beyond what was allocated."""
    model, optimizer = build(kind)
    extra = []
    with dt.Run(folder, model=model, optimizer=optimizer, policy=POLICY) as run:
        for _ in run.epochs(1):
            for _ in range(2):
                update(model, optimizer)
                run.step()
                before = allocated_mb()
                torch.cuda.reset_peak_memory_stats()
                run.save(wait=True)
                extra.append(peak_mb() - before)
            break
    assert before >= 3 * WEIGHTS_MB, "the moments are not on the device"
    return extra


@pytest.mark.parametrize("kind", ["plain", "fused", "sharded"])
def test_neither_a_save_nor_a_resume_holds_a_second_copy_on_the_device(kind: str, tmp_path: Path) -> None:
    extra = save(str(tmp_path), kind)
    assert max(extra) <= BUFFER_MB, f"{extra} MB"
    gc.collect()
    model, optimizer = build(kind)
    before = allocated_mb()
    torch.cuda.reset_peak_memory_stats()
    with dt.Run(str(tmp_path), model=model, optimizer=optimizer, resume="must", policy=POLICY) as run:
        after, peak = allocated_mb(), peak_mb()
        assert run.global_step == 2
        told = f"{before:.0f} MB before, {after:.0f} after, at most {peak:.0f}"
        print(told)
        assert after - before >= 2 * WEIGHTS_MB * 0.99, told
        assert peak <= before + 2 * WEIGHTS_MB + BUFFER_MB, told
        torch.cuda.reset_peak_memory_stats()
        update(model, optimizer)
        assert peak_mb() >= peak, "training itself takes more than a resume does"


def test_a_second_copy_would_be_noticed(tmp_path: Path) -> None:
    """The figures above can fail."""
    model, optimizer = build("plain")
    update(model, optimizer)
    before = allocated_mb()
    torch.cuda.reset_peak_memory_stats()
    copies = [parameter.detach().clone() for parameter in model.parameters()]
    del copies
    assert peak_mb() > before + WEIGHTS_MB * 0.99 > before + BUFFER_MB
