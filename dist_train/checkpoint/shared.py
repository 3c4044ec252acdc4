"""Is the run directory one directory for all nodes? Asked once, at start."""

from __future__ import annotations

import socket
import uuid

from dist_train.checkpoint.manifest import ATTEMPTS
from dist_train.checkpoint.store import Store
from dist_train.errors import StorageError
from dist_train.world import World


def require_shared(store: Store, world: World, attempt: int) -> None:
    """Each node writes a nonce; the main rank must read all of them and each node the main rank's. Collective.

    Raises:
        StorageError: names the nodes that see another directory.
    """
    if world.world_size == 1:
        return
    mine = f"{ATTEMPTS}/nonce-{attempt:06d}-{world.rank}-{uuid.uuid4().hex}" if world.local_rank == 0 else ""
    failure = _try_write(store, mine) if mine else ""
    rows = world.gather([mine, socket.gethostname(), failure], "whether the run directory is shared")
    nonces = [row[0] for row in rows if row[0]]
    wanted = nonces if world.is_main else nonces[:1]
    missing = [name for name in wanted if not store.exists(name)]
    seen = world.gather(missing, "who sees whose file in the run directory")
    if mine and not failure:
        store.unlink(mine)
    strangers = {row[1] for row in rows if row[2]} | {rows[rank][1] for rank, lost in enumerate(seen) if lost and rank}
    strangers |= {row[1] for row in rows if row[0] in seen[0]}
    if strangers:
        reasons = " ".join(sorted({row[2] for row in rows if row[2]}))
        raise StorageError(
            f"The run directory {store.root} is not one directory for all nodes: what {', '.join(sorted(strangers))} "
            f"writes there cannot be read on {rows[0][1]} (the main rank) or the other way round. {reasons} "
            f"Give a directory on a file system that all nodes share."
        )


def _try_write(store: Store, nonce: str) -> str:
    try:
        store.make_directory(ATTEMPTS)
        store.write_new(nonce, b"")
    except OSError as error:
        return f"Rank's own error: {error}."
    return ""
