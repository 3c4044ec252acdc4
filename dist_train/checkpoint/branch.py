"""Starting again from an older or a foreign checkpoint: recorded before training begins, begun once.

    no record   -> resume from the origin; then write branch.json and move newer checkpoints to abandoned/
    a record    -> continue the branch's newest checkpoint; then finish moving if a kill came in between

Invariant: nothing is deleted, nothing is moved before the checkpoint has been loaded, and the same command never starts
the same branch twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from dist_train.checkpoint.catalog import Found, committed, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import ABANDONED, BRANCH_FILE
from dist_train.checkpoint.store import Store
from dist_train.errors import NoCheckpointError

Json = Any


def find_record(store: Store, requested: str, found: Sequence[Found], attempt: int) -> Json:
    """The branch that the run is on: what branch.json says (None without one), or a new one where another path is
    requested. Changes nothing.

    Raises:
        NoCheckpointError: the path is not a committed checkpoint.
    """
    record = _read_record(store)
    if not requested or (record is not None and record["requested"] == requested):
        return record
    root, path = _locate(store, requested)
    origin = read_checkpoint(Store(root), path)
    if origin.manifest is None:
        raise NoCheckpointError(
            f"resume={requested!r} cannot be used: {origin.problem} Give the path of a committed checkpoint folder, "
            f"for instance {store.root}/checkpoints/step-00001200 (`dist-train ls {store.root}` lists them)."
        )
    newest = max([last_sequence(record), *(manifest.sequence for _, manifest in committed(found))])
    own = root == str(store.root)
    return {
        "requested": requested,
        "origin": ["" if own else root, path, origin.manifest.digest],
        "origin_sequence": origin.manifest.sequence if own else 0,
        "first_sequence": max(newest, origin.manifest.sequence) + 1,
        "attempt": attempt,
    }


def last_sequence(record: Json) -> int:
    """The sequence that a branch counts on from; 0 without one."""
    return record["first_sequence"] - 1 if record else 0


def candidates(store: Store, record: Json, found: Sequence[Found]) -> Json:
    """The checkpoints to try, best first: the branch's own, then its origin."""
    own = [(path, m) for path, m in committed(found) if m.sequence >= record["first_sequence"]]
    root, path, digest = record["origin"]
    origin = [root or str(store.root), path, digest]
    return [*([str(store.root), path, manifest.digest] for path, manifest in reversed(own)), origin]


def without_left_behind(record: Json, found: Sequence[Found]) -> list[Found]:
    """Those that a branch does not leave behind: its origin and what is older, and its own."""
    return [one for one in found if not _is_left_behind(record, one)]


def settle(store: Store, record: Json) -> bool:
    """Records the branch, then moves what it leaves behind; both only where not done yet. Whether it is a new one."""
    if record is None:
        return False
    is_new = record != _read_record(store)
    if is_new:
        store.replace(BRANCH_FILE, json.dumps(record).encode())
    for one in list_checkpoints(store):
        if _is_left_behind(record, one):
            _abandon(store, one.path, record["attempt"])
    return bool(is_new)


def _is_left_behind(record: Json, one: Found) -> bool:
    if record is None or one.manifest is None:
        return False
    return bool(record["origin_sequence"] < one.manifest.sequence < record["first_sequence"])


def _locate(store: Store, requested: str) -> tuple[str, str]:
    """The store's root and the path inside it; any other folder is a store of its own run directory."""
    full = os.path.abspath(requested)
    root = os.path.abspath(store.root)
    if not os.path.isdir(full) and os.path.isdir(store.path(f"checkpoints/{requested}")):
        full = os.path.join(root, "checkpoints", requested)
    full = os.path.realpath(full)
    if full.startswith(os.path.realpath(root) + os.sep):
        return str(store.root), os.path.relpath(full, os.path.realpath(root))
    home = os.path.dirname(os.path.dirname(full))
    return home, os.path.relpath(full, home)


def _abandon(store: Store, path: str, attempt: int) -> None:
    folder = f"{ABANDONED}/a{attempt:06d}"
    store.make_directory(folder)
    store.rename(path, f"{folder}/{path.rsplit('/', 1)[-1]}")
    store.sync_directory(folder)
    store.sync_directory(path.rsplit("/", 1)[0])


def _read_record(store: Store) -> Json:
    try:
        return json.loads(store.read(BRANCH_FILE))
    except (OSError, ValueError):
        return None
