"""What `prune` says: which checkpoints stay, shrink or go, why, and what it comes to.

Invariant: every line fits the terminal. Prints nothing, reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.checkpoint.holdings import shortfall_text
from dist_train.checkpoint.manifest import CHECKPOINTS
from dist_train.checkpoint.pruning import Pruning
from dist_train.checkpoint.retention import Decision, Verdict
from dist_train.checkpoint.text import counted, number_text, table, value_text, wrap
from dist_train.console import bytes_text

_ACTIONS = {"keep": "keep", "strip": "weights only", "delete": "delete"}
_DONE = {"strip": "weights only", "delete": "deleted"}


def plan_lines(pruning: Pruning, verdict: Verdict, to_read: Sequence[str], command: str) -> list[str]:
    """All of a dry run; `command` is what does it."""
    lines = [*wrap(f"Policy: {policy_text(pruning)}", "  ", first=""), "", *_decision_table(pruning, verdict), ""]
    given_up = verdict.given_up()
    if not given_up:
        lines += wrap(f"Nothing is to be pruned: {_stay_text(pruning, verdict)}.")
    else:
        lines += wrap(f"{_sum_text(given_up, 'would be deleted', 'would become weights-only')}: {_bytes(verdict)}.")
    lines += [*budget, ""] if (budget := _budget_lines(pruning, verdict)) else []
    if given_up:
        size = sum(one.num_bytes for one in pruning.holdings if one.path in to_read)
        lines += _hints(pruning, verdict)
        reads = (
            f", once {counted(len(to_read), 'checkpoint')} ({bytes_text(size)}) have proved whole" if to_read else ""
        )
        lines += [*wrap(f"Nothing was changed. This does it{reads}:"), "", f"  {command}"]
    else:
        lines += _hints(pruning, verdict)
    return lines


def done_line(decision: Decision, width: int) -> list[str]:
    """One deletion or stripping that happened."""
    name, size = name_of(decision), bytes_text(decision.bytes_freed)
    first = f"{_DONE[decision.action]:12}  {name:{width}}  {size:>8}  "
    return wrap(decision.reason, " " * len(first), first=first)


def summary_lines(pruning: Pruning, verdict: Verdict, done: Sequence[Decision]) -> list[str]:
    """The end of a pruning."""
    if not done:
        lines = wrap(f"Nothing was pruned: {_stay_text(pruning, verdict)}.")
    else:
        freed = sum(one.bytes_freed for one in done)
        left = bytes_text(verdict.bytes_now - freed)
        text = f"{_sum_text(done, 'deleted', 'made weights-only')}: {bytes_text(freed)} freed, {left} stay."
        lines = ["", *wrap(text)]
    return [*lines, *_damage_lines(verdict), *_budget_lines(pruning, verdict)]


def policy_text(pruning: Pruning) -> str:
    """What is kept, as the settings are written."""
    policy = pruning.policy
    names = ("keep_last", "keep_best", "keep_every_epochs", "keep_every_steps", "keep_optimizer", "max_bytes")
    given = [f"{name}={value}" for name in names if (value := getattr(policy, name)) is not None]
    if pruning.monitor and policy.keep_best:
        given[1] += f" ({pruning.monitor}, {'lower' if policy.mode == 'min' else 'higher'} is better)"
    return ", ".join([*given, *(f"without {place} ones" for place in sorted(pruning.unwanted))])


def name_of(decision: Decision) -> str:
    return decision.holding.path.removeprefix(f"{CHECKPOINTS}/")


def _decision_table(pruning: Pruning, verdict: Verdict) -> list[str]:
    """The run's own checkpoints, then those of each folder of abandoned/, then what was set aside."""
    monitor = [pruning.monitor] if pruning.monitor else []
    header = ["checkpoint", "epoch", "size", *monitor, ""]
    ordered = sorted(verdict.decisions, key=_section)
    starts = table([header, *(_row(one, monitor) for one in ordered)], left={0, len(header) - 1})
    width = max(map(len, starts)) + 2
    lines, section = [starts[0]], ""
    for start, decision in zip(starts[1:], ordered, strict=True):
        if _section(decision)[1] != section:
            section = _section(decision)[1]
            lines += ["", f"{section}:"]
        lines += wrap(decision.reason, " " * width, first=f"{start:{width}}")
    return lines


def _section(decision: Decision) -> tuple[int, str]:
    """Where it stands in the table, and under which heading."""
    place = decision.holding.place
    if place == "abandoned":
        return 1, decision.holding.path.rpartition("/")[0]
    return (2, "set aside") if place == "corrupt" else (0, "")


def _row(decision: Decision, monitor: Sequence[str]) -> list[str]:
    manifest = decision.holding.manifest
    return [
        decision.holding.path.rpartition("/")[2],
        value_text(manifest.progress.epochs_completed if manifest else None),
        bytes_text(decision.holding.num_bytes),
        *(number_text(name, manifest.metrics.get(name) if manifest else None) for name in monitor),
        _ACTIONS[decision.action],
    ]


def _sum_text(decisions: Sequence[Decision], deleted: str, stripped: str) -> str:
    counts = {action: sum(one.action == action for one in decisions) for action in ("delete", "strip")}
    if not counts["delete"]:
        return f"{counted(counts['strip'], 'checkpoint')} {stripped}"
    more = f", {counts['strip']} {stripped}" if counts["strip"] else ""
    return f"{counted(counts['delete'], 'checkpoint')} {deleted}{more}"


def _hints(pruning: Pruning, verdict: Verdict) -> list[str]:
    """The options that would free more."""
    kept = {one.holding.place for one in verdict.decisions if one.action == "keep" and not one.holding.pinned}
    options = [f"--{place}" for place in ("abandoned", "corrupt") if place in kept - set(pruning.unwanted)]
    return wrap(f"What is no longer part of the run goes with {' and '.join(options)}.") if options else []


def _bytes(verdict: Verdict) -> str:
    freed = verdict.bytes_now - verdict.bytes_after
    return f"{bytes_text(freed)} freed, {bytes_text(verdict.bytes_after)} stay in the run directory"


def _stay_text(pruning: Pruning, verdict: Verdict) -> str:
    size = bytes_text(verdict.bytes_now)
    return f"{counted(len(verdict.decisions), 'checkpoint')} stay, {size} in the run directory"


def _damage_lines(verdict: Verdict) -> list[str]:
    damaged = [one for one in verdict.decisions if one.holding.problem.startswith("damaged")]
    lines: list[str] = []
    for one in damaged:
        lines += ["", *wrap(f"{name_of(one)} is {one.holding.problem}. It counts for nothing, and was left as it is.")]
    return lines


def _budget_lines(pruning: Pruning, verdict: Verdict) -> list[str]:
    if not verdict.shortfall:
        return []
    return ["", *wrap(shortfall_text(verdict, pruning.policy, pruning.store.given))]
