"""Which scheduler moves the rates of which optimizer; a restore goes through them pair by pair.

Invariant: of optimizers it changes the settings of groups alone, never state. How one pair is brought to where a
checkpoint says it stood is `rates`' business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from dist_train.capture import place_of
from dist_train.differences import Differences
from dist_train.optimizer_state import CPU, TensorSource, has_groups_of, shares_groups
from dist_train.rates import ScheduledOptimizer
from dist_train.schedule import Saved, class_then, compare_schedulers, merge_scheduler
from dist_train.scheduler_state import load_state
from dist_train.tree import decode

Json = Any


class Pairing:
    """
    Args:
        optimizers: those of the run, by name.
        every_optimizer: those inside of others, too.
        schedulers: by name.
    """

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        every_optimizer: Mapping[str, torch.optim.Optimizer],
        schedulers: Mapping[str, Any],
    ) -> None:
        self._optimizers = optimizers
        self._every_optimizer = every_optimizer
        self._schedulers = schedulers

    def restore(
        self,
        state: Mapping[str, Json],
        settings: Mapping[str, Json],
        source: TensorSource,
        absent: Collection[str],
        global_step: int,
        told: Differences,
    ) -> None:
        """Parameter groups and schedulers, which are compared and moved together.

        Args:
            absent: kinds of state that the checkpoint was made without.
            told: receives what the user changed.

        Raises:
            ConfigError: a changed schedule is shorter than the run already is.
        """
        live = {place_of("scheduler", name): scheduler for name, scheduler in self._schedulers.items()}
        owners = {place: self._owner_of(scheduler) for place, scheduler in live.items()}
        saved = {
            place: Saved(json, settings.get(place), class_then(settings, place), settings.get(f"{place}/functions"))
            for place, json in state.items()
            if place.partition("/")[0] == "scheduler"
        }
        for name, optimizer in self._with_own_groups().items():
            place, own = place_of("optimizer", name), place_of("scheduler", name)
            mine = {key: one for key, one in live.items() if owners[key] == name}
            ScheduledOptimizer(
                optimizer=optimizer,
                place=place,
                schedulers=mine,
                groups=[group["settings"] for group in state[place]["groups"]] if place in state else None,
                groups_then=settings.get(place),
                saved={key: saved[key] for key in mine if key in saved},
                removed={
                    key: one
                    for key, one in saved.items()
                    if key not in live and not mine and (key == own or len(self._optimizers) == 1)
                },
                absent=absent,
                global_step=global_step,
                load=lambda name, device: source.create(name, CPU),
                told=told,
            ).restore()
        for place, scheduler in live.items():
            if owners[place] is None and place in saved:  # of an optimizer that the run does not have
                told.changes |= compare_schedulers(saved[place], scheduler, place)
                merged = merge_scheduler(saved[place], scheduler, place)
                load_state(scheduler, decode(merged, lambda name, device: source.create(name, CPU)))

    def _with_own_groups(self) -> dict[str, torch.optim.Optimizer]:
        """Without those inside of others that have the others' groups."""
        return {
            name: one
            for name, one in self._every_optimizer.items()
            if name in self._optimizers or not shares_groups(one, self._every_optimizer)
        }

    def _owner_of(self, scheduler: Any) -> str | None:
        """The name of the optimizer whose rates a scheduler moves; of an only one where it does not tell."""
        its = getattr(scheduler, "optimizer", None)
        if its is None and len(self._optimizers) == 1:
            return next(iter(self._optimizers))
        return next((name for name, one in self._with_own_groups().items() if has_groups_of(one, its)), None)
