"""What `torch.save` makes of a value, and back, without running anything that stands in it.

Invariant: only plain data and tensors come out: weights_only, with numpy's plain numbers and arrays besides.
"""

from __future__ import annotations

import argparse
import io
import re
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from dist_train.errors import UnsaveableStateError

REFUSED = re.compile(r"(?:GLOBAL|Unsupported (?:global|class|operand)[^`]*?)\s*`?([\w.]+\.\w+)`?")
"""Finds the name of the class or function in what torch says of a value that it did not load."""


def plain_numpy() -> list[Any]:
    """Makers of plain values that a metric or a list of arguments often is: they hold data and run nothing."""
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    made = [
        (function, f"numpy.{room}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for function in [getattr(multiarray, name)]
        for room in ("core", "_core")
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFD"}
    return [*made, np.dtype, np.ndarray, *kinds, argparse.Namespace]


def read_saved(data: io.BytesIO, key: str) -> Any:
    """The value that `torch.save` wrote into memory; its tensors come back on the CPU.

    Raises:
        UnsaveableStateError: it holds more than plain data.
    """
    data.seek(0)
    try:
        with safe_globals(plain_numpy()):
            return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own kinds, which have no common base
        match = REFUSED.search(" ".join(str(error).split()))
        what = f"a {match[1]}" if match else "something that is not what torch.save makes of plain data"
        raise UnsaveableStateError(unsaveable(key, what)) from error


def unsaveable(key: str, what: str) -> str:
    return (
        f"{key!r} cannot be saved: it holds {what}. A checkpoint holds tensors and plain values (numbers, strings, "
        f"bytes, arrays; dict, list, tuple, set of these), never pickles, which would run code when they are loaded. "
        f"Save what it consists of instead (its state_dict(), for instance), or leave {key!r} out of the dictionary."
    )


def write_saved(value: Any) -> io.BytesIO:
    """What `torch.load` of any kind reads as that value."""
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
