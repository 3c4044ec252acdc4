"""Which checkpoint of a run directory a person means: `latest`, `best`, `epoch:N`, `step:N` or a path.

Invariant: reads only; what counts as committed is the catalog's business. Needs neither torch nor the model.
"""

from __future__ import annotations

import logging
import os
import stat

from dist_train.checkpoint.catalog import Found, committed, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, RUN_FILE, Best
from dist_train.checkpoint.resume import SELECTORS, Selector, not_found_message, select_named
from dist_train.checkpoint.store import Store
from dist_train.console import metric_text
from dist_train.errors import NoCheckpointError, StorageError

logger = logging.getLogger(__name__)
_GIVE = "Give the run_dir of the training, the folder above checkpoints/."


def open_run(run_dir: str, *, or_checkpoint: bool = False) -> Store:
    """The store of an existing run directory.

    Args:
        or_checkpoint: a checkpoint that belongs to no run (`StorageWriter` wrote it) will do, too; it is its own
            `latest` then.

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
    if _is_lone_checkpoint(store):
        if or_checkpoint:
            return store
        raise StorageError(
            f"{run_dir} is one checkpoint that belongs to no run, expected a run directory. {_GIVE} `dist-train show`, "
            f"`verify`, `diff` and `export` take such a checkpoint itself."
        )
    if MANIFEST_NAME in names:
        above = os.path.dirname(os.path.dirname(os.path.abspath(run_dir)))
        raise StorageError(f"{run_dir} is one checkpoint, expected the run directory, which is {above}.")
    if CHECKPOINTS not in names and RUN_FILE not in names:
        lone = [name for name in names if not name.startswith(".") and store.exists(f"{name}/{MANIFEST_NAME}")]
        if lone:
            raise StorageError(
                f"{run_dir} is not a run directory: it holds checkpoints that belong to no run "
                f"({', '.join(lone[:3])}), and which of them counts is for their owner to say. Give one of them to "
                f"`dist-train show`, `verify`, `diff` or `export`."
            )
        raise StorageError(f"{run_dir} is not a run directory: it holds neither {RUN_FILE} nor {CHECKPOINTS}/. {_GIVE}")
    return store


def _is_lone_checkpoint(store: Store) -> bool:
    """Whether the root is a checkpoint that is in no run's folder of them."""
    return (
        store.exists(MANIFEST_NAME) and os.path.basename(os.path.dirname(os.path.realpath(store.root))) != CHECKPOINTS
    )


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
    if selector.kind == "latest" and _is_lone_checkpoint(store):
        return _locate(store, str(store.root))
    found = find_checkpoints(store)
    chosen = select_named(selector, found)
    if chosen is None:
        raise NoCheckpointError(not_found_message(text, selector, store.given, found))
    if selector.kind == "best":
        warn_of_better_elsewhere(store, found)
    return store, chosen


def best_path(found: list[Found]) -> str | None:
    """The checkpoint with the best monitored metric."""
    return _path(select_named(Selector("best"), found))


def better_elsewhere(found: list[Found]) -> Best | None:
    """The best of the run so far, where nothing that is here reaches it: it was saved in another directory, as in an
    earlier session, or is pruned.
    """
    chosen, known = select_named(Selector("best"), found), committed(found)
    best = known[-1][1].best if known else None
    if best is None:
        return None
    here = chosen.manifest.metrics[best.monitor] if chosen and chosen.manifest else None
    is_better = here is None or (best.value < here if best.mode == "min" else best.value > here)
    return best if is_better else None


def warn_of_better_elsewhere(store: Store, found: list[Found]) -> None:
    """Whoever asks for the best model is told when it is not here."""
    best, here = better_elsewhere(found), select_named(Selector("best"), found)
    if best is None or here is None or here.manifest is None:
        return
    logger.warning(
        "The best model of this run (%s %s at step %d) is not in %s; the best that is here, of step %d, has %s.",
        best.monitor,
        metric_text(best.monitor, best.value),
        best.global_step,
        store.given,
        here.manifest.progress.global_step,
        metric_text(best.monitor, here.manifest.metrics[best.monitor]),
    )


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
