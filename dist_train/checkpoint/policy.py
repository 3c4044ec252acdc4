"""When to save, as a pure function of what has happened, and what to keep; effects live in the checkpointer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_train.errors import ConfigError
from dist_train.field_docs import tell_fields
from dist_train.units import parse_bytes, parse_seconds


@tell_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """When to save and what to keep. Several triggers may be given; each one saves.

    A checkpoint is kept for any one of the reasons below, or because it is pinned; `max_bytes` then takes some away.
    """

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
    keep_every_epochs: int | None = None
    """Keep what was saved after every k-th epoch for ever: 5 keeps epochs 5, 10, 15 ... It saves nothing itself."""
    keep_every_steps: int | None = None
    """Keep what was saved at multiples of this step for ever. It saves nothing itself."""
    keep_optimizer: int | None = None
    """Newest checkpoints that keep the state of optimizer and scheduler; older ones become weights-only, about a third
    of the size: good for inference, and a resume from them starts the optimizer fresh. None keeps it in all."""
    max_bytes: str | float | None = None
    """Budget for the whole run directory, logs and abandoned checkpoints included, for instance "18GB"; room for the
    next save is left within it. It never takes a pinned or best one, nor the last two that verify."""
    monitor: str | None = None
    """Name of the metric that decides what is best; None takes the first one given at an epoch's end."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher monitored metric is better."""
    max_failed_saves: int = 5
    """Failed saves in a row that training survives; the next one stops it."""

    def __post_init__(self) -> None:
        required = ("keep_last", "max_failed_saves")
        optional = ("every_steps", "every_epochs", "keep_every_epochs", "keep_every_steps", "keep_optimizer")
        for name in (*required, *optional):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name in optional and value is None):
                raise ConfigError(f"CheckpointPolicy.{name} is {value!r}; it must be a whole number of at least 1.")
        if not isinstance(self.keep_best, int) or self.keep_best < 0:
            raise ConfigError(f"CheckpointPolicy.keep_best is {self.keep_best!r}; it must be 0 or more.")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"CheckpointPolicy.mode is {self.mode!r}; it must be 'min' or 'max'.")
        if self.every is not None and parse_seconds(self.every) <= 0:
            raise ConfigError(f"CheckpointPolicy.every is {self.every!r}; it must be longer than nothing.")
        if self.max_bytes is not None and parse_bytes(self.max_bytes) <= 0:
            raise ConfigError(f"CheckpointPolicy.max_bytes is {self.max_bytes!r}; it must be more than nothing.")

    @property
    def every_seconds(self) -> float | None:
        return None if self.every is None else parse_seconds(self.every)

    @property
    def budget(self) -> int | None:
        """`max_bytes` in bytes."""
        return None if self.max_bytes is None else parse_bytes(self.max_bytes)

    def settings_without_effect(self) -> list[str]:
        """One sentence for each setting that does nothing, or less than it says, beside the others."""
        told = []
        for unit in ("epochs", "steps"):
            kept, saved = getattr(self, f"keep_every_{unit}"), getattr(self, f"every_{unit}")
            if kept and saved is None:
                told.append(
                    f"keep_every_{unit}={kept} keeps what was saved at those {unit}, but no every_{unit} saves there: "
                    f"give every_{unit} too, or save there yourself."
                )
            elif kept and kept % saved:
                common = math.lcm(kept, saved)
                told.append(
                    f"keep_every_{unit}={kept} keeps only {unit} {common}, {2 * common}, {3 * common} ..., since "
                    f"every_{unit}={saved} saves at no other of its multiples: make it a multiple of {saved}."
                )
        return told

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
