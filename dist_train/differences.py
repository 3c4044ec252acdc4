"""What differs between the run that saved and the script that resumes, and what cannot be exact here: it is said.

Invariant: a difference is a warning and never an error; what is an error is refused where the state is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_train.data import training_sampler
from dist_train.environment import compare_environments, inexact_reasons

logger = logging.getLogger(__name__)
Json = Any
_ORDER = frozenset({"num_samples", "seed", "shuffle"})
_TOLD_ELSEWHERE = frozenset({"run_dir", "resume", "search", "checkpoint", "epochs"})
"""Of the Trainer's settings: where it trains, and what is compared by itself."""
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


def warn_of_environment(then: dict[str, Json], now: dict[str, Json]) -> list[str]:
    """One text for each difference that may change bits."""
    differences = compare_environments(then, now)
    if differences:
        logger.warning("This resume may not be bit for bit exact: %s.", "; ".join(differences))
    return differences


def warn_of_foreign_loader(loader: Any | None) -> None:
    """A loader that `dist_train.data_loader` did not make cannot be resumed inside an epoch."""
    if loader is not None and training_sampler(loader) is None:
        logger.warning(
            "The Run was given a %s that is not from dist_train.data_loader: a resumed epoch begins again at its first "
            "sample, and is not the one that was killed.",
            type(loader).__name__,
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
    then: Mapping[str, Json], today: Mapping[str, Json], world_sizes: tuple[int, int]
) -> dict[str, tuple[Json, Json]]:
    """Settings other than the optimizer's and scheduler's that have changed: data, epochs, policy, the user's own.

    Args:
        then: `settings["config"]` of the checkpoint.
        today: the same of this script.
        world_sizes: then and now; the accumulation follows from it.
    """
    user, mine = then.get("user", {}), today.get("user", {})
    told_elsewhere = today.get("data", {}).keys() | _TOLD_ELSEWHERE
    before, now = then.get("epochs", user.get("epochs")), today.get("epochs")
    return {
        **_compare(_with_accumulation(then, world_sizes[0]), _with_accumulation(today, world_sizes[1]), "data."),
        **({"epochs": (before, now)} if before != now and None not in (before, now) else {}),
        **_compare(then.get("policy", {}), today.get("policy", {}), "policy."),
        **_compare(user, {key: mine[key] for key in mine if key not in told_elsewhere}, "config."),
    }


def _with_accumulation(config: Mapping[str, Json], world_size: int) -> dict[str, Json]:
    data = config.get("data", {})
    if not {"global_batch_size", "micro_batch_size"} <= data.keys():
        return dict(data)
    steps = -(-data["global_batch_size"] // (data["micro_batch_size"] * world_size))
    return {**data, "accumulation_steps": steps}


def _compare(then: Mapping[str, Json], today: Mapping[str, Json], prefix: str) -> dict[str, tuple[Json, Json]]:
    return {f"{prefix}{key}": (then[key], today[key]) for key in today if key in then and then[key] != today[key]}


def warn_of_other_order(changes: Collection[str], in_mid_epoch: bool) -> None:
    """Another order of samples inside of an epoch."""
    if in_mid_epoch and any(f"data.{key}" in changes for key in _ORDER):
        logger.warning("The order of samples has changed in mid-epoch: this epoch mixes two orders.")
