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
                if isinstance(group.get(key), torch.Tensor):
                    group[key].copy_(torch.as_tensor(value))  # a capturable rate is read through this very tensor
                else:
                    group[key] = schedule.readable(value)

    def _load_state(self, scheduler: Any, json: Json) -> None:
        scheduler.load_state_dict(decode(json, self.load))

    # Today's schedule

    def _is_followed(self, place: str) -> bool:
        """Whether today's rate can be told from the old scheduler's counters."""
        scheduler = self.schedulers[place]
        if place not in self.saved or self.saved[place].class_name not in ("", type(scheduler).__name__):
            return True
        plateau = isinstance(scheduler, ReduceLROnPlateau) and not schedule.was_stepped(scheduler)
        return plateau or schedule.can_replay(scheduler)

    def _follow(self) -> None:
        """Fresh schedulers first, on groups as they were constructed; then whatever they do not set."""
        then, today = self._then(), self._today()
        for place, scheduler in self.schedulers.items():
            if isinstance(scheduler, ReduceLROnPlateau):
                self._follow_plateau(place, scheduler)
            elif (steps := self._steps(place, scheduler)) is not None:
                schedule.replay(scheduler, steps, place)
        merged = []
        for saved, before, now in zip(self._plain_groups(), then, today, strict=False):
            keys: frozenset[str] = frozenset()
            if self.schedulers or self._lost_its_scheduler:
                keys = schedule.scheduled_keys(saved, self.schedulers.values())
            merged.append(decode(schedule.merge_group(saved, before, now, live=keys), self.load))
        if self.groups is not None:
            self._set_groups(merged)

    def _steps(self, place: str, scheduler: Any) -> float | None:
        """How often today's scheduler would have been stepped; None where it starts fresh."""
        saved = self.saved.get(place)
        if saved is None and "scheduler" in self.absent:
            return None
        if not schedule.can_replay(scheduler):
            self.told.notes.append(f"The {place} ({type(scheduler).__name__}) starts fresh: it counts no steps.")
            return None
        steps = None if saved is None or saved.class_name == _PLATEAU else schedule.count_steps(self._state(saved))
        if steps is None:
            self.told.notes.append(
                f"The {place} is new: it starts where {self.global_step} updates bring it, one step an update."
            )
            return self.global_step
        return steps

    def _follow_plateau(self, place: str, scheduler: ReduceLROnPlateau) -> None:
        saved = self.saved.get(place)
        state = self._state(saved) if saved else {}
        if "num_bad_epochs" not in state:
            if "scheduler" not in self.absent:
                self.told.notes.append(f"The {place} ({_PLATEAU}) is new and starts fresh.")
            return
        assert saved is not None
        then = self._state(saved) if saved.settings is None else decode(saved.settings, self.load)
        lasts = [float(rate) for rate in state["_last_lr"]]
        rates = [
            (float(schedule.base_rate(before)), float(group["lr"]))
            for before, group in zip(self._then(), self._plain_groups(), strict=False)
        ] or [(float(group["lr"]), last) for group, last in zip(self.optimizer.param_groups, lasts, strict=True)]
        self.told.notes += schedule.follow_plateau(scheduler, state, then, rates)

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
            merged.append(decode({**kept, **{key: saved[key] for key in keys}}, self.load))
        if self.groups is not None:
            self._set_groups(merged)
        for place, scheduler in self.schedulers.items():
            if place in self.saved:
                self._load_state(scheduler, schedule.merge_scheduler(self.saved[place], scheduler, place))
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
