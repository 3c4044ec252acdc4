"""The metrics history of a run as if it had never been interrupted: metrics.jsonl, folded along the chain of resumes.

Invariant: reads only, and needs no torch. How a record gets into the file is `console.MetricsLog`'s business; how the
file is folded stands in `docs/checkpoint-format.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from dist_train.checkpoint.manifest import METRICS_LOG
from dist_train.checkpoint.selection import open_run
from dist_train.checkpoint.store import Store
from dist_train.errors import StorageError

Json = Any
_NOT_IN_JSON = {"nan", "inf", "-inf"}
_WORDS = ("kind",)
"""Keys whose values are words, not numbers."""


def read_metrics(run_dir: str | os.PathLike[str] | Store) -> list[dict[str, Json]]:
    """The run's recorded losses and metrics, oldest first; `pandas.DataFrame(read_metrics(run))` is a table of them.

    A record has `kind` (`step` or `epoch`), `global_step` and `epoch`; a step's also `loss` and `lr`, an epoch's
    `train_loss` and the metrics by name. `loss` is the mean since the record before, `lr` the rate that the update used
    (of the first parameter group). Values are plain numbers, None where nothing was measured.

    Args:
        run_dir: the run directory, or its store.

    Raises:
        StorageError: there is no such directory, it is not a run's, or it holds no metrics.jsonl.
    """
    if isinstance(run_dir, Store):
        return fold_metrics(read_lines(run_dir))
    store = open_run(os.fspath(run_dir))
    if not store.exists(METRICS_LOG):
        raise StorageError(
            f"{run_dir} holds no {METRICS_LOG}: nothing was recorded, or the file was left behind when the run was "
            f"copied. The main rank writes it from the training's start on; copy it from where the run was trained."
        )
    return fold_metrics(read_lines(store))


def read_lines(store: Store) -> list[str]:
    """The lines of metrics.jsonl; none where there is no such file."""
    return store.read(METRICS_LOG).decode(errors="replace").splitlines() if store.exists(METRICS_LOG) else []


def fold_metrics(lines: Iterable[str], attempt: int | None = None) -> list[dict[str, Json]]:
    """History of an attempt (the newest by default) = the kept part of its parent's + its own records.

    Lines that a kill has torn, and those of attempts outside of the chain, are left out. A record counts once: a disk
    that was full may have taken a part of what was then written again.
    """
    starts: dict[int, Json] = {}
    own: dict[int, dict[int, dict[str, Json]]] = {}
    for line in lines:
        record = parse_line(line)
        if record is None:
            continue
        if record.get("kind") == "attempt":
            starts[record["attempt"]] = record
        else:
            own.setdefault(record["attempt"], {})[record["record"]] = record
    history: list[dict[str, Json]] = []
    for number, keep in reversed(_chain(starts, attempt)):
        history = [record for record in history if record["record"] < keep] + list(own.get(number, {}).values())
    return [_as_measured(record) for record in history]


def chain_of_attempts(lines: Iterable[str]) -> list[int]:
    """The attempts whose records make up the history of the newest one, oldest first."""
    records = [record for line in lines if (record := parse_line(line)) is not None]
    starts = {record["attempt"]: record for record in records if record.get("kind") == "attempt"}
    return [number for number, _ in reversed(_chain(starts, None))]


def _chain(starts: dict[int, Json], attempt: int | None) -> list[tuple[int, int]]:
    """Attempt and what it keeps of its parent's history, from the newest back."""
    wanted = attempt if attempt is not None else max(starts, default=0)
    chain: list[tuple[int, int]] = []
    while wanted in starts and all(wanted != number for number, _ in chain):  # numbers that were lost may come again
        chain.append((wanted, starts[wanted]["keep"]))
        wanted = starts[wanted]["parent_attempt"]
    return chain


def rows_by_step(history: Iterable[dict[str, Json]]) -> dict[int, dict[str, float]]:
    """Global step -> what was measured there, a step's and an epoch's values together, as a tracker shows them."""
    rows: dict[int, dict[str, float]] = {}
    for record in history:
        measured = {key: value for key, value in record.items() if key not in ("kind", "global_step", "epoch")}
        row = rows.setdefault(record["global_step"], {})
        row.update((key, value) for key, value in measured.items() if value is not None)
    return rows


def parse_line(line: str) -> dict[str, Json] | None:
    """A line of one of the run's logs; None for one that a kill has torn."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("attempt"), int) else None


def _as_measured(record: dict[str, Json]) -> dict[str, Json]:
    """Without the bookkeeping, and with the floats that JSON lacks."""
    return {
        key: float(value) if key not in _WORDS and isinstance(value, str) and value in _NOT_IN_JSON else value
        for key, value in record.items()
        if key not in ("attempt", "record")
    }
