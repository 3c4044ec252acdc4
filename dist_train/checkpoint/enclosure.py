"""Whether a path lies inside of a run, where nobody writes but the run itself.

Invariant: reads only, and links are followed. A folder is known by what it holds, not by its name: another program's
checkpoints/, run.json or manifest.json makes no run of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, parse_step_name
from dist_train.checkpoint.parents import read_run_id
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError


def find_run_around(path: str) -> str | None:
    """The run directory, or the checkpoint that was moved out of one, at a path or above it; None where none is."""
    return next((one for one in _at_and_above(path) if _is_run(one)), None)


def require_outside_of_runs(target: str) -> None:
    """For what is written beside a run. A link is refused for what it points at and for where it lies.

    Raises:
        ConfigError: names the run.
    """
    around = find_run_around(target) or find_run_around(os.path.dirname(os.path.abspath(target)))
    if around is None:
        return
    kind = "checkpoint" if _is_checkpoint(around) else "run directory"
    where = f"is a {kind}" if around == os.path.realpath(target) else f"lies in the {kind} {around}"
    raise ConfigError(
        f"{target} was not written: it {where}, in which only the training itself writes. Nothing was changed there. "
        f"Give a path outside of it."
    )


def require_place_for_run(run_dir: str) -> None:
    """For a training: a run directory may hold others, but not among or in its checkpoints.

    Raises:
        ConfigError: names the folder that is not to be spoiled.
    """
    for one in _at_and_above(run_dir):
        above, name = os.path.split(one)
        if _is_checkpoint(one) or (name == CHECKPOINTS and _is_run(above)):
            raise ConfigError(
                f"run_dir {run_dir} is or lies in {one}, where a run keeps its checkpoints: a training there would "
                f"spoil them. Nothing was changed. To go on from one of them, give the run's own directory as run_dir "
                f"and the checkpoint as resume=."
            )


def _at_and_above(path: str) -> Iterator[str]:
    place = os.path.realpath(path)
    while True:
        yield place
        above = os.path.dirname(place)
        if above == place:
            return
        place = above


def _is_run(folder: str) -> bool:
    """It says so, or it holds a committed checkpoint, or it is one."""
    store = Store(folder)
    if read_run_id(store) or _is_checkpoint(folder):
        return True
    with contextlib.suppress(OSError):
        names = [name for name in store.list(CHECKPOINTS) if parse_step_name(name) is not None]
        return any(store.exists(f"{CHECKPOINTS}/{name}/{MANIFEST_NAME}") for name in names)
    return False


def _is_checkpoint(folder: str) -> bool:
    try:
        with open(os.path.join(folder, MANIFEST_NAME), "rb") as file:
            return {"run_id", "sequence", "tensors"} <= set(json.load(file))
    except (OSError, ValueError, TypeError):
        return False
