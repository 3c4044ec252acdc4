"""Where the best model of a run lies that was trained over several sessions.

Invariant: reads only, through the command line's JSON; what is best is decided by the metric and direction that the
run's newest checkpoint names, over this session's directory and all attached outputs of the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.console import metric_text

SEARCH_LEVELS = 5
"""How deep below the inputs a file may lie: `input/notebooks/OWNER/NAME/...` is three."""
Ask = Callable[[str, Path], Any]
"""A command of `dist-train` and a run directory -> its JSON, None where it fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestModel:
    """The best checkpoint that there is."""

    run: Path
    """The run directory that holds it."""
    monitor: str
    value: float
    epochs_completed: int
    better: tuple[float, int] | None
    """Value and step of a better one, which is in no directory that is attached."""

    @property
    def value_text(self) -> str:
        return metric_text(self.monitor, self.value)

    @property
    def better_text(self) -> str:
        """What is missing, in words; "" where this is the best of all."""
        if self.better is None:
            return ""
        value, step = self.better
        return f"The best model ({metric_text(self.monitor, value)}, step {step}) is in no attached version"


def find_best_model(run: Path, inputs: Path, ask: Ask) -> BestModel | None:
    """None where no checkpoint has a monitored metric; the run directory of this session comes first in a tie."""
    places = [run, *attached_runs(inputs, _run_id(run / "run.json"))]
    newest = max(
        (shown["checkpoint"] for place in places if (shown := ask("show", place))),
        key=lambda checkpoint: int(checkpoint["sequence"]),
        default=None,
    )
    best = newest["best"] if newest else None
    if best is None:
        return None
    monitor, sign = best["monitor"], 1 if best["mode"] == "min" else -1
    scored = [
        (sign * row["metrics"][monitor], row["sequence"], place, row)
        for place in places
        for row in ask("ls", place) or ()
        if "problem" not in row and row["metrics"].get(monitor) is not None
    ]
    if not scored:
        return None
    score, _, place, row = min(scored, key=lambda one: one[:2])
    return BestModel(
        run=place,
        monitor=monitor,
        value=row["metrics"][monitor],
        epochs_completed=row["epochs_completed"],
        better=(best["value"], best["global_step"]) if sign * best["value"] < score else None,
    )


def attached_runs(inputs: Path, run_id: str) -> Iterator[Path]:
    """Directories of this run among what is attached."""
    for depth in range(1, SEARCH_LEVELS + 1):
        for file in sorted(inputs.glob("*/" * depth + "run.json")):
            if run_id and _run_id(file) == run_id:
                yield file.parent


def _run_id(file: Path) -> str:
    try:
        return str(json.loads(file.read_bytes())["run_id"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
