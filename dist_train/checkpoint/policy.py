"""When to save, as a pure function of what has happened; effects live in the checkpointer."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_train.errors import ConfigError

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_seconds(duration: str | float) -> float:
    """Seconds of `"10min"`, `"11h30m"`, `"90s"` or a number of seconds."""
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and duration == duration:
        return float(duration)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(sec|min|[smhd])", str(duration))
    if not parts or "".join(n + u for n, u in parts) != re.sub(r"\s", "", str(duration)):
        raise ConfigError(f"{duration!r} is not a duration; write for instance '10min', '11h30m' or 90 (seconds).")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """When to save and what to keep. Several triggers may be given; each one saves."""

    every_steps: int | None = None
    """Optimizer updates between saves."""
    every_epochs: int | None = None
    """Epochs between saves; these follow the epoch's evaluation."""
    every: str | float | None = None
    """Wall-clock time between saves, for instance "10min"; read on the main rank only."""
    at_end: bool = True
    """Save when the run ends or stops, unless that very step is saved already."""
    keep_last: int = 3
    """Newest checkpoints to keep; 1 is taken at its word, otherwise two verified ones always stay."""
    keep_best: int = 1
    """Checkpoints with the best monitored metric to keep besides; 0 keeps none for that reason."""
    monitor: str | None = None
    """Name of the metric that decides what is best; None takes the first one given at an epoch's end."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher monitored metric is better."""
    max_failed_saves: int = 5
    """Failed saves in a row that training survives; the next one stops it."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_epochs", "keep_last", "max_failed_saves"):
            value = getattr(self, name)
            optional = name in ("every_steps", "every_epochs")
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (optional and value is None):
                raise ConfigError(f"CheckpointPolicy.{name} is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.keep_best, int) or self.keep_best < 0:
            raise ConfigError(f"CheckpointPolicy.keep_best is {self.keep_best!r}; it must be 0 or more.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"CheckpointPolicy.mode is {self.mode!r}; it must be 'min' or 'max'.")
        if self.every is not None and parse_seconds(self.every) <= 0:
            raise ConfigError(f"CheckpointPolicy.every is {self.every!r}; it must be longer than nothing.")

    @property
    def every_seconds(self) -> float | None:
        return None if self.every is None else parse_seconds(self.every)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> CheckpointPolicy:
        unknown = sorted(set(values) - set(CheckpointPolicy.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"CheckpointPolicy has no setting {', '.join(unknown)}.")
        return CheckpointPolicy(**values)


DEFAULT_POLICY = CheckpointPolicy(every_epochs=1, every="10min")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What the decision is made from, at a step boundary or at an epoch's end."""

    global_step: int
    last_saved_step: int
    """Step of the newest save that was begun or resumed from; -1 when there is none."""
    ends_epoch: bool
    """The epoch's last update is in."""
    evaluated: bool = False
    """The epoch's evaluation is in too: this is `end_epoch`."""
    epochs_completed: int = 0
    time_is_up: bool = False
    """Agreed by all ranks from the main rank's clock: `every` has passed since the last save."""
    stopping: bool = False
    requested: bool = False
    finished: bool = False
    """The last epoch is complete."""


def should_save(policy: CheckpointPolicy, moment: Moment) -> str | None:
    """Why to save now, or None.

    A save due at an epoch's last update waits for the evaluation, so that its metrics are in it; a stop or a request
    does not wait ("evaluation pending").
    """
    if moment.requested:
        return "requested"
    if moment.ends_epoch and not moment.evaluated and not moment.stopping:
        return None
    if moment.evaluated and policy.every_epochs and moment.epochs_completed % policy.every_epochs == 0:
        return "every_epochs"
    if moment.finished or moment.stopping:
        # The evaluation changes the state without a step: what was saved before it at this step is out of date.
        fresh = moment.last_saved_step == moment.global_step and not moment.evaluated
        return "end" if policy.at_end and not fresh else None
    if moment.last_saved_step == moment.global_step:
        return None
    if policy.every_steps and moment.global_step % policy.every_steps == 0:
        return "every_steps"
    return "every" if moment.time_is_up else None
