"""The facade of the room: open a run directory, restore the newest good checkpoint, save, prune, close.

    save:    capture -> plan -> staging folder (main rank) -> image -> writer thread ... commit
    restore: scan (main rank) -> broadcast -> verify (files split over ranks) -> reader -> live objects

Invariant: every decision is the main rank's and is broadcast; every rank loads the manifest whose digest was broadcast.
It knows nothing of loops and clocks: when to save is `policy` asked by the run.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.capture import Capture
from dist_train.checkpoint import roll_back
from dist_train.checkpoint.attached import AttachedFile, read_attached
from dist_train.checkpoint.catalog import newest_attempt
from dist_train.checkpoint.enclosure import require_place_for_run
from dist_train.checkpoint.joint_plan import plan_together
from dist_train.checkpoint.keeper import Keeper
from dist_train.checkpoint.manifest import (
    ATTACHED,
    CHECKPOINTS,
    FORMAT_VERSION,
    RUN_FILE,
    SAVING_PREFIX,
    TRASH_PREFIX,
    Best,
    Manifest,
    Progress,
    saving_name,
    step_name,
)
from dist_train.checkpoint.ownership import Ownership
from dist_train.checkpoint.parents import id_of_newest, read_run_id
from dist_train.checkpoint.plan import Plan, signature_of
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.restorer import Opened, Restorer
from dist_train.checkpoint.shared import require_shared
from dist_train.checkpoint.snapshot import Image
from dist_train.checkpoint.store import Store, is_out_of_space
from dist_train.checkpoint.trash import discard
from dist_train.checkpoint.writer import Committed, Event, SaveFailed, SaveJob, Writer, Writing, describe_error
from dist_train.console import bytes_text
from dist_train.errors import DistTrainError, SaveFailedError
from dist_train.world import World

logger = logging.getLogger(__name__)
Json = Any
_MANIFEST_SLACK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a manifest says besides the files; equal on all ranks but for `rank_state`."""

    progress: Progress
    reason: str
    settings: dict[str, Json]
    environment: dict[str, Json]
    metrics: dict[str, float]
    train_loss: float | None
    best: Best | None
    rank_state: dict[str, Json]


class Checkpointer:
    """Saves and restores one run. `open`, `restore`, `save` and `close` are collective.

    Args:
        store: the run directory.
        policy: what to keep, and how many failed saves in a row are survived.
        search: patterns of read-only places with earlier checkpoints of this run.
        clean_steps: see `Keeper`.
    """

    def __init__(
        self,
        store: Store,
        world: World,
        policy: CheckpointPolicy,
        *,
        search: Sequence[str] = (),
        clean_steps: int | None = None,
    ) -> None:
        self.store = store
        self.world = world
        self.policy = policy
        self.run_id = ""
        self.attempt = 0
        self.committed: Progress | None = None
        """Progress of the newest durable checkpoint, as far as the main rank knows."""
        self._search = search
        self._restorer = Restorer(store, world, search)
        self._ownership = Ownership(store) if world.is_main else None
        self._writer: Writer | None = None
        self._plan: Plan | None = None
        self._image: Image | None = None
        self._total_bytes = 0
        self._attached: dict[str, AttachedFile] = {}
        self.attached: dict[str, str] = {}
        """Names and digests of the files that go along with every checkpoint; equal on all ranks."""
        self._serial = 0
        self._sequence = 0
        self._parent: str | None = None
        self._monitor: str | None = policy.monitor
        self.failures = 0
        """Saves that failed in a row."""
        self.on_wait: Callable[[Writing | None], None] = lambda writing: None
        """Called now and then while training waits for a save."""
        self._fatal: DistTrainError | None = None
        self._keeper = Keeper(store, policy, lambda: self.is_lost, clean_steps)

    def on_beat(self, listener: Callable[[int], None]) -> None:
        """Calls `listener(attempt)` at each sign of life that the main rank gives, most in the heartbeat's thread."""
        if self._ownership is not None:
            self._ownership.on_beat = listener

    @property
    def problems(self) -> list[str]:
        """Checkpoints that could not be used at start, and why; for people."""
        return self._restorer.problems

    @property
    def committed_step(self) -> int:
        """Step of the newest durable checkpoint, -1 before the first; exact on the main rank."""
        return -1 if self.committed is None else self.committed.global_step

    # Opening

    def open(self) -> None:
        """Takes the run directory over: ownership, shared check, leftovers of dead attempts to the trash. After `close`
        it may be opened again, as a new attempt.

        Raises:
            ConfigError: it lies among the checkpoints of another run.
            StorageError: not writable, or not one directory for all nodes.
            RunInUseError: another launch lives there.
        """
        if self.attempt:
            if self._ownership is not None:
                listener = self._ownership.on_beat
                self._ownership = Ownership(self.store)
                self._ownership.on_beat = listener
            self._restorer = Restorer(self.store, self.world, self._search)
            self.committed, self.failures = None, 0
        opening = self.world.on_main(self._take_over, "taking over the run directory")
        self.run_id, self.attempt = opening["run_id"], opening["attempt"]
        require_shared(self.store, self.world, self.attempt)
        self._writer = Writer(self.store, self.world, self._ownership, self._after_commit)
        if self.world.is_main:
            self._writer.run(self._empty_trash)

    def _take_over(self) -> Json:
        assert self._ownership is not None
        require_place_for_run(str(self.store.root))
        self.store.require_writable()
        attempt = self._ownership.acquire(at_least=newest_attempt(self.store) + 1)
        self.store.make_directory(CHECKPOINTS)
        for name in self.store.list(CHECKPOINTS):
            if name.startswith(SAVING_PREFIX):
                self._restorer.problems.append(f"{name} is torn (its writer died before the commit): thrown away.")
                self.store.rename(f"{CHECKPOINTS}/{name}", f"{CHECKPOINTS}/{TRASH_PREFIX}{attempt:06d}-{name[1:]}")
        return {"run_id": self._identify(), "attempt": attempt}

    def _identify(self) -> str:
        """The run's id; where run.json is missing or damaged, that of the newest checkpoint, or a new one."""
        self._restorer.find_parents()
        if run_id := read_run_id(self.store):
            return run_id
        known = [id_of_newest(one) for one in (self.store, *self._restorer.parents)]
        run_id = next(filter(None, known), uuid.uuid4().hex)
        created = {"run_id": run_id, "created": time.time(), "format": FORMAT_VERSION}
        self.store.replace(RUN_FILE, json.dumps(created).encode())
        return run_id

    def _empty_trash(self) -> list[Event]:
        try:
            for name in self.store.list(CHECKPOINTS):
                if name.startswith(TRASH_PREFIX):
                    self.store.remove_tree(f"{CHECKPOINTS}/{name}")
        except OSError as error:
            logger.warning("Trash stays in %s until the next start: %s.", self.store.path(CHECKPOINTS), error)
        return []

    # Restoring

    def restore(self, resume: str) -> Opened | None:
        """The checkpoint to continue from, its digests verified; None is a fresh start. See `Restorer.find`."""
        for text in self.policy.settings_without_effect() if self.world.is_main else ():
            logger.warning("CheckpointPolicy: %s", text)
        opened = self._restorer.find(resume, self.attempt)
        self._sequence = self._restorer.last_sequence
        if opened is not None:
            self._accept(opened)
        return opened

    def settle_branch(self) -> bool:
        """Once the state is restored: see `Restorer.settle_branch`. Then makes room for the first save."""
        is_new = self._restorer.settle_branch()
        if self.world.is_main and self.policy.budget is not None and self._writer is not None:
            self._writer.run(lambda: self._keeper.make_room(self.run_id, self._monitor))
        return is_new

    @property
    def skip_recorded(self) -> list[Json]:
        """The skip ledger that the record of the branch holds, which the checkpoint may not hold yet. Collective."""
        record = self._restorer.branch or {}
        return list(self.world.broadcast(record.get("skip", []), "which windows are left out"))

    def decide_roll_back(self, proved_step: int, skip: Callable[[int], list[Json]]) -> tuple[str, int] | None:
        """Records where the next start goes back to: see `roll_back.decide`. Collective, with no save in flight."""

        def decide() -> Json:
            assert self._ownership is not None
            self._ownership.require_held()
            return roll_back.decide(
                self.store,
                self._restorer.parents,
                proved_step,
                attempt=self.attempt,
                last_sequence=self._sequence,
                skip=skip,
            )

        decided = self.world.on_main(decide, "what to roll back to")
        return None if decided is None else (decided[0], decided[1])

    def _accept(self, opened: Opened) -> None:
        self._sequence = max(self._sequence, opened.manifest.sequence)
        self._parent = opened.manifest.digest
        self._monitor = self._monitor or (opened.manifest.best.monitor if opened.manifest.best else None)
        if opened.origin is self.store:
            relative = opened.path.removeprefix(self.store.shown(""))
            self.committed = opened.manifest.progress
            self._keeper.resumed_from(relative)

    # Saving

    def attach(self, items: Sequence[Any]) -> None:
        """Files for every checkpoint from now on; the main rank's items count, see `read_attached`. Collective."""

        def read() -> Json:
            self._attached = read_attached(items, self._attached)
            return {name: file.entry.digest for name, file in sorted(self._attached.items())}

        self.attached = self.world.on_main(read, "the files to be attached")

    def dry_run(self, capture: Capture) -> None:
        """Plans a save without saving, so that what cannot be saved fails in the first second. Collective."""
        self._refresh_plan(capture)

    def save(self, capture: Capture, draft: Draft) -> float | None:
        """Begins a save; returns the seconds that training waited, None when it was given up at once. Collective."""
        started = time.monotonic()
        assert self._writer is not None
        self._writer.join(self.on_wait)
        plan = self._refresh_plan(capture)
        begun = self.world.on_main(lambda: self._begin(draft), "where to save")
        if "refused" in begun:
            return None
        if self._image is None:
            self._image = Image(plan)
        self._image.fill(plan, capture, self.world.rank)
        self._writer.submit(
            SaveJob(
                serial=self._next_serial(),
                staging=begun["staging"],
                target=begun["target"],
                plan=plan,
                image=self._image,
                rank_state={**capture.rank_state, **draft.rank_state},
                attached=self._attached,
                manifest=self._draft_manifest(draft, capture, plan) if self.world.is_main else None,
            )
        )
        return time.monotonic() - started

    def _refresh_plan(self, capture: Capture) -> Plan:
        """The kept plan, or a new one on all ranks when any rank's structure has changed."""
        changed = self._plan is None or self._plan.signature != signature_of(capture)
        if not self.world.max([changed], "whether the structure of the state has changed")[0]:
            assert self._plan is not None
            return self._plan
        self._plan, self._total_bytes = plan_together(capture, self.world)
        if self._image is not None:
            self._image.close()
            self._image = None
        return self._plan

    def _begin(self, draft: Draft) -> Json:
        """Makes the staging folder; a disk that is full or broken refuses the save, not the training."""
        step = draft.progress.global_step
        try:
            return self._make_staging(step)
        except OSError as error:
            full = is_out_of_space(error)
            return self._refuse(SaveFailed(global_step=step, message=describe_error(error), out_of_space=full))

    def _make_staging(self, step: int) -> Json:
        free = self.store.free_bytes()
        attached = sum(file.entry.size for file in self._attached.values())
        needed = self._total_bytes + attached + _MANIFEST_SLACK
        if free < needed:
            needs = f"it needs {bytes_text(needed)}, {bytes_text(free)} are free on {self.store.root}"
            return self._refuse(SaveFailed(global_step=step, message=needs, out_of_space=True))
        copies = (step_name(step, copy) for copy in range(1 << 20))
        target = next(name for name in copies if not self.store.exists(f"{CHECKPOINTS}/{name}"))
        staging = f"{CHECKPOINTS}/{saving_name(target, self.attempt)}"
        if self.store.exists(staging):  # a save of this step failed, and could not be cleared away then
            discard(self.store, staging)
        try:
            self.store.make_directory(staging, exist_ok=False)
        except OSError:
            discard(self.store, staging)
            raise
        return {"staging": staging, "target": target}

    def _refuse(self, failure: SaveFailed) -> Json:
        assert self._writer is not None
        self._writer.tell(failure)
        return {"refused": failure.message}

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _draft_manifest(self, draft: Draft, capture: Capture, plan: Plan) -> Manifest:
        self._sequence += 1
        if draft.best is not None:
            self._monitor = draft.best.monitor
        return Manifest(
            run_id=self.run_id,
            sequence=self._sequence,
            attempt=self.attempt,
            parent=self._parent,
            committed_at=0.0,
            progress=draft.progress,
            files={},
            tensors=plan.tensors,
            aliases=capture.aliases,
            state=capture.state,
            settings={**draft.settings, **({ATTACHED: list(self.attached)} if self.attached else {})},
            environment=draft.environment,
            metrics=draft.metrics,
            train_loss=draft.train_loss,
            best=draft.best,
            world_size=self.world.world_size,
            reason=draft.reason,
        )

    def poll(self) -> list[Event]:
        """What the writer has done since the last call; only the main rank's commits."""
        assert self._writer is not None
        events = self._writer.events()
        for event in events:
            if isinstance(event, Committed):
                self.failures = 0
                self.committed = event.manifest.progress
            elif isinstance(event, SaveFailed):
                self.failures += 1
                self._fatal = self._fatal or event.fatal
        return events

    @property
    def writing(self) -> Writing | None:
        """How far this rank is with the save in flight."""
        return self._writer.writing if self._writer is not None else None

    @property
    def must_end(self) -> bool:
        """Whether training cannot go on: see `require_healthy`."""
        return self._fatal is not None or self.failures > self.policy.max_failed_saves

    def require_healthy(self) -> None:
        """Raises RunInUseError or SaveFailedError when training must end; call it after the events were reported."""
        if self._fatal is not None:
            raise self._fatal
        if self.failures > self.policy.max_failed_saves:
            step = self.committed_step
            newest = f"The newest checkpoint is step {step}." if step >= 0 else "There is no checkpoint yet."
            raise SaveFailedError(
                f"{self.failures} saves failed in a row in {self.store.root} (max_failed_saves is "
                f"{self.policy.max_failed_saves}); training stops so that no more work is lost. {newest} "
                f"Free space or fix the directory, then run the same command again."
            )

    @property
    def is_lost(self) -> bool:
        """Whether a newer attempt owns the directory; only the main rank can tell."""
        return self._ownership is not None and not self._ownership.is_held()

    def wait(self) -> None:
        """Until the save in flight is committed or given up."""
        if self._writer is not None:
            self._writer.join(self.on_wait)

    def close(self, *, failed: bool = False) -> list[Event]:
        """Joins the writer, gives the directory and the memory back; returns the last events."""
        events: list[Event] = []
        if self._writer is not None:
            if failed:
                self._writer.hurry()
            self._writer.close()
            events = self.poll()
        if self._ownership is not None:
            self._ownership.release()
        if self._image is not None:
            self._image.close()
        self._writer = self._image = None
        return events

    # After a commit, in the writer's thread of the main rank

    def _after_commit(self, done: Committed) -> list[Event]:
        self._parent = done.manifest.digest
        return self._keeper.after_commit(done, self._monitor)
