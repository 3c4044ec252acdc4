"""Which checkpoint a run continues from: found by the main rank, verified by all ranks together, opened on every rank.

    scan (main rank) -> candidates (broadcast) -> verify (files split over ranks) -> the first that all ranks can open

Invariant: what cannot be used is named with its reason and set aside, never deleted; all ranks open the same manifest.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint import branch
from dist_train.checkpoint.catalog import Found, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import CHECKPOINTS, CORRUPT_PREFIX, Manifest
from dist_train.checkpoint.parents import find_parents
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.resume import ResumeRequest
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.console import ByteMeter, tell_long_work
from dist_train.errors import CorruptCheckpointError, NoCheckpointError, StorageError
from dist_train.world import World

Json = Any
_PATIENCE_SECONDS = (0.2, 1.0)
"""Between tries to read what the disk did not give."""
_UNKNOWN_SEQUENCES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a checkpoint to resume from says, and access to its tensors."""

    path: str
    """As given to people: inside the run directory relative to the working directory."""
    manifest: Manifest
    reader: CheckpointReader
    origin: Store
    """The store it lies in: another run's when a path outside was given."""


def peek(store: Store, resume: str, search: Sequence[str] = ()) -> Manifest | None:
    """The manifest of what a run would try first to resume from; None is a fresh start. Changes nothing.

    Raises:
        NoCheckpointError, ConfigError, FormatVersionError: as a run raises when it is entered.
    """
    route = branch.find_route(store, find_parents(store, search), ResumeRequest.parse(resume), 0)
    found = (read_checkpoint(Store(root), path).manifest for root, path, _ in route.candidates)
    return next((manifest for manifest in found if manifest), None)


class Restorer:
    """Finds and opens one checkpoint. `find` and `settle_branch` are collective."""

    def __init__(self, store: Store, world: World, search: Sequence[str] = ()) -> None:
        self.problems: list[str] = []
        """Checkpoints that could not be used, and why; on the main rank."""
        self.last_sequence = 0
        """The highest sequence that the run has used, on the main rank."""
        self.parents: list[Store] = []
        """Read-only run directories with earlier checkpoints of this run, on the main rank."""
        self.branch: Json = None
        """The branch that the run is on, on the main rank; None when it never branched."""
        self._store = store
        self._world = world
        self._search = search
        self._attempt = 0
        self._branch_is_new = False
        self._unread: list[str] = []
        """Checkpoints that the disk did not give when they were tried; equal on all ranks."""

    def find_parents(self) -> None:
        """Looks into the read-only places of `search`; on the main rank."""
        self.parents = find_parents(self._store, self._search)

    def find(self, resume: str, attempt: int) -> Opened | None:
        """The checkpoint to continue from, its digests verified; None is a fresh start.

        Raises:
            NoCheckpointError, ConfigError: what `resume` asks for cannot be had.
            FormatVersionError: the newest checkpoint was written by a newer version.
        """
        self._attempt = attempt
        request = ResumeRequest.parse(resume)
        candidates = self._world.on_main(lambda: self._candidates(request), "the checkpoints to resume from")
        for root, path, digest in candidates:
            opened = self._try_open(root, path, digest)
            if opened is not None:
                return opened
        self._require_read()
        if candidates and request.kind in ("must", "branch"):
            raise NoCheckpointError(
                f"resume={resume!r}, but no checkpoint can be used. {' '.join(self.problems)} "
                f"Give another one, or resume='auto' to start from the beginning."
            )
        return None

    def _candidates(self, request: ResumeRequest) -> Json:
        own = self._list_patiently()
        unread = [one for one in own if one.could_not_be_read]
        route = branch.find_route(self._store, self.parents, request, self._attempt)
        self.branch, self._branch_is_new = route.record, route.is_new
        # Of one that cannot be read nobody knows the sequence; gaps mean nothing.
        self.last_sequence = route.last_sequence + (_UNKNOWN_SEQUENCES if unread else 0)
        self.problems += route.notes
        for one in own if request.kind != "branch" else ():
            if one.problem is not None and not one.could_not_be_read:
                self._set_aside(one.path, str(one.problem))
        if unread and not route.candidates:
            raise StorageError(self._unread_message([str(one.problem) for one in unread]))
        return route.candidates

    def _list_patiently(self) -> list[Found]:
        """The run directory's checkpoints; those whose manifest the disk did not give lie on bad sectors at the most.

        Raises:
            StorageError: it is the disk's or the process's trouble, and not the checkpoint's.
        """
        for patience in (*_PATIENCE_SECONDS, None):
            own = list_checkpoints(self._store)
            unread = [one for one in own if one.could_not_be_read]
            if not unread or patience is None:
                break
            time.sleep(patience)
        causes = [one.problem.__cause__ for one in unread if one.problem]
        if any(isinstance(cause, OSError) and cause.errno != errno.EIO for cause in causes):
            raise StorageError(self._unread_message([str(one.problem) for one in unread]))
        self.problems += [f"{one.problem} It was left as it is." for one in unread]
        return own

    def _require_read(self) -> None:
        """A run that has checkpoints does not begin anew because the disk has not given them. Equal on all ranks."""
        if self._unread:
            raise StorageError(self._unread_message(self._unread))

    def _unread_message(self, problems: Sequence[str]) -> str:
        return (
            f"{self._store.root} holds checkpoints, and none was resumed from, since the disk did not give their "
            f"bytes: {' '.join(problems)} Nothing was changed. Run the same command again when the disk answers; to "
            f"go on without them move their folders away first."
        )

    def settle_branch(self) -> bool:
        """Once the state is restored: records the branch and moves newer checkpoints out of the way. Collective.

        Returns:
            Whether a branch was started now.
        """
        self._world.on_main(lambda: branch.settle(self._store, self.branch), "starting the branch")
        return bool(self._world.broadcast(self._branch_is_new, "whether a branch was started"))

    def _try_open(self, root: str, path: str, digest: str) -> Opened | None:
        """Collective: None on all ranks when any rank cannot use it."""
        own = root == str(self._store.root)
        store = self._store if own else Store(root)
        opened, problem, unread = self._open(store, path, digest)
        found = [one for one in self._world.gather([problem, unread], f"whether {path} verifies") if one[0]]
        if not found:
            return opened
        if opened is not None:
            opened.reader.close()
        problem, unread = found[0][0], any(one[1] for one in found)
        if unread:
            self._unread.append(f"{path}: {problem}.")
        name_it = self._set_aside if own and not unread else self._pass_over
        self._world.on_main(lambda: name_it(path, problem), f"what becomes of {path}")
        return None

    def _open(self, store: Store, path: str, digest: str) -> tuple[Opened | None, str, bool]:
        """The checkpoint, or what is wrong with it, and whether that is the disk's answer and not its bytes."""
        found = read_checkpoint(store, path)
        if found.manifest is None:
            return None, str(found.problem), found.could_not_be_read
        if found.manifest.digest != digest:
            wrong = f"rank {self._world.rank} reads manifest {found.manifest.digest}, the main rank {digest}"
            return None, wrong, False
        share = sorted(found.manifest.files)[self._world.rank :: self._world.world_size]
        total = sum(found.manifest.files[name].size for name in share)
        name = path.rsplit("/", 1)[-1]
        meter = ByteMeter(total, name=f"verifying {name}", enabled=self._world.is_main)
        damages = verify_checkpoint(store, path, found.manifest, files=share, on_bytes=meter.add)
        tell_long_work(f"Verified {name}", meter)
        if damages:
            unread = any(damage.could_not_be_read for damage in damages)
            return None, "; ".join(str(damage) for damage in damages), unread
        try:
            reader = CheckpointReader(store, path, found.manifest, rank=self._world.rank)
        except (OSError, ValueError, CorruptCheckpointError) as error:
            is_missing = isinstance(error, FileNotFoundError)  # damage, as the rank that verifies the file sees too
            return None, str(error), isinstance(error, OSError) and not is_missing
        return Opened(path=store.shown(path), manifest=found.manifest, reader=reader, origin=store), "", False

    def _pass_over(self, path: str, problem: str) -> None:
        """Another run's checkpoint, or one that the disk did not give, is left as it is."""
        self.problems.append(f"{path} cannot be used: {problem}.")

    def _set_aside(self, path: str, problem: str) -> None:
        """Renames a checkpoint that cannot be used, so that the same step can be committed again."""
        full = str(self._store.path(path))
        why = f"{full} cannot be used: {problem.removeprefix(f'{full}: ').rstrip('.')}."
        if not self._store.exists(path):
            self.problems.append(why)
            return
        name = path.rsplit("/", 1)[-1]
        aside = f"{CHECKPOINTS}/{CORRUPT_PREFIX}a{self._attempt:06d}-{name}"
        self.problems.append(f"{why} It is kept as {aside}.")
        self._store.rename(path, aside)
