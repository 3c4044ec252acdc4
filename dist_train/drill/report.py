"""What a drill says when it is over: the table of faults, the cost of saves and restarts, the verdict; and as facts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_train.drill.faults import Fired
from dist_train.drill.records import Life, Records, epochs_ended, last_step, shown_names
from dist_train.drill.rehearse import Order, Outcome, Rehearsed
from dist_train.drill.scenario import NAMES
from dist_train.drill.uses import LINES_TO_ADD

Json = Any
_MOST_DEVIATIONS = 3
_MOST_CHANGED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """What a fault cost."""

    fired: Fired
    run: str
    """The run that it met, by its name in the records; empty where it came before any had begun."""
    back_at: int | None
    """The step that the next life of this run began at; None where training went on, or never came back."""
    seconds: float | None
    """From the fault to the next life's first step."""

    @property
    def lost(self) -> int:
        """Steps that were trained again."""
        return 0 if self.back_at is None else max(self.fired.global_step - self.back_at, 0)


def restarts_of(fired: Sequence[Fired], records: Records) -> list[Restart]:
    """Each fault with the life of the same run that came after it: a script may have several runs, one by one."""
    found = []
    for one in fired:
        run = _run_at(one.at, records)
        lives = records[run] if run else [life for of_run in records.values() for life in of_run]
        after = [life for life in lives if life.begin and life.begin["at"] > one.at and life.steps]
        if one.kind == "fail_io" or not after:
            found.append(Restart(fired=one, run=run, back_at=None, seconds=None))
        else:
            life = min(after, key=lambda life: float(life.begin["at"]))
            first = min(line["at"] for line in life.steps.values())
            found.append(Restart(fired=one, run=run, back_at=life.began_at, seconds=first - one.at))
    return found


def _run_at(at: float, records: Records) -> str:
    """The run that wrote the last record before a moment."""
    last = {name: max((time for life in lives for time in _times(life) if time <= at), default=0.0)
            for name, lives in records.items()}  # fmt: skip
    name = max(last, key=lambda name: last[name], default="")
    return name if name and last[name] else ""


def _times(life: Life) -> Iterator[float]:
    if life.begin:
        yield life.begin["at"]
    yield from (line["at"] for line in life.steps.values())


def lines_of(order: Order, outcome: Outcome) -> Iterator[str]:
    """For a terminal."""
    name = " ".join(order.script)
    if outcome.verdict in ("cannot", "unsafe"):
        yield from _lines_of_cannot(name, outcome)
        yield from _lines_of_files(outcome)
        return
    if outcome.fired and outcome.faulted:
        yield ""
        records = outcome.faulted.records
        yield from _table(restarts_of(outcome.fired, records), shown_names(records))
    if outcome.plain:
        yield ""
        yield from _costs(outcome)
    yield ""
    yield from _lines_of_pass(name, outcome) if outcome.verdict == "pass" else _lines_of_difference(name, outcome)
    yield from _lines_of_files(outcome)


def _lines_of_cannot(name: str, outcome: Outcome) -> Iterator[str]:
    if outcome.verdict == "unsafe":
        yield f"CANNOT BE DRILLED SAFELY  {name}"
        yield from _wrapped(f"{outcome.reason[:1].upper()}{outcome.reason[1:]}")
        return
    unused = outcome.reason.endswith(("does not use dist_train", "never entered a Run"))
    reason = f"it {outcome.reason}" if outcome.reason.startswith("never") else outcome.reason
    yield f"CANNOT BE DRILLED  {name}: {reason}"
    if unused:
        yield "There is nothing to resume. These are the lines that a plain loop lacks (or call dt.Trainer(...).fit()):"
        yield ""
        yield from LINES_TO_ADD.splitlines()


def _table(restarts: Sequence[Restart], runs: Mapping[str, str]) -> Iterator[str]:
    """With a column for the run, where the script has several."""
    rows: list[tuple[str, ...]] = [
        ("fault", "run", "step", "while", "rank", "went on from", "trained again", "first step after")
    ]
    for one in restarts:
        fired = one.fired
        moment = "a save" if fired.phase.startswith("write ") else fired.phase.replace("_", " ")
        goes_on = "training went on" if fired.kind == "fail_io" else "the end"
        rows.append(
            (
                NAMES.get(fired.kind, fired.kind.replace("_", " ")),
                runs.get(one.run, "-"),
                str(fired.global_step),
                moment,
                str(fired.rank),
                goes_on if one.back_at is None else f"step {one.back_at}",
                "-" if one.back_at is None else _count(one.lost, "step"),
                "-" if one.seconds is None else f"{one.seconds:.1f} s",
            )
        )
    if len(runs) < 2:
        rows = [row[:1] + row[2:] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def _costs(outcome: Outcome) -> Iterator[str]:
    assert outcome.plain is not None
    saves = [event for event in outcome.plain.events() if event["event"] == "committed"]
    if saves:
        stalls = [event["stall_seconds"] for event in saves]
        share = sum(stalls) / max(_training_seconds(outcome.plain), 1e-9)
        durable = _time(statistics.median(event["seconds"] for event in saves))
        yield (
            f"  a save        training waits {_time(statistics.median(stalls))} (median of {len(saves)}; {share:.1%} "
            f"of the time, saving this often), durable {durable} later"
        )
    restarts = restarts_of(outcome.fired, outcome.faulted.records) if outcome.faulted else []
    times = [one.seconds for one in restarts if one.seconds is not None]
    if times:
        lost = sum(one.lost for one in restarts)
        yield (
            f"  a restart     {_time(statistics.median(times))} from the fault to the next step (median of "
            f"{len(times)}), {_count(lost, 'step')} trained again in all"
        )


def _lines_of_pass(name: str, outcome: Outcome) -> Iterator[str]:
    assert outcome.plain is not None
    assert outcome.faulted is not None
    assert outcome.plan is not None
    steps = last_step(outcome.plain.records)
    yield f"PASS  {name} resumes exactly."
    yield (
        f"      After {_count(len(outcome.fired), 'fault')} in {_count(len(outcome.faulted.ended), 'life', 'lives')}, "
        f"the weights and samples of all {_count(steps, 'step')}, {_count(outcome.compared, 'tensor')} of the last"
    )
    yield "      checkpoint and the metrics equal those of the uninterrupted run, bit for bit."
    for fault in outcome.plan.missed():
        yield f"      This fault found no moment to come: {fault.describe()}. Give more --steps."
    if outcome.unseeded:
        names = " and ".join(outcome.unseeded)
        yield f"      Not seeded, though nothing draws from there so far: {names} (dt.seed_everything seeds all)."
    if not epochs_ended(outcome.plain.records):
        yield f"      No second epoch began within {_count(steps, 'step')}: give more --steps to drill its start, too."


def _lines_of_difference(name: str, outcome: Outcome) -> Iterator[str]:
    if outcome.diagnosis is None:
        yield f"FAIL  {name} does not come through."
        yield from (f"      {line}" for line in outcome.reason.splitlines())
        return
    yield f"FAIL  {name} {'is not deterministic' if outcome.faulted is None else 'does not resume exactly'}."
    yield f"      Cause: {outcome.diagnosis.cause}"
    yield from _wrapped(outcome.diagnosis.sentence)
    yield from _wrapped(f"What to do: {outcome.diagnosis.advice}")
    if outcome.deviations:
        yield "      What differs at the end:"
        yield from (f"        {line}" for line in outcome.deviations[:_MOST_DEVIATIONS])
        if more := len(outcome.deviations) - _MOST_DEVIATIONS:
            yield from [f"        and {more} more"] * (more > 0)


def _lines_of_files(outcome: Outcome) -> Iterator[str]:
    for place in outcome.places:
        shown = os.path.relpath(place) if place.startswith(os.getcwd() + os.sep) else place
        state = "CHANGED, not by a Run" if place in outcome.touched else "untouched"
        yield f"      Run directory {shown}: {state}."
    if outcome.changed:
        names = ", ".join(outcome.changed[:_MOST_CHANGED])
        more = len(outcome.changed) - _MOST_CHANGED
        yield f"      Changed meanwhile below this directory: {names}{f' and {more} more' if more > 0 else ''}."


def facts_of(order: Order, outcome: Outcome, scratch: str | None) -> Json:
    """For programs."""
    records = outcome.faulted.records if outcome.faulted else {}
    saves = [one for one in outcome.plain.events() if one["event"] == "committed"] if outcome.plain else []
    return {
        "script": list(order.script),
        "verdict": outcome.verdict,
        "reason": outcome.reason or None,
        "steps": last_step(outcome.plain.records) if outcome.plain else 0,
        "lives": len(outcome.faulted.ended) if outcome.faulted else 0,
        "faults": [
            {
                **asdict(one.fired),
                "run": one.run,
                "resumed_at": one.back_at,
                "restart_seconds": one.seconds,
                "steps_lost": one.lost,
            }
            for one in restarts_of(outcome.fired, records)
        ],
        "faults_missed": [fault.describe() for fault in outcome.plan.missed()] if outcome.plan else [],
        "cause": outcome.diagnosis.cause if outcome.diagnosis else None,
        "diagnosis": outcome.diagnosis.sentence if outcome.diagnosis else None,
        "advice": outcome.diagnosis.advice if outcome.diagnosis else None,
        "first_difference": asdict(outcome.difference) if outcome.difference else None,
        "differences": list(outcome.deviations),
        "tensors_compared": outcome.compared,
        "save_stall_seconds": [one["stall_seconds"] for one in saves],
        "save_seconds": [one["seconds"] for one in saves],
        "run_directories": list(outcome.places),
        "run_directories_touched": list(outcome.touched),
        "files_changed": list(outcome.changed),
        "scratch": scratch,
    }


def _training_seconds(run: Rehearsed) -> float:
    times = [line["at"] for lives in run.records.values() for life in lives for line in life.steps.values()]
    return max(times) - min(times) if times else 0.0


def _wrapped(text: str, width: int = 108) -> Iterator[str]:
    import textwrap

    # Paths and options stay whole: they are copied from here.
    yield from textwrap.wrap(
        text, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False, break_long_words=False
    )


def _count(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
