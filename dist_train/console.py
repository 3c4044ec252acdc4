"""What a person sees and what the run writes about itself: terminal lines, run.jsonl, metrics.jsonl.

Invariant: the only module that prints; only the main rank's lines reach the terminal. `metrics.jsonl` holds nothing
that a clock decides, so that the folded history of a run that was killed equals that of one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from dist_train.checkpoint.manifest import EVENTS_LOG, METRICS_LOG
from dist_train.checkpoint.store import Store

Json = Any
_PERCENT = ("smape", "mape", "percent")


def set_up_logging(rank: int = 0, world_size: int = 1, attempt: int = 1) -> None:
    """Once, by entry points: main rank INFO, the others WARNING; a rank prefix where there is more than one."""
    package = logging.getLogger("dist_train")
    prefix = f"[rank {rank}/{world_size} attempt {attempt}] " if world_size > 1 else ""
    for handler in [one for one in package.handlers if getattr(one, "of_dist_train", False)]:
        package.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.of_dist_train = True  # type: ignore[attr-defined]
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False


class Console:
    """Plain lines, and one live line where a terminal is there to overwrite it."""

    def __init__(self, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._stream = stream or sys.stdout
        self._live = ""
        self._is_terminal = self._stream.isatty()

    @property
    def is_live(self) -> bool:
        """Whether there is a live line at all."""
        return self._enabled and self._is_terminal

    def say(self, text: str) -> None:
        """One plain line, on the main rank."""
        if self._enabled:
            self._clear()
            self._print(text, end="\n")
            self._draw()

    def show(self, text: str) -> None:
        """Replaces the live line; nothing where the output is not a terminal."""
        if self.is_live:
            self._clear()
            self._live = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            self._draw()

    def end_live(self) -> None:
        """Takes the live line away."""
        self._clear()
        self._live = ""

    def _clear(self) -> None:
        if self._live:
            self._print("\r" + " " * len(self._live) + "\r", end="")

    def _draw(self) -> None:
        if self._live:
            self._print("\r" + self._live, end="")

    def _print(self, text: str, end: str) -> None:
        """A reader who has gone away (`| head`) must not end a training."""
        try:
            print(text, end=end, file=self._stream, flush=True)
        except OSError:
            self._enabled = False


def print_text(text: str, *, error: bool = False) -> None:
    """The command line's output."""
    print(text, file=sys.stderr if error else sys.stdout)


class _Lines:
    """Appends to a file. Lines that could not be written (a full disk) are kept and written with the next ones."""

    def __init__(self, store: Store, path: str, *, enabled: bool) -> None:
        self._store = store
        self._path = path
        self._enabled = enabled
        self._unwritten: list[str] = []

    def add(self, line: Mapping[str, Json]) -> None:
        if self._enabled:
            self._unwritten.append(json.dumps(_finite(line)) + "\n")
            self.flush()

    def flush(self) -> None:
        """Training goes on where this fails."""
        if not self._unwritten:
            return
        try:
            self._store.append(self._path, "".join(self._unwritten))
            self._unwritten = []
        except OSError as error:
            logging.getLogger(__name__).warning("%s was not written: %s", self._store.path(self._path), error)


class EventLog:
    """run.jsonl: one event a line, with attempt and time. Best effort: a full disk must not end training."""

    def __init__(self, store: Store, *, enabled: bool = True) -> None:
        self._lines = _Lines(store, EVENTS_LOG, enabled=enabled)
        self.attempt = 0

    def write(self, event: str, **fields: Json) -> None:
        self._lines.add({"time": time.time(), "attempt": self.attempt, "event": event, **fields})


class MetricsLog:
    """metrics.jsonl: one record a log step or epoch; `count` is the length of the folded history."""

    def __init__(self, store: Store, *, enabled: bool = True) -> None:
        self._lines = _Lines(store, METRICS_LOG, enabled=enabled)
        self.attempt = 0
        self.count = 0

    def start(self, attempt: int, parent_attempt: int | None, keep: int, inherited: Iterable[Json] = ()) -> None:
        """Says where this attempt's history goes on from: the first `keep` records of the parent attempt's."""
        self.attempt, self.count = attempt, keep
        self._lines.add({"attempt": attempt, "kind": "attempt", "parent_attempt": parent_attempt, "keep": keep})
        for record in inherited:
            self.write(**record)

    def write(self, **record: Json) -> None:
        """Adds a record to the history."""
        self._lines.add({"attempt": self.attempt, "record": self.count, **record})
        self.count += 1

    def flush(self) -> None:
        """Before a save, whose checkpoint counts on the records so far."""
        self._lines.flush()


def read_metrics(store: Store) -> list[dict[str, Json]]:
    """The run's metrics as if it had never been interrupted: folded along the chain of resumes, oldest first."""
    return fold_metrics(
        store.read(METRICS_LOG).decode(errors="replace").splitlines() if store.exists(METRICS_LOG) else []
    )


def fold_metrics(lines: Iterable[str], attempt: int | None = None) -> list[dict[str, Json]]:
    """History of an attempt (the newest by default) = the kept part of its parent's + its own records.

    Lines that a kill has torn, and those of attempts outside of the chain, are left out. A record counts once: a disk
    that was full may have taken a part of what was then written again.
    """
    starts: dict[int, Json] = {}
    own: dict[int, dict[int, dict[str, Json]]] = {}
    for line in lines:
        record = _parse(line)
        if record is None:
            continue
        if record.get("kind") == "attempt":
            starts[record["attempt"]] = record
        else:
            own.setdefault(record["attempt"], {})[record["record"]] = record
    wanted = attempt if attempt is not None else max(starts, default=0)
    chain: list[tuple[int, int]] = []
    while wanted in starts:
        chain.append((wanted, starts[wanted]["keep"]))
        wanted = starts[wanted]["parent_attempt"]
    history: list[dict[str, Json]] = []
    for number, keep in reversed(chain):
        history = [record for record in history if record["record"] < keep] + list(own.get(number, {}).values())
    return [{key: value for key, value in record.items() if key not in ("attempt", "record")} for record in history]


def metric_label(name: str) -> str:
    """`val_smape` -> `Val SMAPE`, as people write it."""
    words = [
        word.upper() if word.lower() in ("smape", "mape", "mae", "mse", "rmse") else word.title()
        for word in _words(name)
    ]
    return " ".join(words)


def metric_text(name: str, value: float) -> str:
    """A value with its unit: percentages for SMAPE and its kin, significant digits for the rest."""
    if any(word in name.lower() for word in _PERCENT):
        return f"{value:.2f}%"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _words(name: str) -> list[str]:
    return name.replace("-", "_").split("_")


def _finite(value: Json) -> Json:
    """NaN and infinities as strings: JSON has none."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: str) -> dict[str, Json] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("attempt"), int) else None
