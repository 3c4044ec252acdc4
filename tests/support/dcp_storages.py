"""The two kinds of storage that the cases of `dcp_cases` compare, and what they save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import dist_train as dt

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


def failures(function: Callable[[], Any]) -> Any:
    """Of a call that fails: each failing rank, and the kind of its error."""
    try:
        function()
    except CheckpointException as error:
        return {rank: type(why[0]).__name__ for rank, why in error.failures.items()}
    return "nothing failed"


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


def forget_plans() -> None:
    """Of a planner that keeps its plans for the next save: they are kept by class, whatever storage they are for."""
    for name in vars(SavePlanner):
        if name.startswith("_cached_"):
            getattr(SavePlanner, name).clear()
