"""What became of one attempt: from exit codes and the workers' own notes to causes, on one node and over all.

Invariant: reads only. A node's report is JSON, so that the agents of several nodes can exchange it and come to the
same decision.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict
from typing import Any

from dist_train.cluster.restart_policy import Cause, Ended
from dist_train.cluster.workers import Exit

Json = Any
_LOST_A_PEER = re.compile(r"closed by peer|reset by peer|Connection refused|Broken pipe|lost them|DistNetworkError")
"""In what torch.distributed says when another process has gone."""
MIDWAY = "left with exit code 0 in the middle of its run"


def report_of_node(
    exits: Mapping[int, Exit],
    notes: Mapping[int, Mapping[str, Json]],
    ranks: Mapping[int, int],
    *,
    stopped: Set[int] = frozenset(),
    ended_by_us: Set[int] = frozenset(),
    node: str = "",
) -> dict[str, Json]:
    """How this node's workers ended.

    Args:
        exits: local rank -> end, in the order in which they ended.
        notes: rank -> what it noted.
        ranks: local rank -> rank.
        stopped: local ranks that SIGSTOP held when the launcher ended them.
        ended_by_us: local ranks that the launcher ended, because others had failed or it was told to.
    """
    step = max(_told(notes, "global_step"), default=None)  # whoever was killed had no time to tell
    causes = []
    for local_rank, one in exits.items():
        cause = _cause(one, notes.get(ranks[local_rank], {}), ranks[local_rank], step, node)
        if cause is not None:
            lost = cause.secondary or local_rank in ended_by_us - stopped
            causes.append({**asdict(cause), "stopped": local_rank in stopped, "secondary": lost})
    return {
        "begun": any(note.get("begun") for note in notes.values()),
        "committed_step": max(_told(notes, "committed_step"), default=None),
        "step": step,
        "run_dir": next(iter(_told(notes, "run_dir")), None),
        "outcome": next(iter(_told(notes, "outcome")), None),
        "run_dirs": max(_told(notes, "run_dirs"), key=len, default=[]),
        "rolled_back_to": min(_told(notes, "rolled_back_to"), default=None),
        "causes": causes,
    }


def merge(
    reports: Iterable[Mapping[str, Json]], *, seconds: float, node_came: bool = False, node_left: bool = False
) -> Ended:
    """One attempt as all nodes saw it; the first failure that was nobody else's comes first.

    Where a node has left, workers that only lost others lost those of that node: no failure.
    """
    told = list(reports)
    causes = [Cause(**cause) for report in told for cause in report["causes"]]
    causes.sort(key=lambda cause: cause.secondary)
    steps = [report["committed_step"] for report in told if report["committed_step"] is not None]
    return Ended(
        seconds=seconds,
        begun=any(report["begun"] for report in told),
        committed_step=max(steps, default=None),
        run_dirs=max((report["run_dirs"] for report in told), key=len, default=[]),
        rolled_back_to=min((one["rolled_back_to"] for one in told if one["rolled_back_to"] is not None), default=None),
        causes=causes,
        membership=node_came or (node_left and all(cause.secondary for cause in causes)),
        stop_asked=any(report["stop_asked"] for report in told),
    )


def describe(cause: Cause) -> str:
    """`rank 1 was killed by SIGKILL at step 12`."""
    where = f" at step {cause.step}" if cause.step is not None else ""
    node = f" on {cause.node}" if cause.node else ""
    return f"rank {cause.rank}{node} {_how(cause)}{where}"


def _how(cause: Cause) -> str:
    if cause.stopped:
        return "was stopped (SIGSTOP) and did not go on"
    if cause.error:
        return f"failed with {cause.error}"
    if cause.was_signalled:
        return f"was killed by {signal_name(-cause.exit_code)}"
    return f"ended with exit code {cause.exit_code}" if cause.exit_code else MIDWAY


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cause(one: Exit, note: Mapping[str, Json], rank: int, step: int | None, node: str) -> Cause | None:
    """None for a worker that ended well."""
    error = note.get("error") or {}
    if one.code == 0 and ("outcome" in note or not note.get("begun")):
        return None
    if one.server_died:
        error = {"type": "ForkServerLost", "message": "the process that had forked it died"}
    elif one.code <= 0 or (error.get("type") == "SystemExit" and str(error["message"]).isdecimal()):
        error = {}  # what it noted before the signal is not what ended it
    text = f"{error.get('type', '')}: {error.get('message', '')}".strip().removesuffix(":")
    secondary = bool(error.get("secondary")) or bool(_LOST_A_PEER.search(text))
    return Cause(
        rank=rank,
        exit_code=one.code,
        error=text if error else "",
        traceback=error.get("traceback", ""),
        step=step,
        final=bool((note.get("error") or {}).get("final")),
        secondary=secondary,
        node=node,
    )


def _told(notes: Mapping[int, Mapping[str, Json]], key: str) -> list[Json]:
    return [note[key] for note in notes.values() if note.get(key) is not None]
