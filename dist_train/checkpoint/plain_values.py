"""What `torch.save` makes of a value, and back, without running anything that stands in it.

Invariant: only plain data and tensors come out: weights_only, with plain values of numpy and the standard library
besides.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import pathlib
import re
import threading
import uuid
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dist_train.errors import UnsaveableStateError

_REFUSED = (
    r"GLOBAL ([\w.]+)",
    r"but got <class '([\w.]+)'>",
    r"Unsupported (?:global|class|operand)[^`]*?\s*`?([\w.]+\.\w+)`?",
)
_ONE_AT_A_TIME = threading.Lock()
"""What torch may load is one list of the process: two threads would take away what the other has added. So would
whatever is added outside of here meanwhile, so it is for the few values that need it."""
_TEXTS = (
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(pathlib.PosixPath, pathlib.PurePosixPath, Decimal, Fraction, uuid.UUID),
)
_LOOKUP = ("getattr", "builtins.getattr")
WAYS_OUT = {
    "_io.BytesIO": "Put its getvalue() in its place.",
    "argparse.Namespace": "Put vars(it) in its place.",
    "collections.defaultdict": "Put dict(it) in its place.",
    "collections.deque": "Put list(it) in its place.",
    "torch._C.Generator": "Put its get_state() in its place.",
    "torch.torch_version.TorchVersion": "Put str(it) in its place.",
    "numpy.dtypes.ObjectDType": "Put its tolist() in its place.",
    "complex128": "Put torch.view_as_real(it) in its place, and make it of that again.",
    "complex32": "Put torch.view_as_real(it) in its place, and make it of that again.",
    "float4": "Put it.view(torch.uint8) in its place, and make it of that again.",
    "sparse": "Put its indices and its values in its place.",
    "quantized": "Put its int_repr(), scale and zero point in its place.",
    "DTensor": "Leave flatten_state_dict at True, which takes dictionaries and lists apart.",
}
"""What to do with values of these names; first come, first served."""
_PLAIN_WAY_OUT = "Put what it consists of in its place (its state_dict(), an enum's value, tuple(it) of a named tuple)."


def plain_numpy() -> list[Any]:
    """Makers of plain values that a metric or a list of arguments often is: they hold data and run nothing."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    made = [
        (function, f"numpy.{room}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for function in [getattr(multiarray, name)]
        for room in ("core", "_core")
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDUSMm"}
    return [*made, np.dtype, np.ndarray, *kinds, argparse.Namespace]


@contextlib.contextmanager
def plain_allowed() -> Iterator[None]:
    """In the block `torch.load(weights_only=True)` makes plain values of numpy and the standard library, too."""
    with _ONE_AT_A_TIME, safe_globals([*plain_numpy(), *_TEXTS, frozenset, range]):
        yield


def refused_name(text: str) -> str | None:
    """The class or function that torch did not load, by what it says of that."""
    found = (re.search(pattern, text) for pattern in _REFUSED)
    return next((match[1] for match in found if match), None)


def read_saved(data: io.BytesIO, key: str) -> Any:
    """The value that `torch.save` wrote into memory; its tensors come back on the CPU.

    Raises:
        UnsaveableStateError: it holds more than plain data.
    """
    with contextlib.suppress(Exception):  # most values need no more than torch allows, in every thread
        return _load(data)
    try:
        with plain_allowed():
            return _load(data)
    except Exception as error:  # pickle's, zip's and torch's own kinds, which have no common base
        name = refused_name(" ".join(str(error).split()))
        name = _looked_up(data) if name in _LOOKUP else name
        what = f"a {name}" if name else "something that is not what torch.save makes of plain data"
        raise UnsaveableStateError(unsaveable(key, what)) from error


def _looked_up(data: io.BytesIO) -> str:
    """What an attribute is looked up in, which is what some versions of Python make of an enum's member."""
    data.seek(0)
    named: list[str] = sorted(get_unsafe_globals_in_checkpoint(data))
    return next((one for one in named if one not in _LOOKUP), _LOOKUP[0])


def _load(data: io.BytesIO) -> Any:
    data.seek(0)
    return torch.load(data, map_location="cpu", weights_only=True)


def unsaveable(key: str, what: str) -> str:
    way_out = next((text for name, text in WAYS_OUT.items() if name in what), _PLAIN_WAY_OUT)
    return (
        f"{key!r} cannot be saved: it holds {what}. A checkpoint holds tensors and plain values (numbers, strings, "
        f"bytes, arrays; dict, list, tuple, set of these), never pickles, which would run code when they are loaded. "
        f"{way_out} Or leave {key!r} out of the dictionary."
    )


def write_saved(value: Any) -> io.BytesIO:
    """What `torch.load` of any kind reads as that value."""
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
