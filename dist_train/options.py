"""What a run can be told besides its objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint.store import Store
from dist_train.metrics import EarlyStopping

Json = Any


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
    own_gradients: bool = False
    """The loop averages the gradients over the processes by itself: a trained model may then be wrapped by nothing
    that does."""
    open_store: Callable[[str], Store] = Store
    """Where the run directory lives."""
