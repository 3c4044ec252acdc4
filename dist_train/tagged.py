"""Values of the standard library that JSON lacks, by a tag and a text or members; and the way out of those refused.

Invariant: what comes back is equal and of the same type. Only types of these tables are made, never one that a
checkpoint names. It knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import pathlib
import random
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import numpy as np
import torch

Pair = tuple[Callable[[Any], str], Callable[[str], Any]]


def _span(text: str) -> datetime.timedelta:
    days, seconds, microseconds = map(int, text.split(","))
    return datetime.timedelta(days, seconds, microseconds)


TEXTS: Final[dict[type, Pair]] = {
    complex: (repr, complex),
    Decimal: (str, Decimal),
    Fraction: (str, Fraction),
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.timedelta: (lambda span: f"{span.days},{span.seconds},{span.microseconds}", _span),
    pathlib.PurePosixPath: (str, pathlib.PurePosixPath),
    pathlib.PureWindowsPath: (str, pathlib.PureWindowsPath),
    pathlib.PosixPath: (str, pathlib.Path),
    pathlib.WindowsPath: (str, pathlib.Path),
    range: (lambda steps: f"{steps.start},{steps.stop},{steps.step}", lambda text: range(*map(int, text.split(",")))),
    uuid.UUID: (str, uuid.UUID),
}
"""Exact types whose text is all there is to them. A path is one of the machine that reads it."""
_BY_NAME = {kind.__name__: read for kind, (_, read) in TEXTS.items()}

FACTORIES: Final[dict[str, Any]] = {
    kind.__name__: kind for kind in (int, float, bool, str, list, dict, set, tuple, deque, Counter, OrderedDict)
} | {"none": None}
"""What a `defaultdict` may make."""


def text_of(value: Any) -> tuple[str, str] | None:
    """Tag and text; None for what is no such value, or is more than its text tells."""
    pair = TEXTS.get(type(value))
    if pair is None or not _is_whole(value):
        return None
    return type(value).__name__, pair[0](value)


def _is_whole(value: Any) -> bool:
    """An offset from UTC is all that a text tells of a time zone, and nothing of which of two equal hours it is."""
    zone, fold = getattr(value, "tzinfo", None), getattr(value, "fold", 0)
    return (zone is None or type(zone) is datetime.timezone) and not fold


def from_text(tag: str, text: str) -> Any:
    return _BY_NAME[tag](text)


TEXT_TAGS: Final = frozenset(_BY_NAME)


def mapping_kind(value: Mapping[Any, Any]) -> dict[str, str] | None:
    """What says of which kind a dictionary is; empty for a plain one (a module's state_dict counts as such), None for
    one that cannot be made again.
    """
    if type(value) is OrderedDict and not hasattr(value, "_metadata"):
        return {"kind": "OrderedDict"}
    if type(value) is Counter:
        return {"kind": "Counter"}
    if type(value) is defaultdict:
        factory = next((name for name, one in FACTORIES.items() if one is value.default_factory), None)
        return None if factory is None else {"kind": "defaultdict", "of": factory}
    return {}


def make_mapping(kind: Mapping[str, Any], items: dict[Any, Any]) -> Any:
    """Args: kind: what `mapping_kind` has told, among other keys."""
    if kind.get("kind") == "defaultdict":
        return defaultdict(FACTORIES[kind["of"]], items)
    made: Any = {"OrderedDict": OrderedDict, "Counter": Counter}.get(kind.get("kind", ""), lambda plain: plain)
    return made(items)


def way_out(value: Any) -> str:
    """What to put in place of a value that is refused; a sentence."""
    hints: list[tuple[bool, str]] = [
        (isinstance(value, enum.Enum), "Put its .name or .value in its place."),
        (dataclasses.is_dataclass(value), "Put dataclasses.asdict(it) in its place, and make it of that again."),
        (isinstance(value, tuple), "Put tuple(it) or it._asdict() in its place, and make it of that again."),
        (isinstance(value, defaultdict), "Put dict(it) in its place, or use a factory such as int, list or dict."),
        (isinstance(value, datetime.datetime), "Put it.astimezone(datetime.timezone.utc) in its place."),
        (isinstance(value, datetime.time), "Put the time of a fixed offset from UTC in its place."),
        (
            isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)),
            "Give the generator itself to run.register, or make it an attribute of a module or of an optimizer: its "
            "state is then kept for each rank.",
        ),
        (isinstance(value, np.ma.MaskedArray), "Put its .data and its .mask in its place."),
        (isinstance(value, np.ndarray), "Put an array of numbers for each of its fields in its place."),
        (
            isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)),
            "Put what tells which function it is (a name) in its place.",
        ),
        (hasattr(value, "state_dict"), "Put its state_dict() in its place, or give it to run.register by itself."),
    ]
    plain = "Leave it out of that object's state_dict(), or put plain values in its place."
    return next((text for applies, text in hints if applies), plain)
