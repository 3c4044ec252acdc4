"""The way out of a run directory: first another name, then gone.

Invariant: under its own name a folder is whole or not there; what a kill leaves is trash, which the next attempt
empties.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from dist_train.checkpoint.manifest import CHECKPOINTS, TRASH_PREFIX
from dist_train.checkpoint.store import Store


def discard(store: Store, path: str, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Takes a folder out of the way first and removes it then; a kill in between leaves only trash.

    Args:
        unless: asked when the folder is out of the way; it is put back where this says so.

    Returns:
        Whether nothing is there under that name any more.
    """
    trash = f"{CHECKPOINTS}/{TRASH_PREFIX}{time.monotonic_ns()}-{path.rsplit('/', 1)[-1].lstrip('.')}"
    with contextlib.suppress(OSError):
        store.rename(path, trash)
        if unless():
            store.rename(trash, path)
        else:
            store.remove_tree(trash)
    return not store.exists(path)
