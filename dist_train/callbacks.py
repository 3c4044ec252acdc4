"""Functions of the user's that a run calls when something happens.

    event       when, and what is at hand                                                        on which ranks
    started     before the first epoch of a fresh run                                            all
    resumed     before the first epoch of a resumed one; `path` is the checkpoint                all
    step        after an optimizer update, before its checkpoint is saved                        all
    epoch_end   after an epoch's evaluation, before its checkpoint is saved; `metrics`           all
    committed   a checkpoint is durable; `path`, `metrics`, `ends_epoch`, `reason`               the main rank
    stopping    once, when no further update comes; `reason`                                     all

Invariant: they are called on the main thread, between two updates, in the order in which they were given; what one
raises ends the run as any error in the loop does, and says which one it was. Nothing is called after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dist_train.checkpoint.manifest import Manifest
from dist_train.errors import ConfigError, StopReason

EVENTS: Final = ("started", "resumed", "step", "epoch_end", "committed", "stopping")


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """What a callback is told: its only argument."""

    event: str
    run: Any
    """The `Run`, for everything else: `run.stop()`, `run.save()`, `run.world`."""
    global_step: int
    """Optimizer updates done; of a committed checkpoint, its own."""
    epochs_completed: int
    """Likewise."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation that this follows; empty within an epoch."""
    path: str = ""
    """Folder of the checkpoint, of `committed` and `resumed`."""
    reason: str = ""
    """Why the run stops (`done`, `preempted` ...), or why the checkpoint was saved (`every_epochs` ...)."""
    ends_epoch: bool = False
    """Whether a committed checkpoint is that of an epoch's end, evaluated."""


Callback = Callable[[Happening], object]


class Callbacks:
    """The callbacks of one run, by event."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._by_event: dict[str, list[Callback]] = {event: [] for event in EVENTS}
        self._told_of_stop = False

    def add(self, event: str, callback: Callback) -> bool:
        """Whether it is new to the run. Raises ConfigError for an event that there is not, or what cannot be called."""
        if event not in self._by_event:
            raise ConfigError(f"There is no event {event!r}; there are {', '.join(EVENTS)}.")
        if not callable(callback):
            raise ConfigError(f"The callback on {event!r} is a {type(callback).__name__}; give a function.")
        is_new = all(known is not callback for callbacks in self._by_event.values() for known in callbacks)
        self._by_event[event].append(callback)
        return is_new

    def tell(self, event: str, **details: Any) -> None:
        """Calls the event's callbacks; what one raises carries its name as a note."""
        if not self._by_event[event]:
            return
        counts = {"global_step": self._run.global_step, "epochs_completed": self._run.epochs_completed}
        happening = Happening(event=event, run=self._run, **{**counts, **details})
        for callback in self._by_event[event]:
            try:
                callback(happening)
            except Exception as error:
                step = happening.global_step
                error.add_note(f"Raised by the callback {name_of(callback)} on {event!r} at step {step}.")
                raise

    def tell_of_commit(self, path: str, manifest: Manifest) -> None:
        progress = manifest.progress
        self.tell(
            "committed",
            path=path,
            global_step=progress.global_step,
            epochs_completed=progress.epochs_completed,
            metrics=manifest.metrics,
            reason=manifest.reason,
            ends_epoch=progress.evaluation == "done",
        )

    def tell_of_stop(self, reason: StopReason) -> None:
        """Once."""
        if not self._told_of_stop:
            self._told_of_stop = True
            self.tell("stopping", reason=str(reason))


def name_of(callback: Callback) -> str:
    """As people know it: a function's name, an object's class."""
    return str(getattr(callback, "__qualname__", type(callback).__name__))


def has_state(callback: Callback) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
