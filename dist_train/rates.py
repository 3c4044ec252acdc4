"""One optimizer and the schedulers that move its rates, brought to where a checkpoint says they stood.

    compare constructions -> nothing differs: the checkpoint's values
                          -> something does:  today's schedule, as far as the old one was; the rest is merged

Invariant: parameters and their state are not touched. How a schedule is compared and replayed is `schedule`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dist_train import schedule
from dist_train.differences import Differences
from dist_train.schedule import Saved
from dist_train.scheduler_state import load_state, state_of
from dist_train.tree import decode, encode

Json = Any
Load = Callable[[str, str], torch.Tensor]
_PLATEAU = ReduceLROnPlateau.__name__


@dataclass(slots=True, kw_only=True)
class ScheduledOptimizer:
    """What is there now, and what the checkpoint has for it."""

    optimizer: torch.optim.Optimizer
    place: str
    schedulers: dict[str, Any]
    """By place; those of this optimizer."""
    groups: list[Json] | None
    """Settings of the parameter groups in the checkpoint, None where it holds no state of the optimizer."""
    groups_then: list[Json] | None
    """The same at construction, None where that was not recorded."""
    saved: dict[str, Saved]
    """Of the checkpoint's schedulers, by place."""
    removed: dict[str, Saved]
    """Of schedulers that are not there any more, by place."""
    absent: Collection[str]
    """Kinds of state that the checkpoint was made without."""
    global_step: int
    load: Load
    """Gives a tensor of the checkpoint."""
    told: Differences

    def restore(self) -> None:
        """Sets parameter groups and schedulers.

        Raises:
            ConfigError: the schedule as it is written now is shorter than the run already is.
        """
        changes = self._changes()
        fresh = [place for place in self.schedulers if place not in self.saved]
        if not (changes or fresh or self.groups is None):
            self._set_groups(self._saved_groups())
            for place, scheduler in self.schedulers.items():
                self._load_state(scheduler, self.saved[place].state)
            return
        self.told.changes.update(changes)
        if all(self._is_followed(place) for place in self.schedulers):
            self._follow()
        else:
            self._merge_fields()
        self._tell_rates()

    # What differs

    def _changes(self) -> dict[str, tuple[Json, Json]]:
        scheduled = any(schedule.was_stepped(one) for one in self.schedulers.values())
        changes: dict[str, tuple[Json, Json]] = {}
        for index, (then, today) in enumerate(zip(self._then(), self._today(), strict=True)):
            unlike_then = scheduled or self.groups_then is None
            changes |= schedule.compare_groups(then, today, f"{self.place}[{index}]", scheduled=unlike_then)
        for place, scheduler in self.schedulers.items():
            if place in self.saved:
                changes |= schedule.compare_schedulers(self.saved[place], scheduler, place)
            elif "scheduler" not in self.absent:
                changes[place] = (None, type(scheduler).__name__)
        changes |= {place: (saved.class_name or "another", None) for place, saved in self.removed.items()}
        if self._lost_its_scheduler and not self.removed:
            changes["scheduler"] = ("another", None)
        return schedule.leading(changes)

    @property
    def _lost_its_scheduler(self) -> bool:
        groups = zip(self._plain_groups(), self._today(), strict=False)
        vanished = any("initial_lr" in saved and "initial_lr" not in today for saved, today in groups)
        return not self.schedulers and (bool(self.removed) or vanished)

    def _then(self) -> list[Json]:
        """The groups when the run that saved was constructed."""
        if self.groups is None:
            return self._today()
        if self.groups_then is not None and len(self.groups_then) == len(self.groups):
            return self.groups_then
        states = [self._state(saved) for saved in self.saved.values()]
        groups = zip(self._plain_groups(), self._today(), strict=True)
        return [schedule.construction_of(group, index, today, states) for index, (group, today) in enumerate(groups)]

    def _today(self) -> list[Json]:
        return [schedule.group_settings(group, self.place) for group in self.optimizer.param_groups]

    # The checkpoint's values

    def _saved_groups(self) -> list[dict[str, Any]]:
        return [decode(group, self.load) for group in self.groups or []]

    def _plain_groups(self) -> list[Json]:
        return [encode(schedule.readable(group), self.place, {}) for group in self._saved_groups()]

    def _set_groups(self, values: list[dict[str, Any]]) -> None:
        for group, settings in zip(self.optimizer.param_groups, values, strict=True):
            for key, value in settings.items():
                group[key] = schedule.put_in_place(group.get(key), value)

    def _set_merged(self, merged: list[dict[str, Any]]) -> None:
        """Groups in plain values; what is the checkpoint's is taken as it lies there, tensors as tensors."""
        if self.groups is None:
            return
        saved = zip(self._saved_groups(), self._plain_groups(), strict=True)
        self._set_groups(
            [
                {
                    key: exact[key] if value == plain.get(key) else decode(value, self.load)
                    for key, value in group.items()
                }
                for group, (exact, plain) in zip(merged, saved, strict=True)
            ]
        )

    def _load_state(self, scheduler: Any, json: Json) -> None:
        load_state(scheduler, decode(json, self.load))

    # Today's schedule

    def _is_followed(self, place: str) -> bool:
        """Whether today's rate can be told from the old scheduler's counters."""
        scheduler = self.schedulers[place]
        if place not in self.saved or self.saved[place].class_name not in ("", type(scheduler).__name__):
            return True
        return (_is_plateau(scheduler) and not schedule.was_stepped(scheduler)) or schedule.can_replay(scheduler)

    def _follow(self) -> None:
        """Fresh schedulers first, on groups as they were constructed; then whatever they do not set."""
        then, today = self._then(), self._today()
        plateaus = self._known_plateaus()
        unreduced = self._unreduced(then, plateaus) if plateaus else None
        counts = {place: self._steps(place, one) for place, one in self.schedulers.items() if not _is_plateau(one)}
        schedule.replay(
            {place: (self.schedulers[place], steps) for place, steps in counts.items() if steps is not None}
        )
        if plateaus:
            self._follow_plateaus(plateaus, then, today, unreduced)
        merged = []
        for saved, before, now in zip(self._plain_groups(), then, today, strict=False):
            keys: frozenset[str] = frozenset()
            if self.schedulers or self._lost_its_scheduler:
                keys = schedule.scheduled_keys(saved, self.schedulers.values())
            merged.append(schedule.merge_group(saved, before, now, live=keys))
        self._set_merged(merged)

    def _steps(self, place: str, scheduler: Any) -> float | None:
        """How often today's scheduler would have been stepped; None where it starts fresh."""
        saved = self.saved.get(place)
        if saved is None and "scheduler" in self.absent:
            return None
        if not schedule.can_replay(scheduler):
            self.told.notes.append(f"The {place} ({type(scheduler).__name__}) starts fresh: it counts no steps.")
            return None
        steps = None if saved is None else schedule.count_steps(self._state(saved))
        if steps is None:
            self.told.notes.append(
                f"The {place} is new: it starts where {self.global_step} updates bring it, one step an update."
            )
            return self.global_step
        return steps

    def _known_plateaus(self) -> dict[str, ReduceLROnPlateau]:
        """Those that the checkpoint tells of, by place; another one starts fresh."""
        known = {}
        for place, scheduler in self.schedulers.items():
            if not _is_plateau(scheduler):
                continue
            if place in self.saved and "num_bad_epochs" in self._state(self.saved[place]):
                known[place] = scheduler
            elif "scheduler" not in self.absent:
                self.told.notes.append(f"The {place} ({_PLATEAU}) is new and starts fresh.")
        return known

    def _unreduced(self, then: list[Json], plateaus: Collection[str]) -> list[float] | None:
        """What the rates in the checkpoint would be without reductions; None where that cannot be told."""
        others = [place for place in self.saved if place not in plateaus]
        if not others:
            return [float(schedule.base_rate(group)) for group in then]
        stepped = []
        for place in others:
            saved, scheduler = self.saved[place], self.schedulers[place]
            steps = schedule.count_steps(self._state(saved))
            is_same = saved.class_name == type(scheduler).__name__ and schedule.can_simulate(scheduler)
            if not is_same or saved.settings is None or steps is None:
                return None
            stepped.append((scheduler, decode(saved.settings, self.load), saved.functions, steps))
        groups = [decode(group, self.load) for group in then]
        for group, live in zip(groups, self.optimizer.param_groups, strict=True):
            if isinstance(live["lr"], torch.Tensor):  # rounded as it was then
                group["lr"] = torch.tensor(group["lr"], dtype=live["lr"].dtype)
        return schedule.rates_of(groups, stepped)

    def _follow_plateaus(
        self,
        plateaus: dict[str, ReduceLROnPlateau],
        then: list[Json],
        today: list[Json],
        unreduced: list[float] | None,
    ) -> None:
        """After the others: what those have made of today's rates is reduced."""
        for place, scheduler in plateaus.items():
            schedule.adopt_counters(scheduler, self._state(self.saved[place]))
        place, scheduler = next(iter(plateaus.items()))
        state = self._state(self.saved[place])
        current = [float(group["lr"]) for group in self._plain_groups()] or [float(one) for one in state["_last_lr"]]
        if unreduced is not None and len(plateaus) == 1:
            settings = self.saved[place].settings
            before = state if settings is None else decode(settings, self.load)
            self.told.notes += schedule.reduce_rates(scheduler, before, list(zip(unreduced, current, strict=True)))
        else:
            for group, old, new, rate in zip(self.optimizer.param_groups, then, today, current, strict=True):
                base = float(schedule.base_rate(old))
                schedule.set_rate(group, float(schedule.base_rate(new)) * (rate / base if base else 1.0))
            self.told.notes.append(
                f"How much of the learning rates of the {self.place} is due to the {place} ({_PLATEAU}), and how much "
                f"to its other schedulers, cannot be told: their share of the first rates is kept."
            )
        schedule.tell_last_rates(self.schedulers.values(), self.optimizer.param_groups)

    def _state(self, saved: Saved) -> Mapping[str, Any]:
        state: Mapping[str, Any] = decode(saved.state, self.load)
        return state

    # Field by field

    def _merge_fields(self) -> None:
        """For a scheduler that cannot be brought there by steps: a user's own, or one that has trained already."""
        scheduled = any(schedule.was_stepped(one) for one in self.schedulers.values())
        merged = []
        for saved, before, now in zip(self._plain_groups(), self._then(), self._today(), strict=False):
            kept = schedule.merge_group(saved, before, now)
            keys = schedule.scheduled_keys(saved, ()) & saved.keys() if scheduled else ()
            merged.append({**kept, **{key: saved[key] for key in keys}})
        self._set_merged(merged)
        for place, scheduler in self.schedulers.items():
            if place in self.saved:
                state = decode(schedule.merge_scheduler(self.saved[place], scheduler, place), self.load)
                load_state(scheduler, schedule.in_kind(state, state_of(scheduler)))
        if scheduled:
            self.told.notes.append(
                "The scheduler has been stepped in this process, so a change of its settings takes effect from here on "
                "only. Make the optimizer and the scheduler anew for the rate of a run that had them from the start."
            )

    def _tell_rates(self) -> None:
        """What the rates are now, where a schedule or the user's change has moved them."""
        if not self.schedulers and not self._lost_its_scheduler:
            return
        now = self._today()
        for index, (saved, live) in enumerate(zip(self._plain_groups(), now, strict=False)):
            if saved["lr"] != live["lr"]:
                self.told.changes[f"{self.place}[{index}].current_lr"] = (saved["lr"], live["lr"])


def _is_plateau(scheduler: Any) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)
