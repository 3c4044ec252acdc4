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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_train as dt
from dist_train.checkpoint import snapshot
from dist_train.checkpoint.boxes import local_part
from dist_train.checkpoint.reader import CheckpointReader
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


def give_large_blocks_back() -> None:
    """Left alone glibc learns to keep large blocks on its heap, whose holes differ from run to run by some 12 MB. From
    now on in this process a block of 128 KiB is the kernel's again when it is freed.
    """
    m_mmap_threshold = -3  # of malloc.h
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 << 10) == 1


def build(megabytes: int) -> nn.Module:
    """Layers of just below 1 MiB, hundreds of them, and last, when all else has its memory, one of a quarter of it."""
    torch.manual_seed(0)
    large = nn.Linear(512, megabytes * 122, bias=False)
    return nn.Sequential(*(nn.Linear(512, 511) for _ in range(megabytes * 3 // 4)), large)


def model_of(megabytes: int, *, kind: str) -> nn.Module:
    """`sharded` by rows (FSDP2), `meta` (the same before it has any memory), by `columns` (DTensor), or `plain` under
    DistributedDataParallel.
    """
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = build(megabytes)
    if kind == "plain":
        return DistributedDataParallel(model)
    if kind == "columns":
        return cut_columns(model)
    fully_shard(model)
    return model.to_empty(device="cpu") if kind == "meta" else model


def cut_columns(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            placement = Shard(1) if parameter.dim() > 1 else Replicate()
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    return model


def gather_whole_parameters() -> None:
    """What must never be done, in this process from now on: a save gathers each parameter, a load reads all of it."""

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            tensor.detach().full_tensor()
        return local_part(tensor)

    def fill(reader: CheckpointReader, name: str, target: torch.Tensor) -> None:
        if isinstance(target, DTensor):
            whole = torch.empty(tuple(target.shape), dtype=target.dtype)
            reader.fill_box(name, whole, (0,) * whole.dim(), tuple(whole.shape))
        fill_part(reader, name, target)

    fill_part = CheckpointReader.fill
    snapshot.local_part = gather
    CheckpointReader.fill = fill  # type: ignore[method-assign]


def save(folder: str, megabytes: int, kind: str, gathers: bool = False) -> tuple[Peak, Peak]:
    """Peaks of a first save and of one more."""
    give_large_blocks_back()
    if gathers:
        gather_whole_parameters()
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


def resume(folder: str, megabytes: int, kind: str, gathers: bool = False) -> Peak:
    """The peak of a resume; with `meta`, of building the model, too."""
    give_large_blocks_back()
    if gathers:
        gather_whole_parameters()
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
