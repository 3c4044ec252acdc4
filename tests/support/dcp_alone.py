"""Cases of one process."""

from __future__ import annotations

import datetime
import os
import random
import uuid
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tests.support.dcp_storages import Storage, blank, failures, nested, numbers, outcome


def round_trip(storage: Storage) -> Any:
    storage.save(nested())
    return storage.load(blank(nested()))


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
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def every_dtype(storage: Storage) -> Any:
    state = {str(dtype): (numbers(3, 5) * 9).to(dtype) for dtype in DTYPES}
    wide = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    state |= {str(dtype): torch.arange(-3, 3, dtype=signed).view(dtype) for dtype, signed in wide.items()}
    state["scales"] = torch.arange(9, dtype=torch.uint8).view(torch.float8_e8m0fnu)
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
        "nan": float("nan"),
        "empty": ((), [], {}, ""),
        "rng": torch.get_rng_state().new_ones(16),
        "frozen": (frozenset({3}), range(2, 9, 3), 1 + 2j, bytearray(b"x")),
        "time": (datetime.datetime(2030, 1, 2, 3, 4, 5, 6), datetime.date(2030, 1, 2), datetime.timedelta(1, 2, 3)),
        "zone": datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC),
        "text": (Path("/data"), Decimal("1.10"), Fraction(1, 3), uuid.UUID(int=7)),
        "words": np.array(["a", "bc"]),
        "days": np.array(["2030-01-02"], dtype="datetime64[D]"),
        "generators": (random.Random(3).getstate(), np.random.RandomState(3).get_state()),
        "ordered": (OrderedDict(b=1, a=2), Counter("aab")),
        "large": {"parts": [bytes(range(256)) * 4096, bytearray(b"ab") * 99_999], "~bytes-0": numbers(2)},
        "long": (b"x" * 100_000, 1 << 80, {"$": b"y" * 100_000}),
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


def ids_that_are_accepted(storage: Storage) -> Any:
    kind = type(storage.writer())
    ids = [storage.root / "x", str(storage.root / "x"), "s3://bucket/x", "/proc/none/x"]
    return [kind.validate_checkpoint_id(one) for one in ids]


def deprecated_functions(storage: Storage) -> Any:
    dcp.save_state_dict({"a": numbers(3), "b": 1}, storage.writer(), no_dist=True)
    state = {"a": torch.zeros(3), "b": 0}
    dcp.load_state_dict(state, storage.reader(), no_dist=True)
    return state


def what_planners_refuse(storage: Storage) -> Any:
    """With the same kinds of error, whatever the storage."""
    storage.save({"a": numbers(2, 3), "n": 1})
    return [
        failures(lambda: storage.load({"missing": torch.zeros(2)})),
        failures(lambda: storage.load({"a": torch.zeros(3, 2)})),
        failures(lambda: storage.load({"a": 1})),
        failures(lambda: storage.save({"a.b": 1, "a": {"b": 2}}, "ambiguous")),
        failures(lambda: storage.load({"n": 1}, "ambiguous")),
        storage.load({"n": torch.zeros(3)}),
    ]


def nothing_there(storage: Storage) -> Any:
    (storage.root / "empty").mkdir()
    (storage.root / "file").write_text("no checkpoint")
    told = [failures(lambda name=name: storage.load({"a": 1}, name)) for name in ("nowhere", "empty", "file")]
    try:
        storage.reader("nowhere").read_metadata()
    except FileNotFoundError:
        told.append("no such file")
    return told


def an_empty_dictionary(storage: Storage) -> Any:
    storage.save({})
    storage.save({"model": {}, "list": [], "none": None}, "hollow")
    return [storage.everything(), storage.load({}), storage.everything("hollow"), storage.load({"none": 1}, "hollow")]


def keys_of_all_kinds(storage: Storage) -> Any:
    state = {
        "by_id": {0: numbers(2), 1: {2: numbers(3, seed=1), 3: "three"}},
        "": numbers(1, seed=2),
        ".": 1,
        "a/b": {"~": numbers(1, seed=3), "../x": 2, "NUL\0": 3},
        "model": {"": numbers(1, seed=4), "model": {"model": numbers(1, seed=5)}, "values": 4},
        "x" * 300: numbers(1, seed=6),
        "in_lists": [{"p": [numbers(1, seed=7), {"q": numbers(1, seed=8)}]}, (numbers(1, seed=9), 1)],
    }
    storage.save(state)
    return [storage.everything(), list(storage.reader().read_metadata().state_dict_metadata)]


def paths_of_all_kinds(storage: Storage) -> Any:
    """A string, a trailing slash, below the working directory, below folders that are not there yet."""
    here = os.path.relpath(storage.root)
    paths = [f"{storage.root}/a", f"{storage.root}/b/", f"{here}/c", storage.root / "x" / "y" / "z"]
    loaded = []
    for number, path in enumerate(paths):
        dcp.save(
            {"n": number}, storage_writer=storage.writer(None if storage.kind == "ours" else "-"), checkpoint_id=path
        )
        state = {"n": None}
        dcp.load(state, storage_reader=storage.reader("-"), checkpoint_id=path)
        loaded.append(state)
    return loaded


def into_live_objects(storage: Storage) -> Any:
    """`state_dict()` hands out the parameters themselves: they are filled where they are."""
    model, _ = trained()
    storage.save({"model": model.state_dict(), "average": nn.Parameter(numbers(3))})
    other, _ = trained(seed=1)
    average = nn.Parameter(torch.zeros(3))
    address = other[0].weight.data_ptr()  # type: ignore[union-attr, operator]
    storage.load({"model": other.state_dict(), "average": average})
    assert other[0].weight.data_ptr() == address  # type: ignore[union-attr, operator]
    return [dict(other.named_parameters()), dict(other.named_buffers()), average]


def options_of_state_dicts(storage: Storage) -> Any:
    """Flat optimizers and whole models, as torchtitan and its kin ask for them."""
    model, optimizer = trained()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    storage.save({"model": get_model_state_dict(model, options=whole)}, "model")
    storage.save(get_optimizer_state_dict(model, optimizer, options=flat), "optimizer")
    other, fresh = trained(seed=1)
    weights = storage.load({"model": get_model_state_dict(other)}, "model")
    set_model_state_dict(other, weights["model"], options=StateDictOptions(strict=True))
    moments = storage.load(get_optimizer_state_dict(other, fresh, options=flat), "optimizer")
    set_optimizer_state_dict(other, fresh, moments, options=flat)
    return [other.state_dict(), fresh.state_dict(), storage.everything("optimizer")]


class Loader:
    """Its state holds bytes, as that of torchdata's does, by rank."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        return {"dp_rank_0": self.position.to_bytes(4, "big"), "world_size": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int.from_bytes(state["dp_rank_0"], "big")


def a_whole_training(storage: Storage) -> Any:
    """The model's keys on the top level, all else under names of their own."""

    def make(seed: int) -> dict[str, Any]:
        model, optimizer = trained(seed=seed)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        scheduler.step(2 + seed)
        state = {"step": torch.tensor(7 + seed), "tokens": torch.tensor(7 << 40), "losses": [0.5, 0.25]}
        objects = {"optimizer": optimizer, "lr_scheduler": scheduler, "dataloader": Loader(12 + seed)}
        return {**model.state_dict(), **objects, "train_state": state}

    storage.save(make(0))
    loaded = storage.load(make(1))
    return {key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in loaded.items()}


CASES = [
    round_trip,
    a_wrong_size_is_refused,
    what_planners_refuse,
    nothing_there,
    an_empty_dictionary,
    keys_of_all_kinds,
    paths_of_all_kinds,
    stateful_objects,
    model_and_optimizer_states,
    into_live_objects,
    options_of_state_dicts,
    a_whole_training,
    every_dtype,
    odd_tensors,
    into_another_form,
    plain_values,
    one_writer_for_many_saves,
    overwriting,
    what_save_returns,
    ids_that_are_accepted,
    deprecated_functions,
]
