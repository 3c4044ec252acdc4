"""What `torch.distributed.checkpoint` does with a storage: each case is a function of a `Storage`, and returns what is
to be the same with torch's own files and with ours.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dist_train as dt

Case = Callable[["Storage"], Any]
REFUSED = "refused"


@dataclass(frozen=True)
class Storage:
    """One kind of storage, below one folder."""

    kind: str
    root: Path

    def writer(self, name: str | None = "a", **options: Any) -> Any:
        path = None if name is None else self.root / name
        return (dcp.FileSystemWriter if self.kind == "torch" else dt.StorageWriter)(path, **options)

    def reader(self, name: str = "a") -> Any:
        return (dcp.FileSystemReader if self.kind == "torch" else dt.StorageReader)(self.root / name)

    def save(self, state: Any, name: str = "a", **options: Any) -> Any:
        return dcp.save(state, storage_writer=self.writer(name), **options)

    def load(self, state: Any, name: str = "a", **options: Any) -> Any:
        dcp.load(state, storage_reader=self.reader(name), **options)
        return state

    def everything(self, name: str = "a", keys: set[str] | None = None) -> Any:
        """All that lies there, without a dictionary to be filled."""
        return _load_state_dict_from_keys(keys, storage_reader=self.reader(name))


def outcome(function: Callable[[], Any]) -> Any:
    """What a call gives, or that all ranks were refused it."""
    try:
        return function()
    except CheckpointException:
        return REFUSED


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blank(state: Any) -> Any:
    """The same structure, with other values."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return "nothing"


def nested() -> dict[str, Any]:
    """What a training script hands over."""
    return {
        "model": {"a.weight": numbers(5, 7), "a.bias": numbers(5, seed=1), "n": {"deep": numbers(2, seed=2)}},
        "optimizer": {
            "state": {"a.weight": {"exp_avg": numbers(5, 7, seed=3), "step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.weight", "a.bias"], "fused": None}],
        },
        "list": [1, [numbers(3, seed=4), 5], {"x": 6}],
        "epoch": 3,
        "name": "ü / $ . ~",
        "loss": [0.5, float("inf"), -0.0],
        "model/odd": numbers(2, seed=5),
        "dcp/odd": numbers(2, seed=6),
        "$": {"$": numbers(1, seed=7)},
    }


class RenamingSave(DefaultSavePlanner):
    """Of planner.py's docstring."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        renamed = {f"foo_{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class RenamingLoad(DefaultLoadPlanner):
    """Of planner.py's docstring."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.original_state_dict = state_dict
        self.state_dict = {f"foo_{key}": value for key, value in state_dict.items()}
        self.mappings = {key: (key,) for key in self.state_dict}
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: Any, value: Any) -> None:
        key = read_item.dest_index.fqn.removeprefix("foo_")
        self.original_state_dict[key] = torch.load(value, weights_only=False)


class HalvingSave(DefaultSavePlanner):
    """Of planner.py's docstring: float16 on disk."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        return data if write_item.type == WriteItemType.BYTE_IO else data.to(torch.float16)


class QuietlyHalvingSave(DefaultSavePlanner):
    """The same, without announcing it."""

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        return data if write_item.type == WriteItemType.BYTE_IO else data.to(torch.float16)


class BalancingSave(DefaultSavePlanner):
    """Of planner.py's docstring: the coordinator's items, dealt out to all ranks."""

    def create_global_plan(self, all_plans: Any) -> Any:
        dealt = zip_longest(*[iter(all_plans[0].items)] * len(all_plans))
        per_rank = [[item for item in items if item is not None] for items in zip(*dealt, strict=True)]
        dealt_plans = [replace(plan, items=items) for plan, items in zip(all_plans, per_rank, strict=True)]
        return super().create_global_plan(dealt_plans)


class NotingSave(DefaultSavePlanner):
    """Of planner.py's docstring: data of each rank in the metadata; and what the storage says of itself."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.told = Path(storage_meta.checkpoint_id).name

    def create_local_plan(self) -> Any:
        return replace(super().create_local_plan(), planner_data={"told": self.told})

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=[plan.planner_data for plan in plans])


class Materialising(DefaultLoadPlanner):
    """Of planner.py's docstring: the tensor that is filled is made when it is asked for."""

    def resolve_tensor(self, read_item: Any) -> Any:
        return torch.empty_like(super().resolve_tensor(read_item), device="cpu")

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = tensor


def forget_plans() -> None:
    """Of a planner that keeps its plans for the next save: they are kept by class, whatever storage they are for."""
    for name in vars(SavePlanner):
        if name.startswith("_cached_"):
            getattr(SavePlanner, name).clear()


# One process


def round_trip(storage: Storage) -> Any:
    storage.save(nested())
    return storage.load(blank(nested()))


def without_a_dictionary(storage: Storage) -> Any:
    storage.save(nested())
    return [storage.everything(), storage.everything(keys={"epoch", "model.a.bias", "optimizer"})]


def with_the_empty_planner(storage: Storage) -> Any:
    storage.save(nested())
    filled: dict[str, Any] = {}
    dcp.state_dict_loader._load_state_dict(filled, storage.reader(), no_dist=True, planner=_EmptyStateDictLoadPlanner())
    return filled


def not_flattened(storage: Storage) -> Any:
    storage.save(nested(), planner=DefaultSavePlanner(flatten_state_dict=False))
    return storage.load(blank(nested()), planner=DefaultLoadPlanner(flatten_state_dict=False))


def renaming_planners(storage: Storage) -> Any:
    state = {"weight": numbers(3, 4), "epoch": 7}
    storage.save(state, planner=RenamingSave())
    planner = RenamingLoad()
    return [storage.load(blank(state), planner=planner), list(planner.metadata.state_dict_metadata)]


def casting_planners(storage: Storage) -> Any:
    state = {"weight": numbers(3, 4), "epoch": 7}
    storage.save(state, "announced", planner=HalvingSave())
    storage.save(state, "quiet", planner=QuietlyHalvingSave())
    return [[storage.load(blank(state), name), storage.everything(name)] for name in ("announced", "quiet")]


def noting_planner(storage: Storage) -> Any:
    storage.save({"weight": numbers(2)}, planner=NotingSave())
    return storage.reader().read_metadata().planner_data


def materialising_planner(storage: Storage) -> Any:
    storage.save({"weight": numbers(3, 4)})
    return storage.load({"weight": torch.empty(3, 4)}, planner=Materialising())


def on_the_meta_device(storage: Storage) -> Any:
    storage.save({"weight": numbers(3, 4)})
    with patch.object(dist.distributed_c10d, "_get_pg_default_device", lambda: torch.device("cpu")):
        state = {"weight": torch.empty(3, 4, device="meta")}
        return outcome(lambda: storage.load(state))


def partial_load(storage: Storage) -> Any:
    storage.save({"a": numbers(2), "b": 1})
    wanted = {"a": torch.zeros(2), "c": torch.ones(3)}
    lenient = storage.load(dict(wanted), planner=DefaultLoadPlanner(allow_partial_load=True))
    return [lenient, outcome(lambda: storage.load(dict(wanted))), storage.load({"b": None})]


def a_wrong_size_is_refused(storage: Storage) -> Any:
    storage.save({"a": numbers(2, 3)})
    targets = [torch.zeros(3, 2), torch.zeros(2, 3, 1), torch.zeros(6)]
    return [outcome(partial(storage.load, {"a": target})) for target in targets]


class Counting:
    """Has a state, and is no tensor."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": [1, 2], "seen": {"a", "b"}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def stateful_objects(storage: Storage) -> Any:
    model, optimizer = trained()
    storage.save({"model": model, "optimizer": optimizer, "counting": Counting(5)})
    other, fresh = trained(steps=1, seed=1)
    counting = Counting(0)
    storage.load({"model": other, "optimizer": fresh, "counting": counting})
    return [other.state_dict(), fresh.state_dict(), counting.count]


def trained(steps: int = 2, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(numbers(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def model_and_optimizer_states(storage: Storage) -> Any:
    """torch.distributed.checkpoint.state_dict, as torchtitan uses it."""
    model, optimizer = trained()
    storage.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    other, fresh = trained(seed=1)
    state = storage.load(dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True)))
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return [other.state_dict(), fresh.state_dict()]


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def every_dtype(storage: Storage) -> Any:
    state = {str(dtype): (numbers(3, 5) * 9).to(dtype) for dtype in DTYPES}
    storage.save(state)
    return [storage.load(blank(state)), storage.everything()]


def odd_tensors(storage: Storage) -> Any:
    base = numbers(6, 8)
    state = {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "view": base[2],
        "expanded": base[:1].expand(4, 8),
        "channels_last": numbers(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.complex(numbers(3), numbers(3, seed=1)).conj(),
        "parameter": nn.Parameter(base),
        "a@0,0": numbers(1),
        "large": numbers(3_000_000),
        "large_transposed": numbers(3000, 1000).t(),
    }
    storage.save(state)
    return storage.load({key: torch.empty(value.shape, dtype=value.dtype) for key, value in state.items()})


def into_another_form(storage: Storage) -> Any:
    """The target may have another dtype or memory order, or be a view."""
    storage.save({"a": numbers(4, 6)})
    whole = torch.zeros(8, 12, dtype=torch.float64)
    targets = [torch.zeros(6, 4).t(), torch.zeros(4, 6, dtype=torch.bfloat16), whole[::2, ::2]]
    return [*(storage.load({"a": target})["a"] for target in targets), whole]


def plain_values(storage: Storage) -> Any:
    state = {
        "tuple": (1, "two", (3.0, None)),
        "with_tensor": (numbers(3), {"k": [numbers(2, seed=1)]}),
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "complex_keys": {1: "one", 2: {3: "three"}},
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "numpy_scalar": np.float32(1.5),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "long": 1 << 80,
        "nan": float("nan"),
        "empty": ((), [], {}, ""),
        "rng": torch.get_rng_state().new_ones(16),
    }
    storage.save(state)
    return storage.load(blank(state))


def one_writer_for_many_saves(storage: Storage) -> Any:
    writer = storage.writer("first")
    dcp.save({"a": numbers(2)}, storage_writer=writer)
    for step in (2, 3):
        dcp.save({"a": numbers(2, seed=step)}, storage_writer=writer, checkpoint_id=storage.root / f"step-{step}")
    dcp.save({"a": numbers(2, seed=4)}, storage_writer=writer)  # of the last id once more
    reader = storage.reader("first")
    loaded = [storage.load({"a": torch.zeros(2)}, "first")]
    for step in (2, 3):
        state = {"a": torch.zeros(2)}
        dcp.load(state, storage_reader=reader, checkpoint_id=str(storage.root / f"step-{step}"))
        loaded.append(state)
    return loaded


def overwriting(storage: Storage) -> Any:
    storage.save({"a": numbers(5), "old": 1})
    storage.save({"a": numbers(3, seed=1)})
    refusing = storage.writer(overwrite=False)
    third = outcome(lambda: dcp.save({"a": numbers(4)}, storage_writer=refusing))
    fresh = dcp.save({"a": numbers(4)}, storage_writer=storage.writer("b", overwrite=False))
    return [third, storage.everything(), list(fresh.state_dict_metadata), storage.everything("b")]


def what_save_returns(storage: Storage) -> Any:
    returned = storage.save(nested())
    read = storage.reader().read_metadata()
    assert returned.storage_meta.checkpoint_id == storage.root / "a"
    assert read.storage_meta.load_id
    tables = [
        {
            key: (value.size, value.properties.dtype, sorted((tuple(c.offsets), tuple(c.sizes)) for c in value.chunks))
            if hasattr(value, "chunks")
            else "bytes"
            for key, value in one.state_dict_metadata.items()
        }
        for one in (returned, read)
    ]
    return [*tables, read.planner_data]


def cached_plans(storage: Storage) -> Any:
    forget_plans()
    try:
        return [_save_with_cached_plans(storage, step) for step in range(4)]
    finally:
        forget_plans()


def _save_with_cached_plans(storage: Storage, step: int) -> Any:
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = {"a": numbers(4, 3, seed=step), "step": step, **({"new": numbers(2, seed=rank)} if step == 3 else {})}
    storage.save(state, f"step-{step}", planner=DefaultSavePlanner(enable_plan_caching=True))
    return storage.everything(f"step-{step}")


def ids_that_are_accepted(storage: Storage) -> Any:
    kind = type(storage.writer())
    ids = [storage.root / "x", str(storage.root / "x"), "s3://bucket/x", "/proc/none/x"]
    return [kind.validate_checkpoint_id(one) for one in ids]


def deprecated_functions(storage: Storage) -> Any:
    dcp.save_state_dict({"a": numbers(3), "b": 1}, storage.writer(), no_dist=True)
    state = {"a": torch.zeros(3), "b": 0}
    dcp.load_state_dict(state, storage.reader(), no_dist=True)
    return state


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


ALONE: list[Case] = [
    round_trip,
    without_a_dictionary,
    with_the_empty_planner,
    not_flattened,
    renaming_planners,
    casting_planners,
    noting_planner,
    materialising_planner,
    on_the_meta_device,
    partial_load,
    a_wrong_size_is_refused,
    stateful_objects,
    model_and_optimizer_states,
    every_dtype,
    odd_tensors,
    into_another_form,
    plain_values,
    one_writer_for_many_saves,
    overwriting,
    what_save_returns,
    cached_plans,
    ids_that_are_accepted,
    deprecated_functions,
    in_a_thread,
]


# Several ranks: what a case returns is compared rank by rank


def replicas(storage: Storage) -> Any:
    """Equal keys are written once; which rank's value it is follows from the plan, or is the lowest rank's."""
    state = {f"t{index}": numbers(index + 1, seed=dist.get_rank()) for index in range(5)} | {"rank": dist.get_rank()}
    storage.save(state, "spread")
    storage.save(state, "lowest", planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    return [storage.load(blank(state), name) for name in ("spread", "lowest")]


def balanced(storage: Storage) -> Any:
    state = {f"t{index}": numbers(3, seed=index) for index in range(2 * dist.get_world_size())}
    storage.save(state, planner=BalancingSave())
    return storage.load(blank(state))


def own_keys(storage: Storage) -> Any:
    """A key that only one rank has."""
    rank = dist.get_rank()
    storage.save({"common": numbers(3), f"rank-{rank}": numbers(2, seed=rank), f"n{rank}": rank})
    return storage.load({"common": torch.zeros(3), f"rank-{rank}": torch.zeros(2), f"n{rank}": None})


def sharded(*sizes: int, placements: Any, shape: tuple[int, ...], seed: int = 0) -> DTensor:
    mesh = init_device_mesh("cpu", sizes)
    return distribute_tensor(numbers(*shape, seed=seed), mesh, placements)


def layouts() -> dict[str, Callable[[], torch.Tensor]]:
    world = dist.get_world_size()
    mixed = {
        "2d": lambda: sharded(2, 2, placements=[Shard(0), Shard(1)], shape=(7, 5)),
        "hybrid": lambda: sharded(2, 2, placements=[Replicate(), Shard(0)], shape=(7, 5)),
        "twice": lambda: sharded(2, 2, placements=[Shard(0), Shard(0)], shape=(7, 5)),
    }
    return {
        "rows": lambda: sharded(world, placements=[Shard(0)], shape=(7, 5)),
        "columns": lambda: sharded(world, placements=[Shard(1)], shape=(7, 5)),
        "replicated": lambda: sharded(world, placements=[Replicate()], shape=(7, 5)),
        "plain": lambda: numbers(7, 5),
        **(mixed if world == 4 else {}),
    }


def resharding(storage: Storage) -> Any:
    """Every layout into every other one."""
    small = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(1,))
    storage.save({name: make() for name, make in layouts().items()} | {"small": small})
    loaded = {}
    for target, make in layouts().items():
        state = storage.load({source: blank(make()) for source in layouts()} | {"small": torch.zeros(1)})
        loaded[target] = {name: local(value) for name, value in state.items()}
    return loaded


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fsdp(storage: Storage) -> Any:
    torch.manual_seed(0)
    model, optimizer = fsdp_trained(0)
    storage.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    other, fresh = fsdp_trained(1)
    state = storage.load(dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True)))
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    exp_avg = [one["exp_avg"] for one in fresh.state.values()]
    whole = storage.everything()
    return [[local(p.detach()) for p in other.parameters()], [local(one) for one in exp_avg], whole]


def fsdp_trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(numbers(4, 6)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def sharded_tensors(storage: Storage) -> Any:
    """The kind before DTensor."""
    from torch.distributed._shard.sharded_tensor import Shard as OldShard
    from torch.distributed._shard.sharded_tensor import ShardMetadata, init_from_local_shards

    rank, world = dist.get_rank(), dist.get_world_size()

    def make(values: torch.Tensor) -> Any:
        place = ShardMetadata(shard_offsets=[2 * rank, 0], shard_sizes=[2, 3], placement=f"rank:{rank}/cpu")
        return init_from_local_shards([OldShard(values, place)], (2 * world, 3))

    storage.save({"old": make(numbers(2, 3, seed=rank))})
    state = storage.load({"old": make(torch.zeros(2, 3))})
    whole = storage.load({"old": torch.zeros(2 * world, 3)})
    return [state["old"].local_shards()[0].tensor, whole]


def in_groups(storage: Storage) -> Any:
    """Two groups at once, each with a checkpoint of its own; then the first group's, by everybody."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    mine = rank // half
    state = {"t": numbers(4, seed=mine), "u": numbers(4, seed=mine + 5), "group": mine}
    storage.save(state, f"group-{mine}", process_group=groups[mine])
    dist.barrier()
    loaded = storage.load(blank(state), f"group-{mine}", process_group=groups[mine])
    return [loaded, storage.load(blank(state), "group-0")]


def alone_in_a_world(storage: Storage) -> Any:
    """`no_dist`: each rank has a checkpoint of its own, of all that it holds."""
    rank = dist.get_rank()
    state = {"t": numbers(4, seed=rank), "rank": rank}
    storage.save(state, f"rank-{rank}", no_dist=True)
    return storage.load(blank(state), f"rank-{rank}", no_dist=True)


def without_collectives(storage: Storage) -> Any:
    """Each rank's metadata and parts, under one path."""
    rank = dist.get_rank()
    weight = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5))
    state = {"w": weight, "t": numbers(3, seed=rank), "rank": rank}
    for _ in range(2):
        storage.save(state, use_collectives=False)
    loaded = storage.load({"w": blank(weight), "t": torch.zeros(3), "rank": None})
    return [local(loaded["w"]), loaded["t"], loaded["rank"]]


def a_rank_that_fails(storage: Storage) -> Any:
    """Everybody learns of it, and the next save goes through."""

    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if dist.get_rank() == 1:
                raise ValueError("this rank has had enough")
            return super().resolve_data(write_item)

    state = {"w": sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5))}
    failed = outcome(lambda: storage.save(state, "x", planner=Failing()))
    storage.save(state, "x")
    return [failed, storage.load({"w": torch.zeros(7, 5)}, "x")]


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


TOGETHER: list[Case] = [
    round_trip,
    replicas,
    balanced,
    own_keys,
    resharding,
    fsdp,
    sharded_tensors,
    in_groups,
    alone_in_a_world,
    without_collectives,
    a_rank_that_fails,
    cached_plans,
    overwriting,
    in_threads,
]


def run_case(name: str, root: str, kinds: tuple[str, ...] = ("torch", "ours")) -> dict[str, Any]:
    """Kind of storage -> what a case returns."""
    case: Case = globals()[name]
    results = {}
    for kind in kinds:
        folder = Path(root) / f"{name}-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        results[kind] = case(Storage(kind, folder))
        if dist.is_initialized():
            dist.barrier()
        left = [one.name for one in folder.iterdir() if one.name.startswith(".")]
        assert kind == "torch" or not left, f"{name} left {left}"
    return results


def run_all(root: str, names: list[str]) -> dict[str, bytes]:
    """On every rank: each case's results, as bytes, since tensors do not pass a pipe of processes that end."""
    saved = {}
    for name in names:
        data = io.BytesIO()
        torch.save(run_case(name, root), data)
        saved[name] = data.getvalue()
        dist.barrier()
    return saved


def run_alone(name: str) -> dict[str, Any]:
    root = tempfile.mkdtemp(prefix="dcp-")
    try:
        return run_case(name, root)
    finally:
        shutil.rmtree(root)
