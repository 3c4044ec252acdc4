"""What a run can be told besides its objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError
from dist_train.field_docs import tell_fields
from dist_train.health.patience import Patience
from dist_train.health.policy import HealthPolicy
from dist_train.metrics import EarlyStopping
from dist_train.partial import require_patterns
from dist_train.units import parse_seconds

Json = Any


@tell_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a run can be told besides its objects."""

    early_stopping: EarlyStopping | None = None
    max_steps: int | None = None
    """Stop as done after this many optimizer updates."""
    log_every_steps: int = 50
    """Optimizer updates between records of the training loss; reading it waits for the device."""
    config: Mapping[str, Json] | None = None
    """The user's own settings, recorded in every manifest."""
    search: Sequence[str] = ()
    """Read-only places with earlier checkpoints of this run, as patterns: `("/kaggle/input/*/*",)`."""
    max_time: str | float | None = None
    """How long the session lasts, "11h30m" for instance: the run stops and saves by itself before it is over. Counted
    from DIST_TRAIN_SESSION_START (Unix time) where that is set, else from the start of the launcher."""
    time_reserve: str | float | None = None
    """Part of `max_time` to leave for what follows, packing for instance; None takes 2 %, 5 minutes at most."""
    hang_timeout: str | float | None = "auto"
    """When all ranks come no further for so long, they write their stacks into the run directory's hangs/ and, where a
    launcher restarts them, end. "auto": 5 minutes for a step or a wait for data, or 12 times the usual one. A time
    given here ("10min") holds for these exactly. What compiles, saves, loads, evaluates or is the loop's own code (the
    first step, callbacks) has six times as long, or three times the longest seen. "off" watches nothing."""
    requeue_exit: bool = False
    """End with exit code 75 after a preemption or the time limit, for a scheduler that then starts the run again. Not
    under plain torchrun, which restarts on any code but 0."""
    grace: str | float | None = None
    """How long a rank that was told to leave may take to a step boundary, before it is ended without one; None takes
    DIST_TRAIN_GRACE, else 28 s under torchrun, which kills after 30, and 10 minutes elsewhere."""
    own_gradients: bool = False
    """The loop averages the gradients over the processes by itself: a trained model may then be wrapped by nothing
    that does."""
    health: HealthPolicy = field(default_factory=HealthPolicy)
    """What happens where a gradient is not finite, or far larger than usual."""
    warm_start: str | None = None
    """Weights and buffers that a fresh start begins with; optimizer, schedule, random generators and progress are new.
    "runs/base" (its best checkpoint, or the latest where no metric is monitored), "runs/base:best", "runs/base:latest",
    "runs/base:epoch:15", "runs/base:step:1200", the path of a checkpoint; or the file or folder of other programs:
    .safetensors, .pth, Hugging Face's. The run's own checkpoints come first on every later start, and `resume="must"`
    begins nothing. A start that is killed before its first checkpoint begins with the same again."""
    partial_load: Sequence[str] = ()
    """What of the models may differ from a checkpoint that is loaded: patterns as `fnmatch` has them, over the names of
    parameters and buffers, `("head.*", "old_head.*")`; of several models "NAME.head.*"; one that begins with ! takes
    names out again, `("*", "!body.*")`. Of what matches, what is only here or has another shape or dtype stays as
    constructed, its optimizer state starts fresh, and what is only in the checkpoint is left there; what is equal in
    name, shape and dtype is loaded all the same. All else must be equal. What came of it is told at start. No effect
    once a checkpoint of the new model is resumed from."""
    exclude: Sequence[str] = ()
    """Patterns, as of `partial_load`, of parameters and buffers that checkpoints do without: a frozen base that the
    script itself loads from elsewhere, `("*", "!*lora_*")`, or a large constant. They stay as constructed at every
    start, whatever a checkpoint or `warm_start` holds; give the same values at each, a difference is warned of (not of
    sharded ones). What an optimizer trains is refused."""
    open_store: Callable[[str], Store] = Store
    """Where the run directory lives."""

    def __post_init__(self) -> None:
        require_times("RunOptions", self.max_time, self.time_reserve, self.grace)
        require_hang_timeout("RunOptions", self.hang_timeout)
        require_patterns("RunOptions", "partial_load", self.partial_load)
        require_patterns("RunOptions", "exclude", self.exclude)


def require_times(
    owner: str, max_time: str | float | None, time_reserve: str | float | None, grace: str | float | None = None
) -> None:
    """Raises ConfigError for what is no such time, in the name of the class it was given to."""
    for name, value, least in (
        ("max_time", max_time, "longer than nothing"),
        ("time_reserve", time_reserve, "0 or more"),
        ("grace", grace, "longer than nothing"),
    ):
        if value is None:
            continue
        try:
            seconds = parse_seconds(value)
        except ConfigError as error:
            raise ConfigError(f"{owner}.{name}: {error}") from None
        if seconds < 0 or (name != "time_reserve" and seconds == 0):
            raise ConfigError(f"{owner}.{name} is {value!r}; it must be {least}, for instance '11h30m'.")


def require_hang_timeout(owner: str, hang_timeout: str | float | None) -> None:
    """Raises ConfigError for one that is no time, in the name of the class it was given to."""
    try:
        Patience.parse(hang_timeout)
    except ConfigError as error:
        raise ConfigError(f"{owner}.hang_timeout: {error}") from None
