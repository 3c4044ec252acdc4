"""What one attempt spends its time on, measured while it lives: its part of the run's account of wall-clock time.

    phases -> buckets -> attempts/pulse-000007.json (replaced each second)  -> `time` event of run.jsonl (at its end)
                              killed: the next attempt makes the event of what the pulse says

Invariant: from the process's start on each moment is in exactly one bucket, and no clock that somebody can set has a
part in it. It decides nothing, and what it cannot write costs the account its last second, never the training. How
the attempts of a run add up is `goodput`'s business.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from dist_train import phases
from dist_train.checkpoint.manifest import ATTEMPTS, EVENTS_LOG
from dist_train.checkpoint.store import Store
from dist_train.console import EventLog
from dist_train.goodput import MEASURED, MICRO, RunTime, fold_time, is_readable, to_micro, to_seconds
from dist_train.history import parse_line
from dist_train.phases import Phase, Point

logger = logging.getLogger(__name__)
Json = Any
PULSE = "pulse-"
BUCKET_OF = {
    Phase.START: "start_up",
    Phase.RENDEZVOUS: "start_up",
    Phase.OUTSIDE: "start_up",
    Phase.LOAD: "restore",
    Phase.DATA: "data_wait",
    Phase.STEP: "productive",
    Phase.EVALUATION: "productive",
    Phase.CAPTURE: "save_stall",
    Phase.SAVE_WAIT: "save_stall",
    Phase.OTHER: "other",
    Phase.END: "other",
}
_MOST_MARKS = 3
"""Saves whose end is not known yet: one is being written, one may have been committed and not told."""


class TimeLedger:
    """The account of one attempt; only the main rank keeps one. `enter`, `open` and `close` are called in this order.

    Args:
        is_lost: whether a newer attempt owns the directory: it has told of this one, which writes nothing more.
        clock: nanoseconds, monotonic.
        wall: seconds since 1970; read once, to place the attempt among the others.
        age: seconds since this process was made.
        boot: which boot of which machine this is, and the seconds since then.
    """

    _process_is_counted = False
    """Whether the time since the process's start has gone into some attempt's account."""

    def __init__(
        self,
        store: Store,
        events: EventLog,
        *,
        is_lost: Callable[[], bool] = lambda: False,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], float] = time.time,
        age: Callable[[], float] | None = None,
        boot: Callable[[], tuple[str, float]] | None = None,
    ) -> None:
        self._store = store
        self._events = events
        self._is_lost = is_lost
        self._clock = clock
        self._wall = wall
        self._age = age or process_age
        self._boot = boot or boot_clock
        self._made = self._since = self._began = clock()
        self._phase = Phase.START
        self._spent = dict.fromkeys(MEASURED, 0)
        self._bucket_of = {**BUCKET_OF, Phase.OTHER: "start_up"}  # until the first batch is asked for
        self._turns = 0
        self._attempt = 0
        self._record: dict[str, Json] = {}
        self._marks: list[dict[str, Json]] = []
        self._committed_step = -1
        self._first_step: float | None = None
        self._stops: list[Callable[[], None]] = []

    # An attempt's life

    def enter(self) -> None:
        """From here on phases are listened to. Counts from the process's start, whose first run this is; a further
        one, and one in a notebook, whose process has served other purposes for hours, counts from where it was made.
        """
        counts_process = not TimeLedger._process_is_counted and not is_interactive()
        TimeLedger._process_is_counted = True
        self._since = self._began = self._made - (round(self._age() * 1e9) if counts_process else 0)
        self._phase = phases.current()
        lived = (self._clock() - self._began) / 1e9
        boot, uptime = self._boot()
        self._record = {"began": round(self._wall() - lived, 6), "boot": boot, "uptime": round(uptime - lived, 6)}
        self._stops = [phases.listen(self._hear), phases.on_reach(self._notice_first_step)]

    def open(self, attempt: int, resumed: dict[str, Json]) -> None:
        """The run has restored its state; what dead attempts left behind is closed in their name.

        Args:
            resumed: `attempt` and `global_step` of the checkpoint (None and 0 for a fresh start; an attempt of another
                directory is None, too), and `branch`, whether it starts a branch.
        """
        self._attempt = attempt
        self._record["resumed"] = resumed
        self._committed_step = -1 if resumed["attempt"] is None else resumed["global_step"]
        self._beat_if_held()
        for number, record in read_pulses(self._store).items():
            if number < attempt:
                self._close(number, record)

    def beat(self, attempt: int) -> None:
        """A sign of life, of an attempt that holds the directory; in any thread."""
        body = json.dumps({"attempt": attempt, **self._told()})
        with contextlib.suppress(OSError):  # a full disk costs the account seconds, not the run
            self._store.replace(_pulse(attempt), body.encode(), durable=False)

    def close(self, attempt: int) -> None:
        """The attempt has ended; 0 has never begun."""
        for stop in self._stops:
            stop()
        self._stops = []
        if attempt and self._record and not self._is_lost():
            own = {"event": "time", "of_attempt": attempt, **self._told()}
            self._close(attempt, {**own, "run": self._sum_up(own)})
        self._record = {}

    # Within it

    def committed(self, global_step: int) -> dict[str, float] | None:
        """The checkpoint of this step is durable; what was spent when its state was taken."""
        while self._marks:
            mark = self._marks.pop(0)
            if mark["global_step"] == global_step:
                self._committed_step = global_step
                buckets: dict[str, float] = mark["buckets"]
                return buckets
        return None

    # Inside

    def _hear(self, before: Phase, now: Phase) -> None:
        """On the main thread, some times a step."""
        at = self._clock()
        self._turns += 1
        self._spent[self._bucket_of[before]] += at - self._since
        self._since, self._phase = at, now
        self._turns += 1
        if now is Phase.DATA or now is Phase.STEP:
            self._bucket_of = BUCKET_OF
        elif now is Phase.CAPTURE:
            mark = {"global_step": phases.global_step(), "buckets": self._told_buckets()}
            self._marks = [*self._marks, mark][-_MOST_MARKS:]
        if before is Phase.CAPTURE:
            self._beat_if_held()  # a kill after the commit and before the next beat must not hide where it was

    def _beat_if_held(self) -> None:
        if self._attempt and not self._is_lost():
            self.beat(self._attempt)

    def _notice_first_step(self, point: Point) -> None:
        if self._first_step is None and point is Point.STEP_DONE:
            self._first_step = round((self._clock() - self._began) / 1e9, 6)

    def _told(self) -> dict[str, Json]:
        return {
            **self._record,
            "buckets": self._told_buckets(),
            "global_step": phases.global_step(),
            "committed_step": self._committed_step,
            "first_step": self._first_step,
            "marks": list(self._marks),
        }

    def _told_buckets(self) -> dict[str, float]:
        """As of now, in seconds. Read again where the main thread has written meanwhile: no lock that a fork could
        leave locked, and nothing to wait for in a step.
        """
        while True:
            turns, spent, since, phase = self._turns, dict(self._spent), self._since, self._phase
            if turns == self._turns and not turns % 2:
                break
        spent[self._bucket_of[phase]] += self._clock() - since
        return {name: round(count / 1e9, 6) for name, count in spent.items()}

    def _sum_up(self, own: dict[str, Json]) -> Json:
        """The run so far, this attempt's part with it; None, and a warning, where the records do not add up."""
        try:
            return _summary(fold_time([*read_events(self._store), own]))
        except Exception:  # an account that cannot be drawn up is no reason for an attempt to fail
            logger.warning(
                "Where the run's time went could not be summed up from %s. Training is not affected, and what is saved "
                "is whole. `dist-train report` needs that file: look there for lines that are damaged.",
                self._store.shown(EVENTS_LOG),
                exc_info=True,
            )
            return None

    def _close(self, attempt: int, record: dict[str, Json]) -> None:
        """Into run.jsonl; the pulse goes only when that was written."""
        ended = record["began"] + sum(to_micro(record["buckets"]).values()) / MICRO
        fields = {key: value for key, value in record.items() if key not in ("event", "attempt", "of_attempt")}
        self._events.write("time", of_attempt=attempt, **fields, ended=round(ended, 6))
        if self._events.is_written:
            with contextlib.suppress(OSError):
                self._store.unlink(_pulse(attempt))


def read_pulses(store: Store) -> dict[int, dict[str, Json]]:
    """By attempt, what those have told that are not closed: they live, or were killed."""
    pulses: dict[int, dict[str, Json]] = {}
    for name in store.list(ATTEMPTS):
        if name.startswith(PULSE) and name.endswith(".json"):
            with contextlib.suppress(OSError):
                record = parse_line(store.read(f"{ATTEMPTS}/{name}").decode(errors="replace"))
                if record is not None and is_readable(record):
                    pulses[record["attempt"]] = record
    return pulses


def read_events(store: Store) -> list[dict[str, Json]]:
    """The lines of run.jsonl, without those that a kill has torn and those that `is_readable` refuses."""
    if not store.exists(EVENTS_LOG):
        return []
    lines = store.read(EVENTS_LOG).decode(errors="replace").splitlines()
    return [event for line in lines if (event := parse_line(line)) is not None and is_readable(event)]


def read_time(store: Store) -> RunTime | None:
    """The run's time so far; None where no attempt has left a record."""
    pulses = read_pulses(store)  # before the events: an attempt that ends meanwhile is then found in both
    return fold_time(read_events(store), pulses.values())


def process_age() -> float:
    """Seconds since this process was made; a worker of a fork server was made when it was forked."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if age >= 0:
            return age
    return max(time.time() - float(psutil.Process().create_time()), 0.0)


def boot_clock() -> tuple[str, float]:
    """Which boot of which machine this is, and the seconds since then; "" where nobody can tell."""
    with contextlib.suppress(OSError, AttributeError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)
    return "", time.monotonic()


def is_interactive() -> bool:
    """A notebook or a Python prompt."""
    return hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__")


def _pulse(attempt: int) -> str:
    return f"{ATTEMPTS}/{PULSE}{attempt:06d}.json"


def _summary(run: RunTime | None) -> Json:
    """The run so far."""
    if run is None:
        return None
    times = {"began": run.began / MICRO, "ended": run.ended / MICRO}
    return {**times, "goodput": round(run.goodput, 6), "buckets": to_seconds(run.buckets)}
