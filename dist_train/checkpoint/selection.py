"""Which checkpoint of a run directory a person means: `latest`, `best`, `step:N` or a path.

Invariant: reads only; what counts as committed is the catalog's business. Needs neither torch nor the model.
"""

from __future__ import annotations

import os
import stat

from dist_train.checkpoint.catalog import Found, committed, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, RUN_FILE, parse_step_name
from dist_train.checkpoint.retention import select_best
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


def select_checkpoint(store: Store, selector: str) -> tuple[Store, Found]:
    """The store and folder that `latest`, `best`, `step:N` or a path names; a path may lead out of the run.

    Raises:
        NoCheckpointError: there is none.
    """
    step = parse_step_selector(selector)
    if selector not in ("latest", "best") and step is None:
        return _locate(store, selector)
    found = find_checkpoints(store)
    wanted = [one for one in found if step is None or parse_step_name(os.path.basename(one.path)) == step]
    path = best_path(found) if selector == "best" else newest_path(wanted)
    chosen = next((one for one in found if one.path == path), None)
    if chosen is None and step is not None and wanted:
        chosen = wanted[-1]  # unusable, and the reason is what the user wants to know
    if chosen is None:
        raise NoCheckpointError(_none_message(store, selector, found))
    return store, chosen


def parse_step_selector(selector: str) -> int | None:
    """The number of `step:1200`, None for any other text."""
    digits = selector.removeprefix("step:") if selector.startswith("step:") else ""
    return int(digits) if digits.isdecimal() else None


def best_path(found: list[Found]) -> str | None:
    """The checkpoint with the best monitored metric; which metric that is, the newest one says."""
    usable = committed(found)
    best = usable[-1][1].best if usable else None
    chosen = select_best(usable, best.monitor, best.mode, 1) if best else []
    return chosen[0][0] if chosen else None


def newest_path(found: list[Found]) -> str | None:
    usable = committed(found)
    return usable[-1][0] if usable else None


def _locate(store: Store, path: str) -> tuple[Store, Found]:
    places = [path, str(store.path(f"{CHECKPOINTS}/{path}")), str(store.path(path))]
    folder = next((one for one in places if os.path.isdir(one)), None)
    if folder is None:
        raise NoCheckpointError(
            f"{path!r} is no checkpoint: expected latest, best, step:N or the path of a checkpoint folder, and there "
            f"is no such folder. `dist-train ls {store.given}` lists what there is."
        )
    full = os.path.realpath(folder)
    root = os.path.realpath(store.root)
    if full.startswith(root + os.sep):
        return store, read_checkpoint(store, os.path.relpath(full, root))
    outside = Store(os.path.dirname(full))
    return outside, read_checkpoint(outside, os.path.basename(full))


def _none_message(store: Store, selector: str, found: list[Found]) -> str:
    usable = committed(found)
    if not usable:
        problems = "".join(f" {one.problem}" for one in found if one.problem)
        what = "no checkpoint that can be used." if found else "no checkpoint yet: none was ever committed there."
        return f"{store.given} holds {what}{problems} Check that this is the run you mean, or let it train on."
    if selector == "best":
        return (
            f"{store.given} holds no best checkpoint: no monitored metric is recorded in its {len(usable)} checkpoints "
            f"(metrics are what the loop gives to end_epoch). Choose latest or step:N."
        )
    steps = [str(manifest.progress.global_step) for _, manifest in usable]
    shown = ", ".join(steps if len(steps) <= 6 else [steps[0], "...", *steps[-4:]])
    return f"{store.given} holds no checkpoint for {selector}; it holds those of step {shown}."
