"""What `recorder` wrote of one drilled run: by rank and attempt, where it began, what each step used. [stdlib only]"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Json = Any
RECORDS = "records"
_APART = re.compile(r"-[0-9a-f]{6}$")
_NAME = re.compile(r"a(\d+)-r(\d+)\.jsonl")


@dataclass(slots=True)
class Life:
    """One attempt of a run on one rank."""

    attempt: int
    rank: int
    begin: Json = None
    """Where its loop began; None if it died before."""
    steps: dict[int, Json] = field(default_factory=dict)

    @property
    def began_at(self) -> int:
        return int(self.begin["step"]) if self.begin else 0


Records = dict[str, list[Life]]
"""Run's name -> its lives, by attempt and rank."""


def read_records(folder: str | Path) -> Records:
    """Of all runs of a script; a line that a kill has torn is left out."""
    found: Records = {}
    for path in sorted(Path(folder, RECORDS).glob("*/*.jsonl")):
        if match := _NAME.fullmatch(path.name):
            life = Life(int(match[1]), int(match[2]))
            for line in _lines(path):
                if line["kind"] == "begin":
                    life.begin = line
                else:
                    life.steps[line["step"]] = line
            found.setdefault(path.parent.name, []).append(life)
    return found


def _lines(path: Path) -> Iterator[Json]:
    for text in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def shown_names(records: Records) -> dict[str, str]:
    """Each run as people know it: its directory's name, without what keeps equal ones apart in scratch."""
    short = {name: _APART.sub("", name) for name in records}
    return {name: one if list(short.values()).count(one) == 1 else name for name, one in short.items()}


def last_step(records: Records) -> int:
    """Of any run."""
    return max((step for lives in records.values() for life in lives for step in life.steps), default=0)


def epochs_ended(records: Records) -> int:
    """How often the main rank went on to another epoch."""
    return sum(
        max((line["epoch"] for line in life.steps.values()), default=0)
        for lives in records.values()
        for life in lives
        if life.rank == 0
    )


def slowest_step_seconds(records: Records) -> float:
    """Between two steps of one life."""
    gaps = [0.0]
    for lives in records.values():
        for life in lives:
            times = [life.steps[step]["at"] for step in sorted(life.steps)]
            gaps += [later - earlier for earlier, later in pairwise(times)]
    return max(gaps)
