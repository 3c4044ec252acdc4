"""A small `dcp.save` under one name, what a `dcp.load` of it gives, and what the user reads where that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import dist_train as dt

NAME = "step-1"


def state_of(number: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((700, 3), float(number))}, "number": number, "pair": (number, torch.ones(2))}


def save(root: Path, number: int, **options: Any) -> None:
    dcp.save(state_of(number), storage_writer=dt.StorageWriter(root / NAME, **options))


def load(root: Path) -> int:
    """The number of the save that is there, every value of it."""
    state = {"model": {"w": torch.zeros(700, 3)}, "number": None, "pair": None}
    dcp.load(state, storage_reader=dt.StorageReader(root / NAME))
    number = state["number"]
    assert isinstance(number, int)
    assert torch.equal(state["model"]["w"], state_of(number)["model"]["w"])  # type: ignore[index]
    assert state["pair"][0] == number  # type: ignore[index]
    return number


def refusal(call: Callable[[], Any]) -> str:
    """What the user reads."""
    with pytest.raises(CheckpointException) as caught:
        call()
    return str(caught.value)


def content(path: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in sorted([path, *path.rglob("*")]) if one.is_file()}
