"""The end of a session: whether what comes next still fits before it.

    session's start ... steps, evaluations | the save at the stop | reserve for what follows (pack) | max_time

Invariant: it knows what it was told and what the injected clock says, and does nothing by itself: the main rank asks,
and all ranks agree. Reading the time at which the session began (`session_start`) is the one look at the machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import psutil

from dist_train.console import seconds_text
from dist_train.errors import ConfigError

SESSION_START = "DIST_TRAIN_SESSION_START"
"""Environment variable: Unix time at which the session began; whoever starts the launcher sets it."""
RESERVE_SHARE = 0.02
MOST_RESERVE_SECONDS = 300.0
UNMEASURED_SAVE_SHARE = 0.02
MOST_UNMEASURED_SAVE_SECONDS = 120.0
UNMEASURED_EVALUATION_SHARE = 0.25
"""Of the time that the epoch has trained here: what an evaluation is believed to take before one was measured."""


class Deadline:
    """Measures steps, evaluations and saves, and says when the next one does not fit any more.

    Args:
        max_seconds: length of the session; infinite where there is no limit, and on all ranks but the main one.
        age_seconds: how old the session is now.
        reserve_seconds: kept free at its end; None takes 2 % of the session, 5 minutes at most.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        max_seconds: float = math.inf,
        *,
        age_seconds: float = 0.0,
        reserve_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max = max_seconds
        self._clock = clock
        self._origin = clock() - age_seconds
        default = min(RESERVE_SHARE * max_seconds, MOST_RESERVE_SECONDS)
        self._reserve = default if reserve_seconds is None else reserve_seconds
        self._save = min(UNMEASURED_SAVE_SHARE * max_seconds, MOST_UNMEASURED_SAVE_SECONDS)
        self._save_is_measured = self._is_saving = False
        self._evaluation: float | None = None
        self._steps = 0
        self._step_total = self._longest_step = 0.0
        self._mark = self._epoch_began = clock()
        self._why = ""

    @property
    def why(self) -> str:
        """What did not fit, as a sentence; "" as long as all did."""
        return self._why

    @property
    def has_stepped(self) -> bool:
        """Whether there was time for a step at all."""
        return self._steps > 0

    @property
    def longest_seconds(self) -> float:
        """What a rank that was told to leave may need until it can: the slowest step, or evaluation, so far."""
        return max(self._longest_step, self._evaluation or 0.0)

    def begin(self) -> None:
        """The loop begins now; what came before it is nobody's step."""
        self._mark = self._epoch_began = self._clock()

    def step_done(self) -> None:
        """An optimizer update is in. What a save made it wait belongs to the step after it."""
        seconds = self._lap()
        self._steps += 1
        self._step_total += seconds
        self._longest_step = max(self._longest_step, seconds)

    def evaluation_done(self) -> None:
        """The epoch's evaluation is in, measured from its last update on."""
        self._evaluation = max(self._evaluation or 0.0, self._lap())
        self._epoch_began = self._mark

    def save_begun(self) -> None:
        self._is_saving = True

    def save_ended(self, seconds: float | None = None) -> None:
        """What a save took from its beginning until it was durable; None where it failed."""
        self._is_saving = False
        if seconds is not None:
            self._save = max(self._save, seconds) if self._save_is_measured else seconds
            self._save_is_measured = True

    def is_over(self, *, steps: int = 1, evaluation: bool = False) -> bool:
        """Whether so many steps (until the ranks agree again), an evaluation, or both do not fit any more."""
        if math.isinf(self._max):
            return False
        now = self._clock()
        needs = {
            _counted(steps, "step"): self._seconds_of_steps(steps),
            "the evaluation": self._seconds_of_evaluation(now) if evaluation else 0.0,
            "a save": self._save * (1 + self._is_saving),
            "the reserve for what follows": self._reserve,
        }
        age = now - self._origin
        if age + math.fsum(needs.values()) < self._max:
            return False
        parts = [f"{what} ({_shown(seconds)})" for what, seconds in needs.items() if seconds > 0]
        rest = f"; {_listed(parts)} would not fit any more" if parts and age < self._max else ""
        self._why = f"the session has run {seconds_text(age)} of at most {seconds_text(self._max)}{rest}"
        return True

    def _seconds_of_steps(self, steps: int) -> float:
        """One as slow as the slowest so far, the others as usual."""
        if not steps or not self._steps:
            return 0.0
        return self._longest_step + (steps - 1) * self._step_total / self._steps

    def _seconds_of_evaluation(self, now: float) -> float:
        if self._evaluation is not None:
            return self._evaluation
        return UNMEASURED_EVALUATION_SHARE * (now - self._epoch_began)

    def _lap(self) -> float:
        before, self._mark = self._mark, self._clock()
        return self._mark - before


def session_start() -> float:
    """Unix time at which the session began: what the environment says, else the start of the launcher or of this
    process. A launcher that restarts its workers has only one.

    Raises:
        ConfigError: the environment variable holds no time.
    """
    if told := os.environ.get(SESSION_START):
        try:
            return float(told)
        except ValueError:
            raise ConfigError(
                f"The environment variable {SESSION_START} is {told!r}; it must be a Unix time in seconds, as "
                f"`date +%s` prints it. Correct it, or unset it to count from the start of the launcher."
            ) from None
    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process = process.parent() or process
    return float(process.create_time())


def _counted(steps: int, what: str) -> str:
    return f"the next {what}" if steps <= 1 else f"the next {steps} {what}s"


def _shown(seconds: float) -> str:
    return seconds_text(math.ceil(seconds))


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
