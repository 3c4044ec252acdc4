"""Learning rates after a resume: what the run had decayed where nothing was changed, else those of a run that was
configured as the script is now, from step 0 on.

    nothing differs                        -> the checkpoint's state, bit for bit
    a scheduler that counts its steps      -> today's, fresh, stepped as often as the old one was
    ReduceLROnPlateau                      -> as many reductions as the old one had made, under today's settings
    one that counts nothing that we know   -> field by field

Invariant: counters come from the checkpoint, hyper-parameters from the present objects. What an optimizer or a
scheduler was constructed with is compared, never what training has made of it. A function (a lambda) is compared
by what it gives at some steps.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import repeat
from operator import itemgetter
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dist_train.errors import ConfigError
from dist_train.fingerprints import fingerprints
from dist_train.scheduler_state import load_state, state_of
from dist_train.tree import encode, merge_settings

Json = Any
_COUNTERS = frozenset(
    {"last_epoch", "_step_count", "_last_lr", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter"}
    | {"_get_lr_called_within_step", "_is_initial", "verbose"}
)
"""What steps change in the schedulers of torch; everything else is a hyper-parameter."""
_FOLLOWS = frozenset({"base_lrs", "_schedule_phases", "min_lrs"})
"""Follows from other hyper-parameters, so it is told only where it is alone."""
_MADE_BY_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})
_CYCLED = frozenset({"momentum", "betas"})
"""What OneCycleLR and CyclicLR move besides the learning rate."""
_MOST_REDUCTIONS = 10_000
_ACCELERATED = "AcceleratedScheduler"
"""Accelerate's wrapper: one call of its `step` may take several steps, or none. Its class was recorded once."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint tells of one scheduler."""

    state: Json
    settings: Json
    """At construction; None where that was not recorded (an imported checkpoint)."""
    class_name: str
    """Empty where it was not recorded."""
    functions: list[str] | None = None
    """Fingerprints of its functions at construction, None where they were not recorded."""


def innermost_scheduler(scheduler: Any) -> Any:
    """Without Accelerate's wrapper."""
    while type(scheduler).__name__ == _ACCELERATED:
        scheduler = scheduler.scheduler
    return scheduler


def class_then(settings: Mapping[str, Json], place: str) -> str:
    """Of a checkpoint's scheduler; empty where it was not recorded."""
    name: str = settings.get(f"{place}/class", "")
    return "" if name == _ACCELERATED else name


# Settings of a parameter group


def group_settings(group: Mapping[str, Any], place: str) -> Json:
    """What a parameter group is set to, in plain JSON: a capturable rate is compared by its value."""
    return encode({key: readable(value) for key, value in group.items() if key != "params"}, place, {})


def construction_of(saved: Mapping[str, Json], index: int, today: Json, moved_by: Sequence[Mapping[str, Any]]) -> Json:
    """What a group was probably constructed with, from its state alone: an imported checkpoint has nothing else.

    Args:
        index: the group's number.
        today: the group as it is constructed now.
        moved_by: states of the schedulers that have moved its rate. Torch's leave `initial_lr` in the group. Of a
            plateau, reductions of today's rate are tried; what a user's own did nobody knows: today's rate is believed.
    """
    then = {key: value for key, value in saved.items() if key not in _CYCLED or "max_momentum" not in saved}
    rate, mine = saved.get("initial_lr", saved["lr"]), base_rate(today)
    for state in moved_by if "initial_lr" not in saved else ():
        is_plateau = "num_bad_epochs" in state
        if not is_plateau or saved["lr"] in _reductions(mine, state["factor"], _floor(state, index), state["eps"]):
            rate = mine
    return {**then, "lr": rate}


def base_rate(group: Mapping[str, Json]) -> Json:
    """The learning rate that the user wrote: a scheduler keeps it as `initial_lr` and changes `lr` at once."""
    return group.get("initial_lr", group["lr"])


def compare_groups(then: Json, today: Json, place: str, *, scheduled: bool) -> dict[str, tuple[Json, Json]]:
    """Hyper-parameters that differ between two constructions of a parameter group, `lr` meaning the base rate.

    Args:
        scheduled: today's scheduler has taken steps already, so that what it moves tells nothing.
    """
    moved = {"lr", "initial_lr"} | (_CYCLED if scheduled and "max_momentum" in today else set())
    changes = {
        f"{place}.{key}": (then[key], today[key])
        for key in today
        if key not in moved and key in then and then[key] != today[key]
    }
    if base_rate(then) != base_rate(today):
        changes = {f"{place}.lr": (base_rate(then), base_rate(today)), **changes}
    elif not scheduled and "initial_lr" in then and "initial_lr" in today and then["lr"] != today["lr"]:
        changes[f"{place}.first_lr"] = (then["lr"], today["lr"])  # a warm-up's lambda begins elsewhere
    return changes


def merge_group(saved: Json, then: Json, today: Json, *, live: Collection[str] = ()) -> dict[str, Json]:
    """The settings to put into a parameter group: the checkpoint's but for what the user changed.

    Args:
        live: keys to leave out: they stay as they are in the live group, whose scheduler has set them.
    """
    merged: dict[str, Json] = merge_settings(saved, then, today, "", {})
    return {key: value for key, value in merged.items() if key not in live}


def scheduled_keys(group: Mapping[str, Any], schedulers: Iterable[Any]) -> frozenset[str]:
    """Keys of a parameter group that its schedulers set, or one that is gone has set."""
    cycled = "max_momentum" in group or any(_cycles_momentum(one) for one in schedulers)
    return frozenset({"lr"} | _MADE_BY_SCHEDULERS | (_CYCLED if cycled else set()))


def _cycles_momentum(scheduler: Any) -> bool:
    inner = map(_cycles_momentum, getattr(scheduler, "_schedulers", ()))
    return bool(getattr(scheduler, "cycle_momentum", False)) or any(inner)


# Settings of a scheduler


def scheduler_settings(scheduler: Any, place: str) -> Json:
    """What a scheduler's state_dict tells, in plain JSON. Raises UnsaveableStateError, naming the place."""
    return encode(readable(state_of(scheduler)), place, {})


def readable(value: Any) -> Any:
    """With numbers in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: readable(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(readable(inner) for inner in value)
    return value


def put_in_place(live: Any, value: Any) -> Any:
    """A saved setting of a parameter group in the kind of the live one: what is a tensor here is filled, since a
    captured graph reads it through that very tensor; what is a number here becomes one.
    """
    if isinstance(live, torch.Tensor) and isinstance(value, int | float | list | torch.Tensor):
        new = torch.as_tensor(value, dtype=live.dtype, device=live.device)
        with torch.no_grad():
            return live.copy_(new) if new.shape == live.shape else new
    if isinstance(live, int | float) and isinstance(value, torch.Tensor):
        return readable(value)
    if type(live) in (list, tuple) and type(live) is type(value) and len(live) == len(value):
        return type(live)(put_in_place(*pair) for pair in zip(live, value, strict=True))
    if type(live) is dict and type(value) is dict:
        return {key: put_in_place(live.get(key), inner) for key, inner in value.items()}
    return value


def compare_schedulers(saved: Saved, scheduler: Any, place: str) -> dict[str, tuple[Json, Json]]:
    """Hyper-parameters that differ, or the class."""
    name, functions = type(scheduler).__name__, fingerprints(scheduler)
    if saved.functions is not None and saved.class_name == name and saved.functions != functions:
        return {f"{place}.functions": (saved.functions, functions), **_compare_hyper(saved, scheduler, place)}
    return _compare_hyper(saved, scheduler, place)


def _compare_hyper(saved: Saved, scheduler: Any, place: str) -> dict[str, tuple[Json, Json]]:
    name, today = type(scheduler).__name__, scheduler_settings(scheduler, place)
    then = saved.settings
    if then is None:
        if not _is_of_torch(scheduler):  # which of its fields are counters nobody knows
            return {}
        then = saved.state
    strange = saved.class_name != name if saved.class_name else _hyper(today).keys() - _hyper(then).keys()
    if strange:
        return {place: (saved.class_name or "another", name)}
    changes: dict[str, tuple[Json, Json]] = {}
    merge_settings(_hyper(then), _hyper(then), _hyper(today), place, changes)
    return changes


def leading(changes: dict[str, tuple[Json, Json]]) -> dict[str, tuple[Json, Json]]:
    """Without what only follows from other changes."""
    return {key: pair for key, pair in changes.items() if key.rpartition(".")[2] not in _FOLLOWS} or changes


def merge_scheduler(saved: Saved, scheduler: Any, place: str) -> Json:
    """Field by field: counters are the checkpoint's, a hyper-parameter that the user changed is today's."""
    today = scheduler_settings(scheduler, place)
    if _is_of_torch(scheduler):
        then = saved.state if saved.settings is None else saved.settings
        return merge_settings(saved.state, then, _hyper(today), place, {})
    return saved.state if saved.settings is None else merge_settings(saved.state, saved.settings, today, place, {})


def in_kind(value: Any, live: Any) -> Any:
    """Numbers as tensors where the live state has some: a rate that comes of one is rounded as it was."""
    if isinstance(live, torch.Tensor) and isinstance(value, int | float | list):
        return torch.tensor(value, dtype=live.dtype, device=live.device)
    if isinstance(live, dict) and isinstance(value, dict):
        return {key: in_kind(inner, live.get(key)) for key, inner in value.items()}
    if isinstance(live, list) and isinstance(value, list) and len(live) == len(value):
        return [in_kind(*pair) for pair in zip(value, live, strict=True)]
    return value


def _hyper(state: Json) -> Json:
    """A scheduler's state without its counters, those of schedulers inside of it too; and without tensors."""
    if isinstance(state, dict) and "$" not in state:
        kept = {key: value for key, value in state.items() if key not in _COUNTERS and not _has_tensor(value)}
        return {key: [_hyper(one) for one in value] if key == "_schedulers" else value for key, value in kept.items()}
    return state


def _has_tensor(value: Json) -> bool:
    if isinstance(value, list):
        return any(_has_tensor(inner) for inner in value)
    return isinstance(value, dict) and value.get("$") == "tensor"


def _is_of_torch(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith("torch.")


# Steps


def count_steps(state: Mapping[str, Any]) -> float | None:
    """How often a scheduler was stepped, from its state; None where it does not tell.

    CosineAnnealingWarmRestarts may be stepped to a fraction of an epoch: `scheduler.step(epoch + batch / batches)`.
    """
    count = state.get("last_epoch")
    if isinstance(count, int):
        into_cycle = state.get("T_cur")
        return count + into_cycle % 1 if isinstance(into_cycle, float) else count
    inner = state.get("_schedulers")
    if isinstance(inner, list) and inner and isinstance(inner[0], dict):
        return count_steps(inner[0])
    return None


def was_stepped(scheduler: Any) -> bool:
    """Whether it has taken steps since its construction, as in a notebook whose objects have trained already."""
    return count_steps(state_of(scheduler)) not in (0, None)


def can_replay(scheduler: Any) -> bool:
    """Whether stepping a scheduler takes nothing but a call, and it counts its steps from its construction."""
    try:
        inspect.signature(scheduler.step).bind()
    except (TypeError, ValueError):
        return False
    return count_steps(state_of(scheduler)) == 0


def replay(stepped: Mapping[str, tuple[Any, float]]) -> None:
    """Takes the steps of a run that was configured so from the start, on fresh schedulers of one optimizer.

    Args:
        stepped: by place, in the order in which a loop steps them: a scheduler, and how often it was stepped.

    Raises:
        ConfigError: a schedule is shorter than the run already is.
    """
    done = dict.fromkeys(stepped, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without the optimizer's
        for place in _in_turn({place: steps for place, (_, steps) in stepped.items()}):
            scheduler, steps = stepped[place]
            try:
                scheduler.step(*([steps] if isinstance(steps, float) else []))
            except ValueError as error:
                raise ConfigError(
                    f"The {place} ({type(scheduler).__name__}) was changed, and the checkpoint is at its step {steps}: "
                    f"a schedule as it is written now ends before, at step {done[place]} ({error}). Give it at least "
                    f"as many steps as the whole training has, those before the checkpoint included."
                ) from error
            done[place] += 1


def _in_turn(counts: Mapping[str, float]) -> Iterator[str]:
    """The places in the order of their steps: what one makes of a rate depends on what another has made of it before.

    Equally often stepped ones take turns. Of different counts the largest is the clock, and a rarer one is taken to be
    stepped after every n-th of its steps (once an epoch), n being the largest that gives its count; else evenly.
    """
    whole = {place: 1 if isinstance(count, float) else count for place, count in counts.items()}
    most = max(whole.values(), default=0)
    often_first = sorted((place for place in whole if whole[place]), key=lambda place: -whole[place])
    turns = (zip(_times(whole[place], most), repeat(place)) for place in often_first)
    return (place for _, place in merge(*turns, key=itemgetter(0)))


def _times(count: int, most: int) -> Iterator[int]:
    """After which of the most frequent scheduler's steps each step of one is taken."""
    every = most // count
    regular = most // every == count
    return (number * every if regular else number * most // count for number in range(1, count + 1))


def rates_of(
    groups: Sequence[Mapping[str, Any]], stepped: Sequence[tuple[Any, Mapping[str, Any], list[str] | None, float]]
) -> list[float] | None:
    """What schedulers make of an optimizer's rates, simulated; the real ones are not touched.

    Args:
        groups: settings of the parameter groups when the schedulers were constructed.
        stepped: of each, a fresh one of the same class, its state after its construction then, the fingerprints of its
            functions then, and its steps.

    Returns:
        None where a function is another one now: what the old one gave is gone.
    """
    trial = torch.optim.SGD([{"params": [torch.zeros(())]} for _ in groups], lr=0.0)
    for group, settings in zip(trial.param_groups, groups, strict=True):
        group.update(settings)
    copies = {}
    for number, (scheduler, then, functions, steps) in enumerate(stepped):
        one = _copy_onto(trial, scheduler)
        load_state(one, then)
        if functions not in (None, fingerprints(one)):
            return None
        copies[str(number)] = (one, steps)
    replay(copies)
    return [float(group["lr"]) for group in trial.param_groups]


def can_simulate(scheduler: Any) -> bool:
    """Whether a shallow copy of it shares nothing that steps change: so it is for torch's, not for everybody's."""
    return _is_of_torch(scheduler) and all(can_simulate(one) for one in getattr(scheduler, "_schedulers", ()))


def _copy_onto(optimizer: torch.optim.Optimizer, scheduler: Any) -> Any:
    """A copy that moves the rates of another optimizer."""
    one = copy.copy(scheduler)
    one.optimizer = optimizer
    if hasattr(one, "_schedulers"):
        one._schedulers = [_copy_onto(optimizer, inner) for inner in one._schedulers]
    if hasattr(one, "lr_lambdas"):  # a callable object is among what load_state_dict sets
        one.lr_lambdas = [copy.copy(function) for function in one.lr_lambdas]
    if hasattr(one, "_scale_fn_custom"):
        one._scale_fn_custom = copy.copy(one._scale_fn_custom)
    return one


# ReduceLROnPlateau


def adopt_counters(scheduler: ReduceLROnPlateau, state: Mapping[str, Any]) -> None:
    """What a plateau has seen, from its state in the checkpoint."""
    kept = {key: state[key] for key in ("last_epoch", "best", "num_bad_epochs", "cooldown_counter") if key in state}
    if state.get("mode", scheduler.mode) != scheduler.mode:  # what was best says nothing in the other direction
        kept = {"last_epoch": kept.get("last_epoch", 0)}
    scheduler.__dict__.update(kept)


def reduce_rates(
    scheduler: ReduceLROnPlateau, then: Mapping[str, Any], rates: Sequence[tuple[float, float]]
) -> list[str]:
    """As many reductions of today's rates as led to the checkpoint's.

    Args:
        then: the plateau's hyper-parameters then.
        rates: of each group, what it would have been without reductions, and what it is in the checkpoint.

    Returns:
        What people should know: groups whose reductions cannot be told.
    """
    told = []
    for index, (group, (base, current)) in enumerate(zip(scheduler.optimizer.param_groups, rates, strict=True)):
        old_floor, floor = _floor(then, index), _floor(scheduler.__dict__, index)
        kind = group["lr"].dtype if isinstance(group["lr"], torch.Tensor) else torch.float64
        before = _reductions(base, then["factor"], old_floor, then["eps"], kind)
        now = _reductions(float(group["lr"]), scheduler.factor, floor, scheduler.eps, kind)
        count = min(range(len(before)), key=lambda number: abs(before[number] - current))
        if math.isclose(before[count], current, rel_tol=torch.finfo(kind).eps ** 0.5):  # rounded in another order
            rate = now[min(count, len(now) - 1)]
        else:
            rate = float(group["lr"]) * (current / base if base else 1.0)
            told.append(
                f"The learning rate of group {index} is {current:g} in the checkpoint, which no number of reductions "
                f"of {base:g} by {then['factor']:g} gives: its share of the first rate is kept."
            )
        set_rate(group, rate)
    return told


def tell_last_rates(schedulers: Iterable[Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Lets `get_last_lr` tell what the rates are now."""
    for scheduler in schedulers:
        if hasattr(scheduler, "_last_lr"):
            scheduler._last_lr = [_copy(group["lr"]) for group in groups]


def _floor(settings: Mapping[str, Any], index: int) -> float:
    floors = settings["min_lrs"]
    return float(floors[min(index, len(floors) - 1)])


def _reductions(rate: float, factor: float, floor: float, eps: float, kind: torch.dtype = torch.float64) -> list[float]:
    """The rates that reductions give, one after the other, rounded as the group keeps them."""
    rates = [_rounded(rate, kind)]
    while len(rates) < _MOST_REDUCTIONS:
        lower = max(rates[-1] * factor, floor)
        if not rates[-1] - lower > eps:
            break
        rates.append(_rounded(lower, kind))
    return rates


def _rounded(rate: float, kind: torch.dtype) -> float:
    return float(torch.tensor(rate, dtype=kind))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Into the tensor of a parameter group where it has one."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)  # read through this very tensor where it is capturable
    else:
        group["lr"] = rate


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, torch.Tensor) else rate
