"""What a scheduler's state is: torch's `state_dict` of one that a script derives holds functions and whole schedulers.

    a function among its attributes     is the script's: left out, and left as it is by a load
    a scheduler among its attributes    its own state, loaded into the one that is there

A class with a state_dict of its own is asked for that, and nothing is left out.

Invariant: what `state_of` returns, `load_state` takes; neither steps anything.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_CODE = (FunctionType, BuiltinFunctionType, MethodType, functools.partial, type)


def state_of(scheduler: Any) -> dict[str, Any]:
    """Values that a checkpoint holds; a scheduler inside stands as its state."""
    state: dict[str, Any] = scheduler.state_dict()
    if hasattr(scheduler, "_schedulers") and "_schedulers" in state:
        return {**state, "_schedulers": [state_of(one) for one in scheduler._schedulers]}
    if not _is_derived(scheduler):
        return state
    return {key: _plain(value) for key, value in state.items() if not _is_left_out(value)}


def load_state(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Sets what `state_of` has told; functions stay those of the script."""
    if hasattr(scheduler, "_schedulers") and "_schedulers" in state:
        inner = [one.state_dict() for one in scheduler._schedulers]
        scheduler.load_state_dict({**state, "_schedulers": inner})
        for one, its in zip(scheduler._schedulers, state["_schedulers"], strict=True):
            load_state(one, its)
        return
    if not _is_derived(scheduler):
        scheduler.load_state_dict(dict(state))
        return
    live = vars(scheduler)
    inside = {key for key in state if _holds_schedulers(live.get(key))}
    for key in inside:
        pairs = (
            [(live[key], state[key])] if isinstance(live[key], LRScheduler) else zip(live[key], state[key], strict=True)
        )
        for one, its in pairs:
            load_state(one, its)
    scheduler.load_state_dict({key: value for key, value in state.items() if key not in inside})


def _is_derived(scheduler: Any) -> bool:
    """Whether it is a class of the user's that has torch's plain state_dict: all of its attributes."""
    kind = type(scheduler)
    return (
        isinstance(scheduler, LRScheduler)
        and not kind.__module__.startswith("torch.")
        and kind.state_dict is LRScheduler.state_dict
        and kind.load_state_dict is LRScheduler.load_state_dict
    )


def _plain(value: Any) -> Any:
    if isinstance(value, LRScheduler):
        return state_of(value)
    return [state_of(one) for one in value] if _holds_schedulers(value) else value


def _holds_schedulers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, LRScheduler) for one in value)
    return isinstance(value, LRScheduler)


def _is_left_out(value: Any) -> bool:
    """Code, or the optimizer by another name."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_left_out(one) for one in value)
    return isinstance(value, (*_CODE, Optimizer))
