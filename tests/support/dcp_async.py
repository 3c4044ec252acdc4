"""Cases of `torch.distributed.checkpoint.async_save`: training goes on while it is saved."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.tensor import Shard

from tests.support.dcp_alone import Counting, trained
from tests.support.dcp_planners import FailingSave
from tests.support.dcp_storages import Storage, numbers
from tests.support.dcp_together import local, sharded


def in_a_thread(storage: Storage) -> Any:
    """Training goes on while it is saved."""
    writer, loaded = storage.writer(), []
    for step in range(2):
        weight = numbers(50, 40, seed=step)
        dcp.async_save({"w": weight, "step": step}, storage_writer=writer, checkpoint_id=storage.root / "a").result(60)
        future = dcp.async_save({"w": weight, "step": step}, storage_writer=writer)
        weight.zero_()
        future.result(60)
        loaded.append(storage.load({"w": torch.zeros(50, 40), "step": None}))
    return loaded


def of_objects(storage: Storage) -> Any:
    """What has a state_dict is asked for it before the call returns."""
    model, _ = trained()
    counting = Counting(5)
    future = dcp.async_save({"model": model, "counting": counting}, storage_writer=storage.writer())
    counting.count = 6
    future.result(60)
    return storage.everything()


def with_a_stager(storage: Storage) -> Any:
    """torch's own, in each of its ways that needs no GPU."""
    loaded = []
    for number, (shared, threaded) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        stager = DefaultStager(StagingOptions(False, shared, threaded, False))
        for step in range(2):
            state, name = {"w": weight(seed=step), "n": [step, {"deep": numbers(3, seed=step)}]}, f"{number}-{step}"
            options = {"storage_writer": storage.writer(name), "async_stager": stager}
            answer = dcp.async_save(state, **options)
            assert isinstance(answer, AsyncSaveResponse) == threaded
            if isinstance(answer, AsyncSaveResponse):
                answer.staging_completion.result(60)
            local(state["w"]).zero_()
            finished(answer)
            loaded.append(storage.load({"w": torch.zeros(7, 5), "n": [None, {"deep": torch.zeros(3)}]}, name))
        stager.close()
    return loaded


def finished(answer: Any) -> Any:
    future: Future[Any] = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer
    return future.result(60)


def weight(seed: int = 0) -> torch.Tensor:
    """Sharded where there are ranks to share it."""
    if not dist.is_initialized():
        return numbers(7, 5, seed=seed)
    return sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5), seed=seed)


def several_under_way(storage: Storage) -> Any:
    """Each with a writer of its own, none waited for."""
    saves = [
        dcp.async_save({"w": numbers(500, 100, seed=step), "n": step}, storage_writer=storage.writer(f"step-{step}"))
        for step in range(4)
    ]
    for save in saves:
        save.result(60)
    return [storage.load({"w": torch.zeros(500, 100), "n": None}, f"step-{step}") for step in range(4)]


def one_that_fails(storage: Storage) -> Any:
    """The future says so, and the next save goes through."""
    state = {"w": weight(), "n": 1}
    failed = dcp.async_save(state, storage_writer=storage.writer(), planner=FailingSave()).exception(60)
    assert isinstance(failed, CheckpointException)
    kinds = {rank: str(why[0]) for rank, why in failed.failures.items()}
    dcp.async_save(state, storage_writer=storage.writer()).result(60)
    return [kinds, storage.load({"w": torch.zeros(7, 5), "n": None})]


def in_threads(storage: Storage) -> Any:
    weight = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5))
    future = dcp.async_save({"w": weight, "t": numbers(3), "n": 1}, storage_writer=storage.writer())
    local(weight).zero_()
    future.result(60)
    return storage.load({"w": torch.zeros(7, 5), "t": torch.zeros(3), "n": None})


def in_processes(storage: Storage) -> Any:
    loaded = []
    writer = storage.writer(None if storage.kind == "ours" else "a")
    for step in range(2):
        weight = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5), seed=step)
        future = dcp.async_save(
            {"w": weight, "n": step},
            storage_writer=writer,
            checkpoint_id=storage.root / f"step-{step}",
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        future.result(100)
        loaded.append(storage.load({"w": torch.zeros(7, 5), "n": None}, f"step-{step}"))
    return loaded


def on_a_gpu(storage: Storage, device: str = "cuda") -> Any:
    """Saved from there and loaded to there; staged in pinned memory, with torch's stager and in the writer's copy."""
    values = {"w": numbers(300, 200), "t": numbers(200, 300, seed=1).t(), "half": numbers(9, seed=2).bfloat16()}
    state = {key: value.to(device) for key, value in values.items()}
    is_gpu = device == "cuda"
    storage.save(state, "at-once")
    stager = DefaultStager(StagingOptions(is_gpu, is_gpu, is_gpu, is_gpu))
    finished(dcp.async_save(state, storage_writer=storage.writer("staged"), async_stager=stager))
    stager.close()
    writer = storage.writer("copied", cache_staged_state_dict=is_gpu)
    for _ in range(2):
        finished(dcp.async_save(state, storage_writer=writer))
    loaded = [
        storage.load({key: torch.zeros_like(value) for key, value in state.items()}, name)
        for name in ("at-once", "staged", "copied")
    ]
    assert all(value.device.type == device for one in loaded for value in one.values())
    return [{key: value.cpu() for key, value in one.items()} for one in loaded]


ALONE = [in_a_thread, of_objects, with_a_stager, several_under_way, one_that_fails]
TOGETHER = [in_threads, with_a_stager, one_that_fails]
IN_PROCESSES = [in_processes]
ON_A_GPU = [on_a_gpu]
