"""What differs between the run that saved and the script that resumes, and what cannot be exact here: it is said.

Invariant: a difference is a warning and never an error; what is an error is refused where the state is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_train.environment import compare_environments, inexact_reasons

logger = logging.getLogger(__name__)
Json = Any
_ORDER = frozenset({"num_samples", "seed", "shuffle", "order"})
_TOLD_ELSEWHERE = frozenset({"run_dir", "resume", "search", "checkpoint", "epochs"})
_TOLD_ELSEWHERE |= {"max_time", "time_reserve", "hang_timeout", "log_with", "partial_load", "exclude", "warm_start"}
"""Of the Trainer's settings: where and how long it trains, who watches, and what is compared by itself."""
_ABSENT = {
    "optimizer": "no optimizer state: it starts fresh",
    "scheduler": "no scheduler state: it starts fresh",
    "scaler": "no scaler state: it starts fresh",
    "rng": "no state of the random generators: they are left as this process has seeded them",
    "user": "no registered objects: they start fresh",
}


@dataclass(slots=True)
class Differences:
    """What a resume makes otherwise than the run that saved."""

    changes: dict[str, tuple[Json, Json]] = field(default_factory=dict)
    """Setting -> (then, today); None where there was or is none."""
    notes: list[str] = field(default_factory=list)
    """What else people should know, one sentence each."""

    def tell_absent(self, kinds: Iterable[str]) -> None:
        """Kinds of state that the checkpoint was made without, and something here would have."""
        texts = [f"The checkpoint has {_ABSENT.get(kind, f'no {kind} state')}." for kind in kinds]
        self.notes += [text for text in texts if text not in self.notes]


def warn_of_inexact_device(device: torch.device) -> None:
    for reason in inexact_reasons(device):
        logger.warning("A resumed run will not be bit for bit exact: %s.", reason)


def warn_of_environment(then: dict[str, Json], now: dict[str, Json], *, is_main: bool = True) -> list[str]:
    """One text for each difference that may change bits. The number of ranks is the main rank's to tell."""
    differences = compare_environments(then, now)
    if told := [text for text in differences if is_main or not text.startswith("world_size ")]:
        logger.warning("This resume may not be bit for bit exact: %s.", "; ".join(told))
    return differences


def warn_of_user_loader(kind: str, caveats: Sequence[str]) -> None:
    """What a training loader that `dist_train.data_loader` did not make cannot do exactly, by name."""
    for caveat in caveats:
        logger.warning(
            "A resume within an epoch will not be exact with this %s, which is not from dist_train.data_loader: %s.",
            kind,
            caveat,
        )


def warn_of_no_loader() -> None:
    logger.warning(
        "The Run was given no training loader: a resumed epoch begins again at its first batch. Give it as loader=."
    )


def warn_of_uncounted(*, is_filler: bool) -> None:
    """
    Args:
        is_filler: a batch without a sample of this rank's; otherwise another rank of its place on the mesh counts it.
    """
    why = (
        "This rank has no sample left for a batch of the evaluation, in which every rank takes part because the model "
        "is sharded: it was given a sample that is counted elsewhere."
        if is_filler
        else "This rank shares its samples with others of the mesh, the first of which counts those of the evaluation."
    )
    logger.warning(
        "%s Metrics of dist_train count nothing here; a loop that adds up by itself counts a batch only `if "
        "run.batch_counts`.",
        why,
    )


def warn_of_dropped_window(kind: str) -> None:
    logger.warning(
        "The epoch ended inside a window of accumulated batches, and %s has no length to tell it in time: the "
        "gradients of that window are dropped, in this and each further epoch. Give it a number of batches that the "
        "accumulation divides, or a length.",
        kind,
    )


def warn_of_unregistered(path: str, state: Mapping[str, Json], registered: Collection[str]) -> None:
    """Objects that the checkpoint holds and the script does not register any more."""
    saved = {place.removeprefix("user/") for place in state if place.startswith("user/")}
    if lost := sorted(saved - set(registered)):
        logger.warning(
            "%s holds %s, which this script does not register: the next checkpoints will not have it. Call "
            "run.register before run.epochs to keep it.",
            path,
            ", ".join(map(repr, lost)),
        )


def compare_config(
    then: Mapping[str, Json], today: Mapping[str, Json], world_sizes: tuple[int, int], in_mid_epoch: bool = False
) -> dict[str, tuple[Json, Json]]:
    """Settings other than the optimizer's and scheduler's that have changed: data, epochs, policy, the user's own.

    Args:
        then: `settings["config"]` of the checkpoint.
        today: the same of this script.
        world_sizes: then and now; the accumulation follows from it.
        in_mid_epoch: whether the order of an epoch in progress counts.
    """
    orders = [config.get("data", {}).get("order") for config in (then, today)]
    user, mine = then.get("user", {}), today.get("user", {})
    told_elsewhere = today.get("data", {}).keys() | _TOLD_ELSEWHERE
    before, now = then.get("epochs", user.get("epochs")), today.get("epochs")
    return {
        **_compare(_with_accumulation(then, world_sizes[0]), _with_accumulation(today, world_sizes[1]), "data."),
        **(_compare_orders(*orders) if in_mid_epoch and today.get("data") else {}),
        **({"epochs": (before, now)} if before != now and None not in (before, now) else {}),
        **_compare(then.get("policy", {}), today.get("policy", {}), "policy."),
        **_compare(user, {key: mine[key] for key in mine if key not in told_elsewhere}, "config."),
    }


def _compare_orders(then: Json, today: Json) -> dict[str, tuple[Json, Json]]:
    """The user's own order of one epoch, by its digest."""
    if then == today:
        return {}
    then_text, today_text = ("built-in" if one is None else one["digest"][:8] for one in (then, today))
    return {"data.order": (then_text, today_text)}


def _with_accumulation(config: Mapping[str, Json], world_size: int) -> dict[str, Json]:
    data = {key: value for key, value in config.get("data", {}).items() if key not in ("order", "places")}
    if not {"global_batch_size", "micro_batch_size"} <= data.keys():
        return data
    places = config["data"].get("places", world_size)
    steps = -(-data["global_batch_size"] // (data["micro_batch_size"] * places))
    return {**data, "accumulation_steps": steps}


def _compare(then: Mapping[str, Json], today: Mapping[str, Json], prefix: str) -> dict[str, tuple[Json, Json]]:
    return {f"{prefix}{key}": (then[key], today[key]) for key in today if key in then and then[key] != today[key]}


def warn_of_other_order(changes: Collection[str], in_mid_epoch: bool) -> None:
    """Another order of samples inside of an epoch."""
    if in_mid_epoch and any(f"data.{key}" in changes for key in _ORDER):
        logger.warning("The order of samples has changed in mid-epoch: this epoch mixes two orders.")
