"""Where this process is in a run: the one seam that the watchdog, the ledger of time and injected faults listen to.

    START -> RENDEZVOUS -> LOAD -> OTHER -> [ DATA -> STEP ]* -> EVALUATION -> ... -> END -> OUTSIDE
                                               CAPTURE, SAVE_WAIT: training waits for a save

Invariant: at every moment the process is in exactly one phase, so that what is measured by phases adds up to the time
that has passed. Phases belong to the main thread; points may be reached in any. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum


class Phase(StrEnum):
    """What the main thread is at."""

    START = "start"
    """The script's own beginning: imports, objects, data."""
    RENDEZVOUS = "rendezvous"
    """The ranks find each other."""
    LOAD = "load"
    """A checkpoint goes into the live objects."""
    DATA = "data"
    """A batch is waited for."""
    STEP = "step"
    """Forward, backward, update: from a batch to `run.step`."""
    EVALUATION = "evaluation"
    """From an epoch's last update to `run.end_epoch`."""
    CAPTURE = "capture"
    """Training waits while its state is copied: the stall of a save."""
    SAVE_WAIT = "save_wait"
    """Training waits until a save is durable."""
    OTHER = "other"
    """Between those: agreeing, logging, callbacks."""
    END = "end"
    """The `with Run` block is being left."""
    OUTSIDE = "outside"
    """After it."""


class Point(StrEnum):
    """A moment worth telling, most of them on the writer's thread."""

    STEP_DONE = "step_done"
    """An optimizer update is counted, and the ranks have not agreed on what follows it yet."""
    WRITING = "writing"
    """A rank's file is about to be written."""
    BEFORE_COMMIT = "before_commit"
    """All shards are durable; the manifest is not in place."""
    AFTER_COMMIT = "after_commit"
    """The checkpoint is durable, and nobody was told yet."""
    RETENTION = "retention"
    """Older checkpoints are about to be deleted."""


Change = Callable[[Phase, Phase], object]
"""Told of (before, now)."""


class _Place:
    """Of this process."""

    phase = Phase.START
    global_step = 0
    beats = 0
    awaited = ""
    changes: tuple[Change, ...] = ()
    points: tuple[Callable[[Point], object], ...] = ()


_place = _Place()


def current() -> Phase:
    """The phase that this process is in."""
    return _place.phase


def global_step() -> int:
    """Optimizer updates done, as the run said last."""
    return _place.global_step


def tell_step(step: int) -> None:
    _place.global_step = step


def beats() -> int:
    """Counts up whenever the main thread has come further: with each phase, and with each `beat` within one."""
    return _place.beats


def beat() -> None:
    """This phase goes on and has come further: a batch of an evaluation, a piece of a file."""
    _place.beats += 1


def awaited() -> str:
    """What the other ranks are waited for to agree on; "" while nobody is."""
    return _place.awaited


@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """For the length of the block this process only waits for the other ranks; the phase goes on meanwhile."""
    _place.beats += 1
    before, _place.awaited = _place.awaited, what
    try:
        yield
    finally:
        _place.awaited = before
        _place.beats += 1


def switch(phase: Phase) -> None:
    """From now on this process is in `phase`."""
    before, _place.phase = _place.phase, phase
    _place.beats += 1
    if before is not phase:
        for listener in _place.changes:
            listener(before, phase)


@contextmanager
def within(phase: Phase) -> Iterator[None]:
    """In `phase` for the length of the block, then back in the one before."""
    before = _place.phase
    switch(phase)
    try:
        yield
    finally:
        switch(before)


def reach(point: Point) -> None:
    """Tells that this moment is here; in any thread."""
    for listener in _place.points:
        listener(point)


def listen(listener: Change) -> Callable[[], None]:
    """Calls `listener(before, now)` at each change of phase; the returned function ends that."""
    _place.changes += (listener,)
    return lambda: setattr(_place, "changes", tuple(one for one in _place.changes if one is not listener))


def on_reach(listener: Callable[[Point], object]) -> Callable[[], None]:
    """Calls `listener(point)` at each point; the returned function ends that."""
    _place.points += (listener,)
    return lambda: setattr(_place, "points", tuple(one for one in _place.points if one is not listener))
