"""Read-only places with earlier checkpoints of the same run, such as the attached output of an earlier session.

    globs -> directories -> run directories below them -> those of the same run, newest first

Invariant: reads only. Which checkpoint is taken is decided by sequence, as everywhere.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence

from dist_train.checkpoint.catalog import committed, list_checkpoints
from dist_train.checkpoint.manifest import CHECKPOINTS, RUN_FILE
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError

logger = logging.getLogger(__name__)
MOST_LEVELS = 4
"""How deep below a match a run directory may lie."""
MOST_DIRECTORIES = 10_000
"""How many directories are looked into; an attached data set may hold a million."""


def find_parents(store: Store, patterns: Sequence[str]) -> list[Store]:
    """Run directories with committed checkpoints of this run, the one with the newest first.

    The run is known by run.json, else by its own newest checkpoint. A fresh run directory takes the run that is there;
    where several are, the one whose folder has the same name.

    Raises:
        ConfigError: several runs are there and none or more than one has that name.
    """
    runs: dict[str, list[tuple[int, Store]]] = {}
    for root in _run_directories(patterns, os.path.realpath(store.root)):
        one = Store(root)
        if known := committed(list_checkpoints(one)):
            runs.setdefault(known[-1][1].run_id, []).append((known[-1][1].sequence, one))
    run_id = read_run_id(store) or id_of_newest(store) or _only_run(store, runs)
    return [one for _, one in sorted(runs.get(run_id, []), key=lambda pair: pair[0], reverse=True)]


def read_run_id(store: Store) -> str:
    """What run.json says; "" where it is missing or damaged. Raises OSError where the disk does not give it."""
    try:
        return str(json.loads(store.read(RUN_FILE))["run_id"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return ""


def id_of_newest(store: Store) -> str:
    """The run that the newest checkpoint of a directory belongs to; "" without one."""
    known = committed(list_checkpoints(store))
    return known[-1][1].run_id if known else ""


def _only_run(store: Store, runs: dict[str, list[tuple[int, Store]]]) -> str:
    namesakes = [run for run, places in runs.items() if any(one.root.name == store.root.name for _, one in places)]
    chosen = namesakes if len(runs) > 1 else list(runs)
    if len(chosen) == 1 or not runs:
        return next(iter(chosen), "")
    told = "; ".join(_run_text(run, places) for run, places in sorted(runs.items()))
    raise ConfigError(
        f"search finds {len(runs)} different runs: {told}. Not exactly one of them lies in a folder called "
        f"{store.root.name}. Let search find only the one to continue (in a notebook, remove the input that holds the "
        f"other), give the run directory the name of its folder, or give resume= the path of a checkpoint of it."
    )


def _run_text(run_id: str, places: list[tuple[int, Store]]) -> str:
    """One run with what is newest of it, and every place that holds a part of it."""
    newest_first = [one for _, one in sorted(places, key=lambda pair: pair[0], reverse=True)]
    newest = committed(list_checkpoints(newest_first[0]))[-1][1]
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.committed_at))
    where = " and ".join(str(one.root) for one in newest_first)
    return f"run {run_id} (newest: step {newest.progress.global_step} of {when}) in {where}"


def _run_directories(patterns: Sequence[str], own: str) -> Iterator[str]:
    seen: set[str] = set()
    for pattern in patterns:
        for match in sorted(glob.glob(os.path.expanduser(pattern))):
            for folder in _walk(os.path.realpath(match)):
                if folder not in seen and folder != own:
                    seen.add(folder)
                    yield folder


def _walk(top: str) -> Iterator[str]:
    """Run directories at or below a directory; not those inside of one, nor of hidden folders."""
    looked = 0
    level = [top] if os.path.isdir(top) else []
    for _ in range(MOST_LEVELS + 1):
        below: list[str] = []
        for folder in level:
            looked += 1
            if looked > MOST_DIRECTORIES:
                logger.warning("search looked into %d directories below %s and gave up there.", MOST_DIRECTORIES, top)
                return
            inside = _folders(folder)
            if CHECKPOINTS in inside or os.path.isfile(os.path.join(folder, RUN_FILE)):
                yield folder
            else:
                below += [os.path.join(folder, name) for name in inside]
        level = below


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
