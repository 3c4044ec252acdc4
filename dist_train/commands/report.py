"""`report`: where the wall-clock time of a run went, why it was restarted and what that cost.

Invariant: reads only, a run in progress too (as of its last sign of life), and needs no torch. How the records add up
is `goodput`'s business, their text that of `report_listing`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dist_train.checkpoint.ownership import newest_attempt, read_owner
from dist_train.checkpoint.selection import open_run
from dist_train.checkpoint.store import Store
from dist_train.commands.command import AddCommand, print_json, print_lines, refuse
from dist_train.commands.report_listing import attempt_lines, report_lines
from dist_train.errors import ExitCode
from dist_train.goodput import MICRO, AttemptTime, RunTime, fold_time, to_seconds
from dist_train.time_ledger import read_events, read_pulses

Json = Any
Events = Sequence[Mapping[str, Json]]


def add_commands(add: AddCommand) -> None:
    report = add("report", _report, "Show where a run's wall-clock time went, over all its attempts.")
    report.add_argument("--attempts", action="store_true", help="besides, one line an attempt")


def _report(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    pulses = read_pulses(store)  # before the events: an attempt that ends meanwhile is then found in both
    events = read_events(store)
    run = fold_time(events, pulses.values())
    if run is None:
        return refuse(
            f"{args.run_dir} holds no record of where its time went: no attempt has begun there yet, or all were made "
            f"by a version of dist_train that kept none, or run.jsonl was left behind when the run was copied. The "
            f"next attempt keeps one; what is saved is whole and does not depend on it (`dist-train show "
            f"{args.run_dir}`)."
        )
    facts = describe(store, events, run)
    if args.json:
        return print_json(facts)
    print_lines(report_lines(facts))
    print_lines(["", *attempt_lines(facts)] if args.attempts else [])
    return ExitCode.OK


def describe(store: Store, events: Events, run: RunTime) -> dict[str, Json]:
    """All that the report says, as plain values; times in seconds."""
    rows = [_attempt(one, _end_of(store, events, one)) for one in run.attempts]
    total = (run.ended - run.began) / MICRO
    buckets = to_seconds(run.buckets)
    return {
        "run_dir": store.given,
        "status": rows[-1]["end"],
        "began": run.began / MICRO,
        "ended": run.ended / MICRO,
        "seconds": total,
        "goodput": run.goodput,
        "buckets": buckets,
        "shares": {name: seconds / total if total else 0.0 for name, seconds in buckets.items()},
        "global_step": rows[-1]["global_step"],
        "lost_steps": sum(row["lost_steps"] for row in rows),
        "unsaved_steps": _unsaved(events, rows[-1]),
        "rollbacks": sum(row["end"] == "rolled_back" for row in rows),
        "restarts": [_restart(before, after) for before, after in pairwise(rows)],
        "saves": _saves(events, buckets["save_stall"]),
        "attempts": rows,
        "attempts_without_record": run.untold,
        "overlap_seconds": run.overlap / MICRO,
    }


def _attempt(one: AttemptTime, end: dict[str, Json]) -> dict[str, Json]:
    return {
        "attempt": one.attempt,
        "began": one.began / MICRO,
        "ended": one.ended / MICRO,
        "buckets": to_seconds(one.buckets),
        "resumed_step": one.resumed_step,
        "global_step": one.global_step,
        "lost_steps": one.lost_steps,
        "seconds_to_first_step": None if one.first_step is None else one.first_step / MICRO,
        **end,
    }


def _end_of(store: Store, events: Events, one: AttemptTime) -> dict[str, str]:
    """`end`: a StopReason, `hung`, `lost_peers` (another rank was the cause), `running` or, where there was no time for
    a word, `killed`; and its `error`.
    """
    own = [event for event in events if event["attempt"] == one.attempt]
    stopped = [event for event in own if event.get("event") == "stopped"]
    hung = [event for event in own if event.get("event") == "hung"]
    if hung and (not stopped or stopped[-1].get("reason") == "error"):
        return {"end": "hung", "error": _where(hung[-1])}
    if stopped:
        end = "lost_peers" if stopped[-1].get("lost_peers") else str(stopped[-1].get("reason"))
        return {"end": end, "error": str(stopped[-1].get("error") or "")}
    owner = read_owner(store) if one.is_open and one.attempt == newest_attempt(store) else None
    lives = owner is not None and owner.attempt == one.attempt and not owner.is_known_to_be_gone()
    return {"end": "running" if lives else "killed", "error": ""}


def _where(hung: Mapping[str, Json]) -> str:
    """`rank 1 in step, train.py:40`."""
    parts = [f"rank {hung['rank']}" if "rank" in hung else "", f"in {hung['section']}" if "section" in hung else ""]
    return ", ".join(filter(None, [" ".join(filter(None, parts)), str(hung.get("line") or "")]))


def _restart(before: Mapping[str, Json], after: Mapping[str, Json]) -> dict[str, Json]:
    """Why `before` had to be followed by `after`, and what that cost."""
    first = after["seconds_to_first_step"]
    return {
        "attempt": after["attempt"],
        "cause": before["end"],
        "error": before["error"],
        "at_step": before["global_step"],
        "lost_steps": before["lost_steps"],
        "lost_seconds": before["buckets"]["lost"],
        "down_seconds": after["buckets"]["down"],
        "seconds_to_first_step": None if first is None else after["buckets"]["down"] + first,
    }


def _unsaved(events: Events, last: Mapping[str, Json]) -> int:
    """Steps of the newest attempt that no checkpoint holds, as far as is known: another start would do them again."""
    own = [one for one in events if one.get("event") == "committed" and one["attempt"] == last["attempt"]]
    newest = own[-1]["global_step"] if own else last["resumed_step"] or 0
    return max(int(last["global_step"]) - int(newest), 0)


def _saves(events: Events, stall: float) -> dict[str, Json]:
    saved = [event for event in events if event.get("event") == "committed"]
    stalls = [float(event.get("stall_seconds", 0)) for event in saved]
    return {
        "committed": len(saved),
        "failed": sum(event.get("event") == "failed" for event in events),
        "stall_seconds": stall,
        "stall_seconds_each": sorted(stalls),
        "seconds_until_durable_each": sorted(
            stall + float(event.get("seconds", 0)) for stall, event in zip(stalls, saved, strict=True)
        ),
        "bytes": sum(int(event.get("bytes", 0)) for event in saved),
    }
