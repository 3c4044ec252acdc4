"""Where the wall-clock time of a run went, over all its attempts: the records of its log, folded.

    records (one an attempt)  ->  kept segments, cut wherever an attempt begins at an older state  ->  buckets

Invariant: the buckets add up exactly to the time from the first attempt's start to the last one's end; sums are made of
whole microseconds. It reads no file and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Json = Any
Spent = dict[str, int]
"""Microseconds by bucket, of one attempt, from its start to some moment."""

MEASURED = ("start_up", "restore", "data_wait", "productive", "save_stall", "other")
"""What an attempt can tell of itself; `lost` and `down` show only in what came after it."""
BUCKETS = ("productive", "data_wait", "save_stall", "start_up", "restore", "lost", "down", "other")
REDONE = ("productive", "data_wait", "other")
"""What has to be spent again on work that no checkpoint holds; a save's stall, a start or a load is none of it."""
MICRO = 1_000_000
_MOST = 1e18
"""No number of a record is as large."""
_MOST_ATTEMPTS = 1_000_000


@dataclass(slots=True, kw_only=True)
class AttemptTime:
    """One attempt's part; microseconds."""

    attempt: int
    began: int
    """Since 1970, on the run's own line of time: the first attempt's clock, and durations from there."""
    buckets: Spent
    """All of them; `down` is the gap before this attempt, `lost` the work of it that was done again."""
    resumed_step: int | None
    """Global step that it began at; None when it was ended before it had restored anything."""
    global_step: int
    """The last one that is known."""
    lost_steps: int = 0
    first_step: int | None = None
    """From its start to its first update."""
    is_open: bool = False
    """It has not ended, or was killed and nothing has come after it: counted up to its last sign of life."""

    @property
    def ended(self) -> int:
        return self.began + sum(self.buckets.values()) - self.buckets["down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTime:
    """The whole run."""

    attempts: list[AttemptTime]
    overlap: int = 0
    """Microseconds by which clocks contradict each other, beyond what a start-up beside the former attempt explains."""
    untold: list[int] = field(default_factory=list)
    """Attempts below the newest one that have left no record: their time is in `down`, or came before the first."""

    @property
    def began(self) -> int:
        return self.attempts[0].began

    @property
    def ended(self) -> int:
        return self.attempts[-1].ended

    @property
    def buckets(self) -> Spent:
        return {name: sum(one.buckets[name] for one in self.attempts) for name in BUCKETS}

    @property
    def goodput(self) -> float:
        """Productive time that was kept, of all time."""
        spent = self.buckets
        return spent["productive"] / max(sum(spent.values()), 1)


@dataclass(slots=True)
class _Segment:
    """Work in a row that the run's state goes back to, from one moment of an attempt to another."""

    attempt: int
    start: Spent
    stop: Spent
    start_step: int
    stop_step: int


@dataclass(frozen=True, slots=True)
class _Mark:
    """What an attempt had spent when the state was taken that a checkpoint holds."""

    step: int
    spent: Spent


def fold_time(events: Iterable[Mapping[str, Json]], pulses: Iterable[Mapping[str, Json]] = ()) -> RunTime | None:
    """The run's time, from the `time` and `committed` events of run.jsonl and what open attempts have on disk; None
    where no attempt has left a record.
    """
    events = list(events)
    closed = _records(one for one in events if one.get("event") == "time")
    records = {**{key: {**one, "open": True} for key, one in _records(pulses).items() if key not in closed}, **closed}
    if not records:
        return None
    ordered = [records[key] for key in sorted(records)]
    marks = _marks(events, ordered)
    attempts = [_measured(one) for one in ordered]
    _cut_what_was_lost(ordered, attempts, marks)
    overlap = _place(ordered, attempts)
    told = {int(one["attempt"]) for one in ordered}
    started = {int(one["attempt"]) for one in events if one.get("event") in ("started", "resumed")}
    missing = sorted(number for number in started | set(range(1, max(told))) if number not in told)
    return RunTime(attempts=attempts, overlap=overlap, untold=missing)


def is_readable(line: Mapping[str, Json]) -> bool:
    """Whether a record has the types that are reckoned with: any other was damaged or written by hand, and counts as
    one that is not there.
    """
    kind = line.get("event", "time")  # an open attempt's is no event yet
    if kind == "committed":
        sizes = [line.get(name, 0) for name in ("stall_seconds", "seconds", "bytes")]
        return all(map(_is_number, sizes)) and _is_mark({"buckets": {}, **line})
    if kind != "time":
        return isinstance(kind, str) and _is_attempt(line.get("attempt", 0))
    resumed, marks = line.get("resumed"), line.get("marks", [])
    return (
        _is_mark(line)
        and all(_is_attempt(line.get(name, 0)) for name in ("attempt", "of_attempt"))
        and all(_is_number(line.get(name)) for name in ("began", "uptime"))
        and (line.get("first_step") is None or _is_number(line["first_step"]))
        and (resumed is None or _is_place(resumed))
        and isinstance(marks, list)
        and all(isinstance(mark, dict) and _is_mark(mark) for mark in marks)
    )


def _is_number(value: Json) -> bool:
    """Of seconds or bytes; neither NaN nor infinite."""
    return isinstance(value, int | float) and abs(value) < _MOST


def _is_attempt(value: Json) -> bool:
    return isinstance(value, int) and 0 <= value < _MOST_ATTEMPTS


def _is_mark(value: Mapping[str, Json]) -> bool:
    buckets = value.get("buckets")
    is_told = isinstance(buckets, dict) and all(_is_number(buckets.get(name, 0)) for name in MEASURED)
    return is_told and isinstance(value.get("global_step"), int)


def _is_place(value: Json) -> bool:
    """Of a checkpoint that an attempt began at."""
    if not isinstance(value, dict) or not isinstance(value.get("global_step"), int):
        return False
    return "attempt" in value and (value["attempt"] is None or _is_attempt(value["attempt"]))


def _records(lines: Iterable[Mapping[str, Json]]) -> dict[tuple[int, float], dict[str, Json]]:
    """One of each attempt: an old one that was replaced and woke up may have told of itself once more, the longest
    counts.
    """
    found: dict[tuple[int, float], dict[str, Json]] = {}
    for line in lines:
        attempt = int(line.get("of_attempt", line.get("attempt", 0)))  # a dead one's is told by its successor
        key = (attempt, float(line["began"]))
        if key not in found or _elapsed(to_micro(line["buckets"])) > _elapsed(to_micro(found[key]["buckets"])):
            found[key] = {**line, "attempt": attempt}
    return found


def _measured(record: Mapping[str, Json]) -> AttemptTime:
    resumed, first = record.get("resumed"), record.get("first_step")
    return AttemptTime(
        attempt=int(record["attempt"]),
        began=round(record["began"] * MICRO),
        buckets=dict.fromkeys(BUCKETS, 0) | to_micro(record["buckets"]),
        resumed_step=int(resumed["global_step"]) if resumed else None,
        global_step=int(record["global_step"]),
        first_step=None if first is None else round(first * MICRO),
        is_open=bool(record.get("open")),
    )


def _marks(events: list[Mapping[str, Json]], records: list[dict[str, Json]]) -> dict[int, list[_Mark]]:
    """By attempt, oldest first: of commits that were told, and of the last saves before a kill, which may be durable
    all the same.
    """
    marks: dict[int, list[_Mark]] = {}
    told = [one for one in events if one.get("event") == "committed" and "buckets" in one]
    untold = [{"attempt": record["attempt"], **mark} for record in records for mark in record.get("marks", ())]
    for one in [*told, *untold]:
        marks.setdefault(int(one["attempt"]), []).append(_Mark(int(one["global_step"]), to_micro(one["buckets"])))
    for several in marks.values():
        several.sort(key=lambda mark: _elapsed(mark.spent))
    return marks


def _cut_what_was_lost(
    records: list[dict[str, Json]], attempts: list[AttemptTime], marks: dict[int, list[_Mark]]
) -> None:
    """Walks through the run as it went: each beginning at a state cuts off what was done after it."""
    kept: list[_Segment] = []
    by_number = {one.attempt: one for one in attempts}
    for record, own in zip(records, attempts, strict=True):
        if own.resumed_step is None:
            continue
        if not record["resumed"].get("branch"):
            _cut(kept, record["resumed"], by_number, marks)
        elif kept:  # what a branch leaves behind is a person's choice; only what no checkpoint holds is lost
            newest = marks.get(kept[-1].attempt, [])
            point = {"attempt": kept[-1].attempt, "global_step": newest[-1].step if newest else -1}
            _cut(kept, point, by_number, marks)
        stop = to_micro(record["buckets"])
        kept.append(_Segment(own.attempt, dict.fromkeys(MEASURED, 0), stop, own.resumed_step, own.global_step))


def _cut(
    kept: list[_Segment], point: Mapping[str, Json], attempts: dict[int, AttemptTime], marks: dict[int, list[_Mark]]
) -> None:
    """Takes off what was done after the state at `point`: an attempt (None: of another run, or none) and its step."""
    attempt, step = point["attempt"], int(point["global_step"])
    while kept:
        last = kept[-1]
        if attempt is not None and last.attempt < attempt:
            return
        mark = _find_mark(marks.get(last.attempt, []), step, last) if last.attempt == attempt else None
        until = last.start if mark is None else mark.spent
        owner = attempts[last.attempt]
        for name in REDONE:
            again = max(min(last.stop[name] - max(until[name], last.start[name]), owner.buckets[name]), 0)
            owner.buckets[name] -= again
            owner.buckets["lost"] += again
        owner.lost_steps += max(last.stop_step - (last.start_step if mark is None else step), 0)
        if mark is not None:
            last.stop, last.stop_step = mark.spent, step
            return
        kept.pop()


def _find_mark(marks: list[_Mark], step: int, segment: _Segment) -> _Mark | None:
    """Of the newest save of this step within the segment, or what stands for it where the kill came before any word of
    it: the end, if all that is known came before that step.
    """
    inside = [one for one in marks if _elapsed(segment.start) <= _elapsed(one.spent) <= _elapsed(segment.stop)]
    exact = [one for one in inside if one.step == step]
    if exact:
        return exact[-1]
    if step >= segment.stop_step:
        return _Mark(step, segment.stop)
    return next((one for one in reversed(inside) if one.step < step), None)


def _place(records: list[dict[str, Json]], attempts: list[AttemptTime]) -> int:
    """Puts the attempts after each other and fills the gaps with `down`; returns what clocks contradict."""
    overlap = 0
    for (before, after), (former, own) in zip(pairwise(records), pairwise(attempts), strict=True):
        gap = _gap(before, after)
        if gap < 0:  # it was made while the former one ran: what it spent beside it is nobody's start-up
            beside = min(-gap, own.buckets["start_up"])
            own.buckets["start_up"] -= beside
            own.first_step = None if own.first_step is None else max(own.first_step - beside, 0)
            overlap += -gap - beside
        own.buckets["down"] = max(gap, 0)
        own.began = former.ended + own.buckets["down"]
    return overlap


def _gap(before: Mapping[str, Json], after: Mapping[str, Json]) -> int:
    """From the end of one to the start of the other, by the clock since the machine's boot where they share it: nobody
    sets that one.
    """
    clock = "uptime" if before.get("boot") and before.get("boot") == after.get("boot") else "began"
    return round((float(after[clock]) - float(before[clock])) * MICRO) - _elapsed(to_micro(before["buckets"]))


def to_micro(buckets: Mapping[str, float]) -> Spent:
    """Of the buckets that an attempt measures."""
    return {name: round(float(buckets.get(name, 0)) * MICRO) for name in MEASURED}


def to_seconds(spent: Mapping[str, int]) -> dict[str, float]:
    """As JSON has it; `to_micro` gives the same whole numbers again."""
    return {name: count / MICRO for name, count in spent.items()}


def _elapsed(spent: Spent) -> int:
    return sum(spent.values())
