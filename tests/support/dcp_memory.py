"""One rank's peaks of memory in a `dcp.save` and a `dcp.load`; `run_ranks` calls these on every rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from tests.support.dcp_storages import Storage
from tests.support.sharded_memory import Peak, measured, model_of


def save(root: str, kind: str, megabytes: int, layout: str) -> Peak:
    """Peak of a save of a model in FSDP2's shards, or of whole tensors in the wrong memory order."""
    return _peak_of(root, kind, "save", state_of(megabytes, layout))


def load(root: str, kind: str, megabytes: int, layout: str) -> Peak:
    return _peak_of(root, kind, "load", state_of(megabytes, layout))


def state_of(megabytes: int, layout: str) -> dict[str, Any]:
    if layout == "transposed":
        return {"model": {f"w{index}": torch.ones(1000, 2500).t() for index in range(megabytes // 10)}}
    return {"model": get_model_state_dict(model_of(megabytes, kind="sharded"))}


def _peak_of(root: str, kind: str, what: str, state: dict[str, Any]) -> Peak:
    warnings.simplefilter("ignore")
    storage, peak = Storage(kind, Path(root)), Peak()
    with measured(peak):
        (storage.save if what == "save" else storage.load)(state)
        dist.barrier()
    return peak
