"""Cases in which the planner is another one: those of planner.py's docstrings, and what torch's own can be told."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import WriteItemType

from tests.support.dcp_storages import Storage, blank, forget_plans, nested, numbers, outcome


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


class GivingAway(DefaultSavePlanner):
    """Keeps nothing that it has handed over, to need less memory."""

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        del self.state_dict[write_item.index.fqn]
        return data


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


class FailingSave(DefaultSavePlanner):
    """On the last rank, when its data are asked for."""

    def resolve_data(self, write_item: Any) -> Any:
        if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
            raise ValueError("this rank has had enough")
        return super().resolve_data(write_item)


class Materialising(DefaultLoadPlanner):
    """Of planner.py's docstring: the tensor that is filled is made when it is asked for."""

    def resolve_tensor(self, read_item: Any) -> Any:
        return torch.empty_like(super().resolve_tensor(read_item), device="cpu")

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = tensor


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


def each_asked_for_once(storage: Storage) -> Any:
    planner = GivingAway()
    storage.save({"w": numbers(30, 4), "t": numbers(5, 6).t(), "e": torch.empty(0), "n": 7}, planner=planner)
    return [planner.state_dict.keys() - {"e"}, storage.everything()]


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


CASES = [
    without_a_dictionary,
    with_the_empty_planner,
    not_flattened,
    renaming_planners,
    casting_planners,
    noting_planner,
    each_asked_for_once,
    materialising_planner,
    on_the_meta_device,
    partial_load,
    cached_plans,
]
