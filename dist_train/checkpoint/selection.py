"""Which checkpoint of a run directory a person means: `latest`, `best`, `epoch:N`, `step:N` or a path.

Invariant: reads only; what counts as committed is the catalog's business. Needs neither torch nor the model.
"""

from __future__ import annotations

import os
import stat

from dist_train.checkpoint.catalog import Found, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, RUN_FILE
from dist_train.checkpoint.resume import SELECTORS, Selector, not_found_message, select_named
from dist_train.checkpoint.store import Store
from dist_train.errors import NoCheckpointError, StorageError

_GIVE = "Give the run_dir of the training, the folder above checkpoints/."


def open_run(run_dir: str) -> Store:
    """The store of an existing run directory.

    Raises:
        StorageError: there is no such directory, or it is not a run's.
    """
    store = Store(run_dir)
    try:
        is_directory = stat.S_ISDIR(os.stat(store.root).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{run_dir}: there is no such directory. {_GIVE}") from None
    if not is_directory:
        raise StorageError(f"{run_dir} is a file, expected a directory. {_GIVE}")
    names = store.list()
    if MANIFEST_NAME in names:
        above = os.path.dirname(os.path.dirname(os.path.abspath(run_dir)))
        raise StorageError(f"{run_dir} is one checkpoint, expected the run directory, which is {above}.")
    if CHECKPOINTS not in names and RUN_FILE not in names:
        raise StorageError(f"{run_dir} is not a run directory: it holds neither {RUN_FILE} nor {CHECKPOINTS}/. {_GIVE}")
    return store


def find_checkpoints(store: Store) -> list[Found]:
    """Committed folders, oldest first; without those that were pruned while the directory was read."""
    return [one for one in list_checkpoints(store) if one.manifest or store.is_directory(one.path)]


def select_checkpoint(store: Store, text: str) -> tuple[Store, Found]:
    """The store and folder that `latest`, `best`, `epoch:N`, `step:N` or a path names; a path may lead out of the run.

    Raises:
        ConfigError: it is no selector.
        NoCheckpointError: there is no such checkpoint.
    """
    selector = Selector.parse(text)
    if selector.kind == "path":
        return _locate(store, text)
    found = find_checkpoints(store)
    chosen = select_named(selector, found)
    if chosen is None:
        raise NoCheckpointError(not_found_message(text, selector, store.given, found))
    return store, chosen


def best_path(found: list[Found]) -> str | None:
    """The checkpoint with the best monitored metric."""
    return _path(select_named(Selector("best"), found))


def newest_path(found: list[Found]) -> str | None:
    return _path(select_named(Selector("latest"), found))


def best_or_latest(store: Store) -> str:
    """The selector of what a person wants who says nothing: `best` where a metric is monitored, else `latest`."""
    return "best" if best_path(find_checkpoints(store)) else "latest"


def _path(one: Found | None) -> str | None:
    return one.path if one else None


def _locate(store: Store, path: str) -> tuple[Store, Found]:
    places = [path, str(store.path(f"{CHECKPOINTS}/{path}")), str(store.path(path))]
    folder = next((one for one in places if os.path.isdir(one)), None)
    if folder is None:
        raise NoCheckpointError(
            f"{path!r} is no checkpoint: expected {SELECTORS}, and there "
            f"is no such folder. `dist-train ls {store.given}` lists what there is."
        )
    full = os.path.realpath(folder)
    root = os.path.realpath(store.root)
    if full.startswith(root + os.sep):
        return store, read_checkpoint(store, os.path.relpath(full, root))
    outside = Store(os.path.dirname(full))
    return outside, read_checkpoint(outside, os.path.basename(full))
