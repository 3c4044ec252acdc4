"""One rank's peaks of memory while a sharded model is saved or resumed; `run_ranks` calls these on every rank.

A peak is what came on top of the memory that the process had at the phase's beginning (what it had freed given back to
the kernel first): RssAnon + RssShmem as a thread samples them, and VmHWM, the kernel's own peak of everything resident,
mapped pages of files too, which it is told to forget before the phase.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dist_train as dt
from dist_train.run import Run
from tests.support import memory_run

Peak = dict[str, float]
"""In MB: `own` (RssAnon + RssShmem), `hwm`."""


@contextlib.contextmanager
def measured(peak: Peak) -> Iterator[None]:
    """Fills `peak` with what the phase took on top."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = memory_run.status()
    watch = memory_run.Watch()
    try:
        yield
    finally:
        peaks = watch.end()
        peak["own"] = (peaks["anon_shmem"] - before["RssAnon"] - before["RssShmem"]) / 1000
        peak["hwm"] = (peaks["hwm"] - before["VmRSS"]) / 1000


def model_of(megabytes: int, *, kind: str) -> nn.Module:
    """`sharded`, `meta` (sharded before it has any memory) or `plain` under DistributedDataParallel."""
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = memory_run.build(megabytes)
    if kind == "plain":
        return DistributedDataParallel(model)
    fully_shard(model)
    return model.to_empty(device="cpu") if kind == "meta" else model


def save(folder: str, megabytes: int, kind: str) -> tuple[Peak, Peak]:
    """Peaks of a first save and of one more."""
    first, second = Peak(), Peak()
    model = model_of(megabytes, kind=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with Run(folder, model=model, optimizer=optimizer, policy=dt.CheckpointPolicy(at_end=False)) as run:
        for _ in run.epochs(1):
            for peak in (first, second):
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 1e-3)
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                with measured(peak):
                    run.save(wait=True)
                    run.world.max([0], "whether the others have saved")
        assert run.committed_step == 2 or not run.world.is_main
    return first, second


def resume(folder: str, megabytes: int, kind: str) -> Peak:
    """The peak of a resume; with `meta`, of building the model, too."""
    peak = Peak()
    if kind != "meta":
        model = model_of(megabytes, kind=kind)
    with measured(peak):
        if kind == "meta":
            model = model_of(megabytes, kind=kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = Run(folder, model=model, optimizer=optimizer, resume="must", policy=dt.CheckpointPolicy(at_end=False))
        with run:
            for _ in run.epochs(run.epochs_completed):
                raise AssertionError("there is nothing left to train")
            assert run.global_step == 2
            first = next(iter(model.parameters()))
            assert optimizer.state[first]["exp_avg"].shape == first.shape
        dist.barrier()
    return peak
