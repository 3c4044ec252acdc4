"""Which checkpoint a run continues from: found by the main rank, verified by all ranks together, opened on every rank.

    scan (main rank) -> candidates (broadcast) -> verify (files split over ranks) -> the first that all ranks can open

Invariant: what cannot be used is named with its reason and set aside, never deleted; all ranks open the same manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint import branch
from dist_train.checkpoint.catalog import list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import CHECKPOINTS, CORRUPT_PREFIX, Manifest
from dist_train.checkpoint.parents import find_parents
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.resume import ResumeRequest
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.console import ByteMeter, tell_long_work
from dist_train.errors import CorruptCheckpointError, NoCheckpointError
from dist_train.world import World

Json = Any


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
        if candidates and request.kind in ("must", "branch"):
            raise NoCheckpointError(
                f"resume={resume!r}, but no checkpoint can be used. {' '.join(self.problems)} "
                f"Give another one, or resume='auto' to start from the beginning."
            )
        return None

    def _candidates(self, request: ResumeRequest) -> Json:
        route = branch.find_route(self._store, self.parents, request, self._attempt)
        self.branch, self._branch_is_new, self.last_sequence = route.record, route.is_new, route.last_sequence
        for one in list_checkpoints(self._store) if request.kind != "branch" else ():
            if one.problem is not None:
                self._set_aside(one.path, str(one.problem))
        return route.candidates

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
        opened, problem = self._open(store, path, digest)
        problems = [text for text in self._world.gather(problem, f"whether {path} verifies") if text]
        if not problems:
            return opened
        if opened is not None:
            opened.reader.close()
        name_it = self._set_aside if own else self._pass_over
        self._world.on_main(lambda: name_it(path, problems[0]), f"what becomes of {path}")
        return None

    def _open(self, store: Store, path: str, digest: str) -> tuple[Opened | None, str]:
        found = read_checkpoint(store, path)
        if found.manifest is None:
            return None, str(found.problem)
        if found.manifest.digest != digest:
            return None, f"rank {self._world.rank} reads manifest {found.manifest.digest}, the main rank {digest}"
        share = sorted(found.manifest.files)[self._world.rank :: self._world.world_size]
        total = sum(found.manifest.files[name].size for name in share)
        name = path.rsplit("/", 1)[-1]
        meter = ByteMeter(total, name=f"verifying {name}", enabled=self._world.is_main)
        damages = verify_checkpoint(store, path, found.manifest, files=share, on_bytes=meter.add)
        tell_long_work(f"Verified {name}", meter)
        if damages:
            return None, "; ".join(str(damage) for damage in damages)
        try:
            reader = CheckpointReader(store, path, found.manifest, rank=self._world.rank)
        except (OSError, ValueError, CorruptCheckpointError) as error:
            return None, str(error)
        return Opened(path=store.shown(path), manifest=found.manifest, reader=reader, origin=store), ""

    def _pass_over(self, path: str, problem: str) -> None:
        """Another run's checkpoint is left as it is."""
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
