"""What `torch.distributed.checkpoint` does with a storage: each case is a function of a `Storage`, and returns what is
to be the same with torch's own files and with ours. The cases stand in the modules that are imported here.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests.support import dcp_alone, dcp_async, dcp_planners, dcp_together
from tests.support.dcp_storages import Storage

Case = Callable[[Storage], Any]


def cases_of(*modules: ModuleType) -> dict[str, Case]:
    return {case.__name__: case for module in modules for case in module.CASES}


ALONE = cases_of(dcp_alone, dcp_planners) | {case.__name__: case for case in dcp_async.ALONE}
TOGETHER = cases_of(dcp_together) | {
    case.__name__: case
    for case in (dcp_alone.round_trip, dcp_alone.overwriting, dcp_planners.cached_plans, *dcp_async.TOGETHER)
}
IN_PROCESSES = {case.__name__: case for case in dcp_async.IN_PROCESSES}
ON_A_GPU = {case.__name__: case for case in dcp_async.ON_A_GPU}
RELAY = (4, 2, 3)
"""Numbers of ranks that save and load one after the other; see `dcp_together.pass_on`."""
_ALL: dict[str, Case] = ALONE | TOGETHER | IN_PROCESSES | ON_A_GPU


def run_case(name: str, root: str, kinds: tuple[str, ...] = ("torch", "ours")) -> dict[str, Any]:
    """Kind of storage -> what a case returns."""
    results = {}
    for kind in kinds:
        folder = Path(root) / f"{name}-{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        results[kind] = _ALL[name](Storage(kind, folder))
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
        if dist.is_initialized():
            dist.barrier()
    return saved


def run_relay(root: str, before: str | None, after: str | None) -> bytes:
    """On every rank of one of the worlds."""
    data = io.BytesIO()
    kinds = [Storage(kind, Path(root) / kind) for kind in ("torch", "ours")]
    torch.save({one.kind: dcp_together.pass_on(one, before, after) for one in kinds}, data)
    dist.barrier()
    return data.getvalue()
