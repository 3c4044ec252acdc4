"""Objects that scripts register: state of every kind that a `state_dict` may return, and generators as they are."""

from __future__ import annotations

import datetime
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from tests.support.scripts import Kind, Script, network, simple

VALUES = "value and type"


class Holder:
    """One value, which a function changes at each update."""

    def __init__(self, value: Any, change: Callable[[Any, int], Any]) -> None:
        self.value, self.change = value, change

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def holding(make: Callable[[], Any], change: Callable[[Any, int], Any], kept: str = VALUES) -> Kind:
    """`change` returns the new value, or None where it has changed the old one."""

    def after(script: Script, update: int) -> None:
        holder = script.registered["holder"]
        changed = holder.change(holder.value, update)
        holder.value = holder.value if changed is None else changed

    return Kind(build=simple(network, registered=lambda *_: {"holder": Holder(make(), change)}, after=after), kept=kept)


def drawing(make: Callable[[], Any], draw: Callable[[Any], float], kept: str) -> Kind:
    """A generator that is registered itself: its numbers go into the weights."""

    def after(script: Script, update: int) -> None:
        with torch.no_grad():
            script.model[0].bias.add_(draw(script.registered["noise"]))

    return Kind(build=simple(network, registered=lambda *_: {"noise": make()}, after=after), kept=kept)


class Callback:
    """As people write it: best value, patience, a history."""

    def __init__(self) -> None:
        self.best, self.bad, self.history = float("inf"), 0, []

    def see(self, value: float) -> None:
        self.history.append(value)
        self.bad = 0 if value < self.best else self.bad + 1
        self.best = min(self.best, value)

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def nested() -> dict[str, Any]:
    return {"list": [1, (2.5, None)], "set": {1}, 7: b"x", ("a", 1): {"deep": [torch.zeros(2, dtype=torch.bfloat16)]}}


def change_nested(value: dict[str, Any], update: int) -> None:
    value["list"].append((update, float("nan")))
    value["set"].add(update)
    value["a", 1]["deep"].append(torch.ones(update, dtype=torch.float16))


def count_words(value: Any, update: int) -> None:
    value["of"] += update
    value[f"word {update}"] += 1


def reorder(value: OrderedDict[str, int], update: int) -> None:
    value[f"b{update}"] = update
    value.move_to_end("b0")


def see(script: Script, update: int) -> None:
    script.registered["callback"].see(abs(3 - update))


def one_tensor_twice() -> dict[str, Any]:
    one = torch.zeros(2)
    return {"now": one, "kept": [one, torch.zeros(2)]}


def move_one(value: dict[str, Any], update: int) -> None:
    """Where it lies: a copy under the other name would stay behind."""
    value["now"] += update
    if update == 4:
        value["kept"][1] = value["now"]


OBJECTS: dict[str, Kind] = {
    "dict, list, tuple, set, with tensors": holding(nested, change_nested, "nested as deep as you like"),
    "one tensor under two names": holding(one_tensor_twice, move_one, "once: it is one tensor again"),
    "numpy arrays": holding(lambda: np.zeros((2, 3), "f4"), lambda a, i: np.asfortranarray(a + i / 3).astype("f8")),
    "numpy scalars": holding(lambda: np.float32(0), lambda a, i: np.float32(a + i / 3)),
    "OrderedDict": holding(OrderedDict, reorder),
    "defaultdict": holding(
        lambda: defaultdict(int), count_words, "with int, float, list, dict, set, str, bool or tuple"
    ),
    "nested defaultdict": holding(
        lambda: {"runs": defaultdict(list)}, lambda d, i: d["runs"][i % 2].append(i), "as the one above"
    ),
    "Counter": holding(Counter, count_words),
    "deque": holding(lambda: deque(maxlen=3), lambda d, i: d.append((i, torch.ones(i)))),
    "datetime, date, time, timedelta": holding(
        lambda: datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
        lambda d, i: {
            "at": datetime.datetime(2024, 2, 29, i, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=-3.5))),
            "naive": datetime.datetime(2024, 2, 29, i),
            "day": datetime.date(2024, 1, 1 + i),
            "time": datetime.time(i, 2, 3, 4),
            "took": datetime.timedelta(days=-i, microseconds=i),
        },
        "value and type; of a time zone its offset",
    ),
    "paths": holding(lambda: PurePosixPath("a"), lambda p, i: p / f"{i}", "as a path of the machine that resumes"),
    "complex, Decimal, Fraction, range": holding(
        lambda: 0j,
        lambda z, i: [complex(i, -0.0), Decimal("1.10") * i, Fraction(i, 7), range(i, 9, 2)],
    ),
    "bytes and bytearray": holding(lambda: [b"", bytearray()], lambda pair, i: [pair[0] + b"y", pair[1] + b"z"]),
    "torch.Generator": drawing(
        lambda: torch.Generator().manual_seed(5),
        lambda g: float(torch.rand((), generator=g)),
        "registered as it is; each rank's own",
    ),
    "numpy Generator": drawing(
        lambda: np.random.default_rng(3), lambda g: g.standard_normal(), "registered as it is; each rank's own"
    ),
    "numpy RandomState": drawing(
        lambda: np.random.RandomState(3), lambda g: g.randn(), "registered as it is; each rank's own"
    ),
    "random.Random": drawing(lambda: random.Random(3), lambda g: g.gauss(0, 1), "registered as it is; each rank's own"),
    "callback with a state": Kind(
        build=simple(network, registered=lambda *_: {"callback": Callback()}, after=see),
        kept="what its state_dict returns",
    ),
}
