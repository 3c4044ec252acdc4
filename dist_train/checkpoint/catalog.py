"""What lies in a run directory: the one definition of "committed" that resume, retention and the command line share.

Committed: a folder under a committed name whose manifest parses with the right digest. Everything else is torn, corrupt
or foreign and is reported with the reason. Reads only; checks no data file (see `verify`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.checkpoint.manifest import ABANDONED, CHECKPOINTS, MANIFEST_NAME, Manifest, parse_step_name
from dist_train.checkpoint.store import Store
from dist_train.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Found:
    """A folder under a committed name; `manifest` is None where `problem` says why it cannot be used."""

    path: str
    """Relative to the store's root."""
    manifest: Manifest | None
    problem: CheckpointError | None = None

    @property
    def could_not_be_read(self) -> bool:
        """The disk gave an error in place of the manifest's bytes, which says nothing about them."""
        return self.problem is not None and isinstance(self.problem.__cause__, OSError)


def list_checkpoints(store: Store) -> list[Found]:
    """All folders under committed names, oldest first: by sequence, the unreadable ones before all others."""
    found = [read_checkpoint(store, path) for path in _paths(store)]
    return sorted(found, key=lambda one: one.manifest.sequence if one.manifest else -1)


def newest_attempt(store: Store) -> int:
    """The highest that a checkpoint is of, 0 without any. One manifest at a time: large models have large ones."""
    found = (read_checkpoint(store, path).manifest for path in _paths(store))
    return max((manifest.attempt for manifest in found if manifest is not None), default=0)


def find_abandoned(store: Store) -> list[str]:
    """Checkpoints that a branch has left behind."""
    folders = [f"{ABANDONED}/{name}" for name in store.list(ABANDONED)]
    return [
        f"{folder}/{name}" for folder in folders for name in store.list(folder) if parse_step_name(name) is not None
    ]


def committed(found: Sequence[Found]) -> list[tuple[str, Manifest]]:
    """Path and manifest of those that can be used."""
    return [(one.path, one.manifest) for one in found if one.manifest is not None]


def _paths(store: Store) -> list[str]:
    return [f"{CHECKPOINTS}/{name}" for name in store.list(CHECKPOINTS) if parse_step_name(name) is not None]


def read_checkpoint(store: Store, path: str) -> Found:
    """One checkpoint folder, whatever state it is in."""
    full = str(store.path(path))
    try:
        return Found(path, Manifest.from_json(store.read(f"{path}/{MANIFEST_NAME}"), full))
    except FileNotFoundError:
        return Found(path, None, CheckpointError(f"{full}: there is no {MANIFEST_NAME}; it was never committed.", full))
    except OSError as error:
        problem = CheckpointError(f"{full}: the manifest cannot be read: {error}.", full)
        problem.__cause__ = error
        return Found(path, None, problem)
    except CheckpointError as error:
        return Found(path, None, error)
