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

import hashlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dist_train.errors import ConfigError
from dist_train.rng import capture_rng, restore_rng
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
_MOST_SAMPLED_STEPS = 10_000_000


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
    inner = getattr(scheduler, "_schedulers", ())
    return bool(getattr(scheduler, "cycle_momentum", False)) or any(_cycles_momentum(one) for one in inner)


# Settings of a scheduler


def scheduler_settings(scheduler: Any, place: str) -> Json:
    """What a scheduler's state_dict tells, in plain JSON. Raises UnsaveableStateError, naming the place."""
    return encode(readable(scheduler.state_dict()), place, {})


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
    values, step, after = [], 0, 1
    while step < _MOST_SAMPLED_STEPS:
        try:
            values.append(float(function(step)).hex())
        except Exception as error:  # a user's table may end
            values.append(type(error).__name__)
        step, after = after, step + after
    return hashlib.sha256(" ".join(values).encode()).hexdigest()[:8]


def readable(value: Any) -> Any:
    """With numbers in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if type(value) is dict:
        return {key: readable(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(readable(inner) for inner in value)
    return value


def compare_schedulers(saved: Saved, scheduler: Any, place: str) -> dict[str, tuple[Json, Json]]:
    """Hyper-parameters that differ, or the class."""
    name = type(scheduler).__name__
    functions = fingerprints(scheduler)
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
    return count_steps(scheduler.state_dict()) not in (0, None)


def can_replay(scheduler: Any) -> bool:
    """Whether stepping a scheduler takes nothing but a call, and it counts its steps from its construction."""
    try:
        inspect.signature(scheduler.step).bind()
    except (TypeError, ValueError):
        return False
    return count_steps(scheduler.state_dict()) == 0


def replay(scheduler: Any, steps: float, place: str) -> None:
    """Takes the steps of a run that was configured so from the start, on a fresh scheduler and its optimizer.

    Raises:
        ConfigError: the schedule is shorter than the run already is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without the optimizer's
        if isinstance(steps, float):
            scheduler.step(steps)
            return
        for step in range(steps):
            try:
                scheduler.step()
            except ValueError as error:
                raise ConfigError(
                    f"The {place} ({type(scheduler).__name__}) was changed, and the checkpoint is at its step {steps}: "
                    f"a schedule as it is written now ends before, at step {step} ({error}). Give it at least as many "
                    f"steps as the whole training has, those before the checkpoint included."
                ) from error


# ReduceLROnPlateau


def follow_plateau(
    scheduler: ReduceLROnPlateau,
    state: Mapping[str, Any],
    then: Mapping[str, Any],
    rates: Sequence[tuple[float, float]],
) -> list[str]:
    """Counters from the checkpoint, and as many reductions of today's rates as led to the checkpoint's.

    Args:
        state: the scheduler's in the checkpoint.
        then: its hyper-parameters then.
        rates: of each group, what it was constructed with then, and what it is in the checkpoint.

    Returns:
        What people should know: groups whose reductions cannot be told.
    """
    kept = {key: state[key] for key in ("last_epoch", "best", "num_bad_epochs", "cooldown_counter") if key in state}
    if state.get("mode", scheduler.mode) != scheduler.mode:  # what was best says nothing in the other direction
        kept = {"last_epoch": kept.get("last_epoch", 0)}
    scheduler.__dict__.update(kept)
    told = []
    groups = scheduler.optimizer.param_groups
    for index, (group, (base, current)) in enumerate(zip(groups, rates, strict=True)):
        old_floor, floor = _floor(then, index), _floor(scheduler.__dict__, index)
        kind = group["lr"].dtype if isinstance(group["lr"], torch.Tensor) else torch.float64
        before = _reductions(base, then["factor"], old_floor, then["eps"], kind)
        now = _reductions(float(group["lr"]), scheduler.factor, floor, scheduler.eps, kind)
        if current in before:
            rate = now[min(before.index(current), len(now) - 1)]
        else:
            rate = float(group["lr"]) * (current / base if base else 1.0)
            told.append(
                f"The learning rate of group {index} is {current:g} in the checkpoint, which no number of reductions "
                f"of {base:g} by {then['factor']:g} gives: its share of the first rate is kept."
            )
        _set_rate(group, rate)
    scheduler._last_lr = [_copy(group["lr"]) for group in groups]
    return told


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


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)  # read through this very tensor where it is capturable
    else:
        group["lr"] = rate


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, torch.Tensor) else rate
