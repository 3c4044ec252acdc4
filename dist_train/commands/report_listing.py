"""The facts of `report` as lines of text that a person enjoys.

Invariant: plain text without colours, numbers aligned. Prints nothing, reads no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from dist_train.checkpoint.text import age_text, counted, labelled, table, terminal_width, wrap
from dist_train.console import bytes_text, seconds_text

Json = Any
Facts = Mapping[str, Json]
_WORDS = {
    "productive": "training that was kept",
    "data_wait": "waiting for batches",
    "save_stall": "training stood still for saves",
    "start_up": "from a process's start to its first batch",
    "restore": "verifying and loading checkpoints",
    "lost": "training that had to be done again",
    "down": "nobody was running",
    "other": "agreeing, logging, leaving",
}
_ENDS = {
    "done": "done",
    "early_stopped": "stopped early",
    "preempted": "preempted",
    "time_limit": "stopped at the time limit",
    "interrupted": "interrupted",
    "diverged": "diverged",
    "rolled_back": "rolled back",
    "error": "ended by an error",
    "hung": "hung",
    "lost_peers": "lost another rank",
    "killed": "killed",
    "running": "running",
}
_MOST_BAR = 24


def report_lines(facts: Facts) -> list[str]:
    """All of `report` but the attempts."""
    return [
        *wrap(_headline(facts)),
        "",
        *_buckets(facts),
        "",
        *labelled(_pairs(facts)),
        *_remarks(facts),
    ]


def attempt_lines(facts: Facts) -> list[str]:
    """One line an attempt."""
    header = ["attempt", "began", "down", "lasted", "first step", "steps", "productive", "lost", "end"]
    rows = [header]
    for one in facts["attempts"]:
        spent, resumed = one["buckets"], one["resumed_step"]
        lasted = one["ended"] - one["began"]
        steps = "-" if resumed is None else f"{resumed} to {one['global_step']}"
        first = one["seconds_to_first_step"]
        rows.append(
            [
                str(one["attempt"]),
                datetime.fromtimestamp(one["began"]).strftime("%m-%d %H:%M:%S"),
                time_text(spent["down"]) if one is not facts["attempts"][0] else "-",
                time_text(lasted),
                "-" if first is None else f"after {time_text(first)}",
                steps,
                f"{spent['productive'] / lasted:.1%}" if lasted else "-",
                _lost_of(one),
                _end_of(one),
            ]
        )
    return table(rows, left={1, 8})


def _end_of(one: Facts) -> str:
    end = str(_ENDS.get(one["end"], one["end"]))
    return f"{end}: {_short(one['error'])}" if one["error"] and one["end"] != "lost_peers" else end


def _lost_of(one: Facts) -> str:
    steps = counted(one["lost_steps"], "step")
    seconds = one["buckets"]["lost"]
    return f"{time_text(seconds)}, {steps}" if one["lost_steps"] or seconds >= 0.005 else "-"


def time_text(seconds: float) -> str:
    """`0.12 s`, `42.1 s`, `3 min 05 s`."""
    if seconds >= 60:
        return seconds_text(seconds)
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def _headline(facts: Facts) -> str:
    number = len(facts["attempts"])
    text = f"Run {facts['run_dir']}: {_ENDS.get(facts['status'], facts['status'])} at step {facts['global_step']}, "
    text += f"{time_text(facts['seconds'])} of wall-clock time in {counted(number, 'attempt')}"
    if facts["status"] == "running":
        text += f", as of its last sign of life {age_text(facts['ended'])}"
    return f"{text}."


def _buckets(facts: Facts) -> list[str]:
    most = max(facts["shares"].values(), default=0.0) or 1.0
    rows = []
    for name, seconds in facts["buckets"].items():
        share = facts["shares"][name]
        bar = "#" * max(round(share / most * _MOST_BAR), 1 if share >= 0.001 else 0)
        rows.append([name.replace("_", " ").replace("start up", "start-up"), time_text(seconds), f"{share:.1%}", bar])
    rows.append(["total", time_text(facts["seconds"]), "100.0%" if facts["seconds"] else "-", ""])
    lines = table([[*row[:3], row[3].ljust(_MOST_BAR)] for row in rows], left={0, 3})
    if terminal_width() < 96:
        return [f"  {line}" for line in lines]
    width = max(map(len, lines))
    words = [_WORDS[name] for name in facts["buckets"]]
    told = [f"  {line:{width}}  {word}" for line, word in zip(lines, words, strict=False)]
    return [*told, f"  {lines[-1]}"]


def _pairs(facts: Facts) -> dict[str, str]:
    return {
        "goodput": f"{facts['goodput']:.1%} of the wall-clock time was training that was kept",
        "restarts": _restarts(facts["restarts"]),
        "back at work": _back_at_work(facts["restarts"]),
        "lost": _lost(facts),
        "saves": _saves(facts["saves"], facts["seconds"]),
    }


def _restarts(restarts: Sequence[Facts]) -> str:
    if not restarts:
        return "none"
    causes = Counter(_ENDS.get(one["cause"], one["cause"]) for one in restarts)
    text = f"{len(restarts)}: " + ", ".join(f"{number} {cause}" for cause, number in causes.most_common())
    if len(causes) == 1:
        (cause,) = causes
        text = f"{len(restarts)}, {'each time ' if len(restarts) > 1 else ''}{cause}"
    errors = Counter(_short(one["error"]) for one in restarts if one["error"] and one["cause"] != "lost_peers")
    told = "; ".join(
        f"{error}" + (f" ({number} times)" if number > 1 else "") for error, number in errors.most_common(3)
    )
    return text + (f" ({told})" if told else "")


def _back_at_work(restarts: Sequence[Facts]) -> str:
    times = sorted(one["seconds_to_first_step"] for one in restarts if one["seconds_to_first_step"] is not None)
    if not times:
        return ""
    if len(times) == 1:
        return f"{time_text(times[0])} from the last sign of life to the first new step"
    spread = f"{time_text(times[0])} to {time_text(times[-1])}"
    return f"{time_text(median(times))} from the last sign of life to the first new step (median; {spread})"


def _lost(facts: Facts) -> str:
    seconds, steps = facts["buckets"]["lost"], facts["lost_steps"]
    unsaved = facts["unsaved_steps"]
    later = f"{counted(unsaved, 'step')} are in no checkpoint: another start would do them again" if unsaved else ""
    if not steps:
        return later or "nothing had to be done again"
    often = len(facts["restarts"])
    each = f", {steps / often:.1f} steps a time" if often > 1 else ""
    rolled = f", {counted(facts['rollbacks'], 'roll-back')} among them" if facts["rollbacks"] else ""
    again = f"{counted(steps, 'step')} had to be done again ({time_text(seconds)}{each}{rolled})"
    return f"{again}; {later}" if later else again


def _saves(saves: Facts, total: float) -> str:
    number, failed = saves["committed"], saves["failed"]
    text = f"{number:,} durable" + (f", {failed} failed" if failed else "")
    if not number:
        return text
    stalls, until = saves["stall_seconds_each"], saves["seconds_until_durable_each"]
    share = saves["stall_seconds"] / total if total else 0.0
    text += f" ({bytes_text(saves['bytes'])}): training stood still for {time_text(saves['stall_seconds'])} in all "
    text += f"({share:.2%}), {_milliseconds(median(stalls))} a save (median; at most {_milliseconds(stalls[-1])}), "
    return text + f"durable {time_text(median(until))} after its beginning"


def _milliseconds(seconds: float) -> str:
    return (
        f"{seconds * 1e3:.0f} ms"
        if 0.001 <= seconds < 1
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else time_text(seconds)
    )


def _remarks(facts: Facts) -> list[str]:
    """What a reader must know to take the numbers for what they are."""
    remarks = []
    if untold := facts["attempts_without_record"]:
        which = ", ".join(map(str, untold[:6])) + (" ..." if len(untold) > 6 else "")
        remarks.append(
            f"{counted(len(untold), 'attempt')} left no record ({which}): ended before the first sign of life, made by "
            f"a version that kept none, or in another directory. Their time counts as down, or came before the first."
        )
    if facts["overlap_seconds"] >= 1:
        remarks.append(
            f"The clocks contradict each other by {time_text(facts['overlap_seconds'])}: an attempt began before the "
            f"former one had ended. The total counts what each attempt has measured, one after the other."
        )
    return [line for text in remarks for line in ["", *wrap(text)]]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
