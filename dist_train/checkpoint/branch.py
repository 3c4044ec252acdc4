"""Starting again from an older or a foreign checkpoint: recorded before training begins, begun once.

    no record   -> write branch.json, move newer checkpoints to abandoned/, resume from the origin
    same record -> finish moving if a kill came in between, then continue the branch's newest checkpoint

Invariant: nothing is deleted; the same command never starts the same branch twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from dist_train.checkpoint.catalog import Found, committed, read_checkpoint
from dist_train.checkpoint.manifest import ABANDONED, BRANCH_FILE
from dist_train.checkpoint.store import Store
from dist_train.errors import NoCheckpointError

Json = Any


def candidates(store: Store, requested: str, found: Sequence[Found], attempt: int) -> Json:
    """The checkpoints to try, best first, and the sequence that the branch counts on from; recorded on disk before.

    Raises:
        NoCheckpointError: the path is not a committed checkpoint.
    """
    record = _read_record(store)
    if record is None or record["requested"] != requested:
        record = _start(store, requested, found, attempt)
    own = committed(found)
    for path, manifest in own:
        if record["origin_sequence"] < manifest.sequence < record["first_sequence"]:
            _abandon(store, path, record["attempt"])
    newer = [[str(store.root), path, m.digest] for path, m in own if m.sequence >= record["first_sequence"]]
    return {"checkpoints": [*reversed(newer), record["origin"]], "sequence": record["first_sequence"] - 1}


def _start(store: Store, requested: str, found: Sequence[Found], attempt: int) -> Json:
    root, path = _locate(store, requested)
    origin = read_checkpoint(Store(root), path)
    if origin.manifest is None:
        raise NoCheckpointError(
            f"resume={requested!r} cannot be used: {origin.problem} Give the path of a committed checkpoint folder, "
            f"for instance {store.root}/checkpoints/step-00001200 (`dist-train ls {store.root}` lists them)."
        )
    newest = max((manifest.sequence for _, manifest in committed(found)), default=0)
    own = root == str(store.root)
    record = {
        "requested": requested,
        "origin": [root, path, origin.manifest.digest],
        "origin_sequence": origin.manifest.sequence if own else 0,
        "first_sequence": max(newest, origin.manifest.sequence) + 1,
        "attempt": attempt,
    }
    store.replace(BRANCH_FILE, json.dumps(record).encode())
    return record


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
