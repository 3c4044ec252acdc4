"""Which faults a drill injects, and when, as a pure function of the seed. [stdlib only]

Invariant: the faults come one after another, each in a life of the run in which it can come: a checkpoint is corrupted
when there are two, and what happens inside of a save is due before a save that is still to come.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dist_train.drill.fault_plan import MOMENTS_OF_A_SAVE, FaultPlan
from dist_train.phases import Point

KINDS: Final = ("kill in a save", "corrupt", "terminate", "full disk", "kill", "stop")
NAMES: Final = {
    "kill": "SIGKILL",
    "terminate": "SIGTERM",
    "stop": "SIGSTOP",
    "fail_io": "full disk",
    "corrupt_newest": "corrupted checkpoint",
}
_SHARDS: Final = "checkpoints/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the uninterrupted run did."""

    last_step: int
    save_every: int
    """Optimizer updates between its saves."""
    saves_within_epochs: Sequence[int]
    """Steps of the saves after which the epoch went on: a resume from there has to find its place in the data."""


def plan_faults(folder: Path, *, count: int, seed: int, course: Course) -> FaultPlan:
    """`count` faults; the first are one of each kind, in the seed's order. One of them always is a kill that makes the
    run go on from within an epoch, if it saves there at all.
    """
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != "corrupt" or course.last_step > 3 * course.save_every]
    chosen = [kinds[index % len(kinds)] for index in range(count)]
    rng.shuffle(chosen)
    steps = sorted(rng.randint(1, max(course.last_step - 1, 1)) for _ in chosen)
    plan = FaultPlan(folder, seed=seed, in_order=True)
    is_first = True
    for kind, step in zip(chosen, steps, strict=True):
        if kind == "kill in a save":
            _kill_in_a_save(plan, step, rng, course, is_durable=is_first)
            is_first = False
        else:
            _add(plan, kind, step, course)
    return plan


def _kill_in_a_save(plan: FaultPlan, step: int, rng: random.Random, course: Course, *, is_durable: bool) -> None:
    later = [one for one in course.saves_within_epochs if one >= step]
    places = later[:1] or list(course.saves_within_epochs[-1:]) or [_before_a_save(step, course)]
    moments = (Point.AFTER_COMMIT, Point.RETENTION) if is_durable else MOMENTS_OF_A_SAVE
    plan.kill(0, at_phase=rng.choice(moments), at_step=places[0])


def _add(plan: FaultPlan, kind: str, step: int, course: Course) -> None:
    if kind == "corrupt":
        plan.corrupt_newest(at_step=max(step, 2 * course.save_every + 1))
    elif kind == "terminate":
        plan.terminate("all", at_step=step)
    elif kind == "full disk":
        plan.fail_io(errno.ENOSPC, kind="write", path=_SHARDS, at_step=_before_a_save(step, course), times=2)
    elif kind == "stop":
        plan.stop("random", at_step=step)
    else:
        plan.kill("random", at_step=step)


def _before_a_save(step: int, course: Course) -> int:
    return min(step, max(course.last_step - course.save_every, 0))
