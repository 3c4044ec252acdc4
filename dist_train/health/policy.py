"""What a run does about an update that would ruin the model: what people set, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_train.errors import ConfigError
from dist_train.field_docs import tell_fields

NotFinite = Literal["stop", "skip", "roll_back", "ignore"]
Spike = Literal["stop", "skip", "roll_back"]
_COUNTS = {"spike_window": 8, "clean_steps": 1, "max_skips": 1, "max_roll_backs": 1}
"""The least that makes sense of each."""


@tell_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """What happens where a gradient is not finite, or far larger than usual."""

    not_finite: NotFinite = "stop"
    """Of a gradient with a NaN or an infinity. `stop`: the update is not made, nothing more is saved, and the run ends
    as diverged (93): the default, since nobody but you knows whether such samples may be left out. `skip`: the update
    is not made and training goes on. `roll_back`: back to the newest checkpoint that proved good, and on from there
    without the samples of that window. `ignore`: the update is made. What the GradScaler of fp16 leaves out is its own
    business."""
    spike: Spike | None = None
    """The same for a gradient whose norm is far above the usual. None, the default, judges no norms: what is usual
    differs from model to model, and an update that is left out changes what is trained."""
    spike_sigma: float = 6.0
    """Standard deviations above the mean at which a norm is a spike; OLMo-core's and Levanter's value."""
    spike_window: int = 128
    """Updates that mean and deviation are taken over; until half of them are in, nothing is a spike."""
    clean_steps: int = 20
    """Updates after a checkpoint, none of them bad, by which it has proved good enough to roll back to: what ruins a
    model often begins some updates before it shows."""
    max_skips: int = 20
    """Updates left out in a row after which the run ends as diverged: it is no longer the samples."""
    max_roll_backs: int = 3
    """Roll-backs in a run, over all attempts, after which the next one ends it as diverged."""

    def __post_init__(self) -> None:
        for name, known in (("not_finite", ("stop", "skip", "roll_back", "ignore")), ("spike", _SPIKE)):
            if (value := getattr(self, name)) not in known:
                listed = ", ".join(repr(one) for one in known)
                raise ConfigError(f"HealthPolicy.{name} is {value!r}; it must be one of {listed}.")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"HealthPolicy.{name} is {value!r}; it must be a whole number of at least {least}.")
        if not self.spike_sigma > 0:
            raise ConfigError(f"HealthPolicy.spike_sigma is {self.spike_sigma!r}; it must be above 0.")

    @property
    def watches(self) -> bool:
        """Whether gradients are looked at."""
        return self.not_finite != "ignore" or self.spike is not None

    @property
    def skips(self) -> bool:
        """Whether training may go on after an update that was left out."""
        return "skip" in (self.not_finite, self.spike)

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.not_finite, self.spike)

    def action(self, kind: str) -> str:
        """What is done about a bad update of a kind: `not_finite` or `spike`."""
        return self.not_finite if kind == "not_finite" else self.spike or "ignore"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_SPIKE = (None, "stop", "skip", "roll_back")
