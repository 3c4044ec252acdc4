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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from dist_train import phases
from dist_train.checkpoint.manifest import EVENTS_LOG, METRICS_LOG
from dist_train.checkpoint.store import Store

Json = Any
METER_SECONDS = 0.1
PLAIN_METER_SECONDS = 10.0
LONG_WORK_SECONDS = 3.0
"""Work on bytes that took longer is worth a line that stays."""
"""Between lines where no terminal overwrites them: work that is over sooner says nothing."""
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


class ByteMeter:
    """How far long work on bytes is: a live line with speed and time left on a terminal, a plain one now and then
    elsewhere.

    Args:
        total: bytes in all; 0 where nobody knows.
        enabled: whether to say anything; only the main rank should.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        *,
        name: str = "",
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self.name = name
        """What is being worked on, shown before the numbers."""
        self._total = total
        self._console = Console(enabled=enabled, stream=stream or sys.stderr)
        self._clock = clock
        self._started = clock()
        self._shown = self._started

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    def add(self, count: int) -> None:
        """More bytes are done."""
        phases.beat()
        self.done += count
        now = self._clock()
        if now - self._shown >= (METER_SECONDS if self._console.is_live else PLAIN_METER_SECONDS):
            self._shown = now
            tell = self._console.show if self._console.is_live else self._console.say
            tell(self._line(now - self._started))

    def pause(self) -> None:
        """Takes the live line away, so that something else may be printed."""
        self._console.end_live()

    def _line(self, seconds: float) -> str:
        speed = self.done / seconds
        of_total, left = bytes_text(self.done), ""
        if self._total:
            share = min(self.done / self._total, 1.0)
            of_total = f"{part_text(self.done, self._total)} ({share:.0%})"
            left = f", {seconds_text((self._total - self.done) / speed)} left" if 0 < self.done < self._total else ""
        name = f"{self.name}: " if self.name else ""
        return f"{name}{of_total}, {bytes_text(speed)}/s{left}"


def tell_long_work(what: str, meter: ByteMeter) -> None:
    """`Verified step-00001200: 12.4 GB in 6.2 s (2.0 GB/s)`, on the main rank, when it took long."""
    meter.pause()
    if (seconds := meter.seconds) >= LONG_WORK_SECONDS:
        speed = bytes_text(meter.done / seconds)
        logging.getLogger(__name__).info("%s: %s in %.1f s (%s/s)", what, bytes_text(meter.done), seconds, speed)


class _Lines:
    """Appends to a file. Lines that could not be written (a full disk) are kept and written with the next ones."""

    def __init__(self, store: Store, path: str, *, enabled: bool) -> None:
        self._store = store
        self._path = path
        self._enabled = enabled
        self._unwritten: list[str] = []

    def add(self, line: Mapping[str, Json]) -> None:
        if self._enabled:
            self._unwritten.append(json.dumps(finite(line)) + "\n")
            self.flush()

    @property
    def is_written(self) -> bool:
        """Whether nothing waits for a disk that has room again."""
        return not self._unwritten

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

    @property
    def is_written(self) -> bool:
        """Whether every event so far is in the file."""
        return self._lines.is_written


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


def part_text(done: float, total: float) -> str:
    """`3.1 of 12.4 GB`; both with their units where these differ."""
    part, whole = bytes_text(done), bytes_text(total)
    number, unit = part.split(" ")
    return f"{number} of {whole}" if whole.endswith(f" {unit}") else f"{part} of {whole}"


def seconds_text(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _words(name: str) -> list[str]:
    return name.replace("-", "_").split("_")


def finite(value: Json) -> Json:
    """NaN and infinities as strings: JSON has none."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
