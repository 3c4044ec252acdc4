"""Ranks of a `dcp.save` or `async_save` of which one dies at a given change to the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dist_train as dt
from dist_train.checkpoint import dcp_writer
from dist_train.checkpoint.store import Operation, Store
from tests.support.forked import run_ranks

NAME = "step-1"
MODES = ("save", "thread", "process")


class Dying(dt.StorageWriter):
    """Kills its process before the so-manyth change that it makes to the disk; it goes to another process with that."""

    def __init__(self, path: Path, dies_at: int) -> None:
        super().__init__(path)
        self.dies_at = dies_at

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        seen: list[Operation] = []

        def kill(operation: Operation) -> None:
            seen.append(operation)
            if len(seen) == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        dcp_writer.Store = partial(Store, observer=kill)  # type: ignore[misc, assignment]
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)


def state_of(number: int) -> dict[str, Any]:
    w = torch.full((70, 3), float(number))
    if dist.is_initialized():
        w = distribute_tensor(w, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    return {"model": {"w": w, "plain": torch.full((5,), float(number))}, "number": number}


def save_and_die(root: str, mode: str, rank: int, dies_at: int) -> None:
    """On every rank: a save that is whole, then one in which `rank` dies; the others' errors are theirs to have."""
    warnings.simplefilter("ignore")
    path = Path(root) / NAME
    dcp.save(state_of(1), storage_writer=dt.StorageWriter(path))
    writer = Dying(path, dies_at if dist.get_rank() == rank else 0)
    with contextlib.suppress(CheckpointException, RuntimeError):
        if mode == "save":
            dcp.save(state_of(2), storage_writer=writer)
        else:
            kind = AsyncCheckpointerType.THREAD if mode == "thread" else AsyncCheckpointerType.PROCESS
            dcp.async_save(state_of(2), storage_writer=writer, async_checkpointer_type=kind).result(60)


def kill_in(root: Path, mode: str, rank: int, dies_at: int) -> int:
    """The number of the save that is whole afterwards."""
    with contextlib.suppress(AssertionError):  # a rank that was killed gives no answer
        run_ranks(save_and_die, 2, str(root), mode, rank, dies_at, deadline_seconds=60)
    return load(root)


def load(root: Path) -> int:
    state = {"model": {"w": torch.zeros(70, 3), "plain": torch.zeros(5)}, "number": None}
    dcp.load(state, storage_reader=dt.StorageReader(root / NAME))
    number = state["number"]
    assert isinstance(number, int)
    for key, value in state_of(number)["model"].items():
        assert torch.equal(state["model"][key], value)  # type: ignore[index]
    return number


def fail_on_one(root: str) -> list[Any]:
    """On every rank: a save for which rank 1 has no space, and what everybody is told; then one that goes through."""
    warnings.simplefilter("ignore")
    path, real = Path(root) / NAME, os.fsync

    def full(descriptor: int) -> None:
        if dist.get_rank() == 1 and ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = full
    told: dict[int, str] = {}
    try:
        dcp.save(state_of(1), storage_writer=dt.StorageWriter(path))
    except CheckpointException as error:
        told = {rank: str(why[0]) for rank, why in error.failures.items()}
    finally:
        os.fsync = real
    dist.barrier()
    left = os.listdir(root)
    dist.barrier()
    dcp.save(state_of(2), storage_writer=dt.StorageWriter(path))
    return [told, left, os.listdir(root)]


def disagree(root: str, mode: str) -> dict[int, str]:
    """On every rank: what everybody is told of a rank whose state cannot be saved, or who reads other bytes."""
    warnings.simplefilter("ignore")
    path = Path(root) / NAME
    try:
        if mode == "value":
            odd = {"odd": Path} if dist.get_rank() == 1 else {}
            dcp.save(state_of(1) | odd, storage_writer=dt.StorageWriter(path))
        else:
            dcp.save(state_of(1), storage_writer=dt.StorageWriter(path))
            dist.barrier()
            if dist.get_rank() == 1:
                os.truncate(next(path.glob("model-00001-*")), 5000)
            dist.barrier()
            dcp.load(state_of(0), storage_reader=dt.StorageReader(path))
    except CheckpointException as error:
        return {rank: f"{type(why[0]).__name__}: {why[0]}" for rank, why in error.failures.items()}
    return {}
