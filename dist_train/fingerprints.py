"""Functions that decide a learning rate, compared by what they give: a state_dict leaves them out.

Invariant: asking changes nothing that training can see.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from dist_train.rng import capture_rng, restore_rng

_MOST_SAMPLED_STEPS = 10_000_000


def fingerprints(scheduler: Any) -> list[str]:
    """Of each function that decides a rate: what it gives at some steps, since functions cannot be compared.

    A state_dict leaves them out; what they give at these steps differs as good as always when they do.
    """
    functions = list(_functions_of(scheduler))
    if not functions:
        return []
    before = capture_rng()  # a function that draws random numbers must not shift those of training
    found = [_fingerprint(function) for function in functions]
    restore_rng(before)
    return found


def _functions_of(scheduler: Any) -> Iterator[Callable[[int], Any]]:
    yield from filter(callable, [*getattr(scheduler, "lr_lambdas", ()), getattr(scheduler, "_scale_fn_custom", None)])
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _functions_of(inner)


def _fingerprint(function: Callable[[int], Any]) -> str:
    if not isinstance(function, FunctionType):  # an object may remember what it was asked
        with contextlib.suppress(Exception):
            function = copy.deepcopy(function)
    values, step, after = [], 0, 1
    while step < _MOST_SAMPLED_STEPS:
        try:
            values.append(float(function(step)).hex())
        except Exception as error:  # a user's table may end
            values.append(type(error).__name__)
        step, after = after, step + after
    return hashlib.sha256(" ".join(values).encode()).hexdigest()[:8]
