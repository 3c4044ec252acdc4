"""How the ranks of one attempt find each other in a store that outlives attempts.

Invariant: what dead ranks left in the store is never taken for the living ones'; no wait without a deadline.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from typing import Any

import torch.distributed as dist

from dist_train.errors import DeadlineError, DisagreementError

JOIN_TIMEOUT_SECONDS = 600.0
_FIRST_POLL_SECONDS = 0.002
_POLL_SECONDS = 0.02


def join(store: dist.Store, rank: int, world_size: int, timeout_seconds: float = JOIN_TIMEOUT_SECONDS) -> str:
    """All ranks of this attempt agree on a generation; what dead ranks left in the store is never taken for theirs.

    Each rank writes a fresh id. Rank 0 publishes a roster of the ids that it reads, and a new one whenever an id has
    changed, until every rank of one roster has acknowledged it; a rank acknowledges only a roster that holds its own
    id. A rank 0 whose own id was overwritten has been replaced and gives up.
    """
    base = f"dist_train/join/{world_size}"
    mine = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    store.set(f"{base}/{rank}", mine)
    deadline = time.monotonic() + timeout_seconds
    roster: dict[str, Any] = {}
    pause = _FIRST_POLL_SECONDS
    while time.monotonic() < deadline:
        if rank == 0:
            roster = _lead(store, base, world_size, mine, roster)
        else:
            roster = _follow(store, base, rank, mine, roster)
        if roster.get("complete"):
            return str(roster["generation"])
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    missing = _missing(store, base, world_size, roster) if rank == 0 else []
    raise DeadlineError(
        f"Rank {rank} waited {timeout_seconds:.0f} s for all {world_size} ranks to join"
        + (f"; missing: ranks {missing}" if missing else "; rank 0 did not complete the roster")
        + ". Look at the logs of the ranks that are missing: they did not start or could not reach "
        f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}."
    )


def _lead(store: dist.Store, base: str, world_size: int, mine: str, roster: dict[str, Any]) -> dict[str, Any]:
    keys = [f"{base}/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return roster
    ids = [store.get(key).decode() for key in keys]
    if ids[0] != mine:
        raise DisagreementError(f"Another process has joined as rank 0 ({ids[0]}); this one ({mine}) is out of date.")
    if ids != roster.get("ids"):
        roster = {"generation": uuid.uuid4().hex, "ids": ids}
        store.set(f"{base}/roster", json.dumps(roster))
    if all(_acknowledged(store, base, roster, rank) for rank in range(1, world_size)):
        roster["complete"] = True
        store.set(f"{base}/roster", json.dumps(roster))
    return roster


def _follow(store: dist.Store, base: str, rank: int, mine: str, known: dict[str, Any]) -> dict[str, Any]:
    if not store.check([f"{base}/roster"]):
        return {}
    roster: dict[str, Any] = json.loads(store.get(f"{base}/roster"))
    if roster["ids"][rank] != mine:
        return {}
    if roster["generation"] != known.get("generation"):
        store.set(f"{base}/{rank}/acknowledged", roster["generation"])
    return roster


def _missing(store: dist.Store, base: str, world_size: int, roster: dict[str, Any]) -> list[int]:
    """Ranks that have written no id or, of a roster, have not acknowledged it (what is there is a dead rank's)."""
    if not roster:
        return [rank for rank in range(1, world_size) if not store.check([f"{base}/{rank}"])]
    return [rank for rank in range(1, world_size) if not _acknowledged(store, base, roster, rank)]


def _acknowledged(store: dist.Store, base: str, roster: dict[str, Any], rank: int) -> bool:
    key = f"{base}/{rank}/acknowledged"
    return bool(store.check([key])) and store.get(key).decode() == roster.get("generation")
