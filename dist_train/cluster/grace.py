"""How long the platform lets processes take between its first signal and SIGKILL, where it can be known.

Invariant: reads only; an answer that nobody can give is None, not a guess.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from dist_train.errors import ConfigError
from dist_train.units import parse_seconds

VARIABLE = "DIST_TRAIN_GRACE"
"""Environment variable, in seconds: Kubernetes tells a pod nothing of its terminationGracePeriodSeconds."""
ENOUGH_SAVES = 1.5
"""A last save may wait for one in flight, and both compete with whatever else ends on the machine."""
_KILL_WAIT = re.compile(r"^KillWait\s*=\s*(\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Grace:
    """Seconds, and who says so; None where nobody does."""

    seconds: float | None
    source: str = ""

    def why_too_short(self, save_seconds: float) -> str:
        """Why a last save may not come through; "" where there is time enough, or nobody knows."""
        if self.seconds is None or save_seconds * ENOUGH_SAVES <= self.seconds:
            return ""
        return (
            f"a save takes {save_seconds:.0f} s, and {self.source} gives {self.seconds:.0f} s from the signal to "
            f"SIGKILL: the last save may not come through, and training would go on from an older one. Raise it "
            f"(Kubernetes: terminationGracePeriodSeconds; SLURM: --signal=USR1@{2 * save_seconds + 60:.0f}), or save "
            f"more often"
        )


def find_grace(told: str | None) -> Grace:
    """The option's, else the environment's, else SLURM's KillWait.

    Raises:
        ConfigError: what was told is no time.
    """
    for text, source in ((told, "--grace"), (os.environ.get(VARIABLE), VARIABLE)):
        if text:
            return Grace(_positive(text, source), source)
    return Grace(_slurm_kill_wait() if "SLURM_JOB_ID" in os.environ else None, "SLURM's KillWait")


def _positive(text: str, source: str) -> float:
    seconds = float(text) if text.strip().replace(".", "", 1).isdecimal() else parse_seconds(text)
    if seconds <= 0:
        raise ConfigError(f"{source} is {text!r}; give the seconds that the platform waits before it kills: 30.")
    return seconds


def _slurm_kill_wait() -> float | None:
    try:
        said = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = _KILL_WAIT.search(said)
    return float(found[1]) if found else None
