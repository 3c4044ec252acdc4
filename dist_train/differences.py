"""What differs between the run that saved and the script that resumes, and what cannot be exact here: it is said.

Invariant: a difference is a warning and never an error; what is an error is refused where the state is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dist_train.environment import compare_environments, inexact_reasons

logger = logging.getLogger(__name__)
Json = Any
_ORDER = frozenset({"num_samples", "seed", "shuffle", "order"})


def warn_of_inexact_device(device: torch.device) -> None:
    for reason in inexact_reasons(device):
        logger.warning("A resumed run will not be bit for bit exact: %s.", reason)


def warn_of_environment(then: dict[str, Json], now: dict[str, Json]) -> list[str]:
    """One text for each difference that may change bits."""
    differences = compare_environments(then, now)
    if differences:
        logger.warning("This resume may not be bit for bit exact: %s.", "; ".join(differences))
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


def compare_data(
    then: Mapping[str, Json], today: Mapping[str, Json], in_mid_epoch: bool
) -> dict[str, tuple[Json, Json]]:
    """Settings of the data that have changed: name -> (then, today); another order in mid-epoch is warned of."""
    changed = {key: (then[key], today[key]) for key in today if key in then and then[key] != today[key]}
    changed.pop("order", None)
    if in_mid_epoch and today and (order := _compare_orders(then.get("order"), today.get("order"))):
        changed["order"] = order
    if in_mid_epoch and changed.keys() & _ORDER:
        logger.warning("The order of samples has changed in mid-epoch: this epoch mixes two orders.")
    return {f"data.{key}": pair for key, pair in changed.items()}


def _compare_orders(then: Json, today: Json) -> tuple[Json, Json] | None:
    """Of one epoch; None where they are the same."""
    if then == today:
        return None
    return tuple("built-in" if one is None else one["digest"][:8] for one in (then, today))  # type: ignore[return-value]
