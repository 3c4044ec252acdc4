"""Image -> disk behind training's back: shards and receipts on every rank, the commit on the main rank.

    write_shards (each rank) -> receipt through a mailbox -> commit (main rank) -> Committed or SaveFailed, an event

Invariant: `Committed` is told only after data, manifest, rename and directories are fsynced, and whatever goes wrong
leaves every older checkpoint whole. The thread does file I/O and mailbox calls only, never a collective.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dist_train import launched, phases
from dist_train.checkpoint.attached import AttachedFile
from dist_train.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST_NAME,
    METRICS_LOG,
    MODEL_INDEX,
    FileEntry,
    Manifest,
    parse_step_name,
)
from dist_train.checkpoint.ownership import Ownership
from dist_train.checkpoint.plan import Plan
from dist_train.checkpoint.snapshot import COPY_TIMEOUT_SECONDS, Image
from dist_train.checkpoint.store import Store, is_out_of_space
from dist_train.checkpoint.tensor_file import DTYPES
from dist_train.checkpoint.trash import discard
from dist_train.checkpoint.verify import RunningDigest, digest_bytes
from dist_train.errors import DeadlineError, DistTrainError, LauncherLostError, RunInUseError
from dist_train.phases import Point
from dist_train.world import Mailbox, World

logger = logging.getLogger(__name__)
Json = Any
RECEIPT_TIMEOUT_SECONDS = 1800.0
"""How long the main rank waits for the slowest rank's shards before it gives a save up."""
HURRY_SECONDS = 5.0
"""The same once training has failed here."""
CLOSE_SECONDS = 10.0
"""How long an idle thread may take to end."""
WAIT_SLICE_SECONDS = 0.25
_SLICE_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """One rank's part of one save."""

    serial: int
    """Number of the save within the attempt; equal on all ranks."""
    staging: str
    """Folder that is written into, relative to the store's root."""
    target: str
    """Folder name of the commit."""
    plan: Plan
    image: Image
    rank_state: Json
    attached: Mapping[str, AttachedFile] = field(default_factory=dict)
    """On the main rank: files that go along."""
    manifest: Manifest | None = None
    """On the main rank: everything but `files` and `rank_state`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint is durable."""

    path: str
    manifest: Manifest
    seconds: float
    """From the hand-over to the acknowledgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A save was given up; every older checkpoint is whole."""

    global_step: int
    message: str
    out_of_space: bool = False
    fatal: DistTrainError | None = None
    """Set when training must end: another attempt owns the directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A checkpoint was deleted by policy, after a newer commit."""

    path: str
    reason: str = ""
    num_bytes: int = 0
    """Freed; 0 where nobody measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripped:
    """A checkpoint became weights-only by policy."""

    path: str
    reason: str = ""
    num_bytes: int = 0
    """Freed."""


Event = Committed | SaveFailed | Pruned | Stripped


@dataclass(slots=True, kw_only=True)
class Writing:
    """How far a save in flight is on this rank; counted in the writer's thread, read in any."""

    global_step: int
    total: int
    """Bytes of this rank's files."""
    done: int = 0
    started: float

    def add(self, chunk: memoryview) -> None:
        self.done += len(chunk)


class Writer:
    """One background thread of one rank.

    Args:
        ownership: the main rank's hold on the directory, None on the others.
        after_commit: called in the thread with each commit; returns what it did (links, retention).
    """

    def __init__(
        self,
        store: Store,
        world: World,
        ownership: Ownership | None,
        after_commit: Callable[[Committed], list[Event]],
        *,
        receipt_timeout_seconds: float = RECEIPT_TIMEOUT_SECONDS,
    ) -> None:
        self._store = store
        self._world = world
        self._ownership = ownership
        self._after_commit = after_commit
        self._receipt_timeout = receipt_timeout_seconds
        self._hurry = threading.Event()
        self._mailbox: Mailbox = world.open_mailbox()
        self._jobs: queue.SimpleQueue[Callable[[], list[Event]] | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self.writing: Writing | None = None
        """The save in flight."""
        self._thread = threading.Thread(target=self._work, name="dist_train-writer", daemon=True)
        self._thread.start()

    def submit(self, job: SaveJob) -> None:
        """Hands one save over; the image must not be touched until `join`."""
        self.run(lambda: self._save(job))

    def run(self, work: Callable[[], list[Event]]) -> None:
        """Does something in the thread, in order with the saves."""
        self.join()
        self._idle.clear()
        self._jobs.put(work)

    def join(self, on_wait: Callable[[Writing | None], None] = lambda writing: None) -> None:
        """Waits until what was handed over is committed or given up.

        Args:
            on_wait: called now and then meanwhile.

        Raises:
            DeadlineError: the disk has not answered in all that time.
        """
        patience = 2 * self._receipt_timeout
        deadline = time.monotonic() + patience
        done = -1
        while not self._idle.wait(min(WAIT_SLICE_SECONDS, patience)):
            on_wait(writing := self.writing)
            if writing is not None and writing.done != done:
                done = writing.done
                phases.beat()
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"Rank {self._world.rank} waited {patience:.0f} s for a save in {self._store.root} to end, and it "
                    f"did not. The file system seems to hang; look at it, then run the same command again."
                )

    def tell(self, event: Event) -> None:
        """Adds an event of the main thread to the row."""
        self._events.put(event)

    def hurry(self) -> None:
        """Training has failed: finish what can be finished, but do not wait long for ranks that may be dead."""
        self._hurry.set()

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        seen = []
        with contextlib.suppress(queue.Empty):
            while True:
                seen.append(self._events.get_nowait())
        return seen

    def close(self) -> None:
        """Joins and ends the thread."""
        self.join()
        self._jobs.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                for event in job():
                    self._events.put(event)
            except Exception as error:  # nothing may kill the thread: whoever joins it would wait for ever
                self._events.put(SaveFailed(global_step=-1, message=f"{type(error).__name__}: {error}"))
            finally:
                self.writing = None
                self._idle.set()

    def _save(self, job: SaveJob) -> list[Event]:
        started = time.monotonic()
        step = parse_step_name(job.target)
        self.writing = writing = Writing(global_step=step or 0, total=job.plan.num_bytes, started=started)
        receipt = write_shards(self._store, job, writing.add)
        if job.manifest is None:
            return self._send(job, receipt)
        try:
            receipts = [receipt, *self._collect(job)]
            phases.reach(Point.BEFORE_COMMIT)
            manifest = commit(self._store, self._ownership, job, receipts)
            launched.note(committed_step=manifest.progress.global_step)  # whoever dies now has made progress
            phases.reach(Point.AFTER_COMMIT)
            done = Committed(path=f"{CHECKPOINTS}/{job.target}", manifest=manifest, seconds=time.monotonic() - started)
        except (OSError, DistTrainError) as error:
            discard(self._store, job.staging)
            fatal = error if isinstance(error, (RunInUseError, LauncherLostError)) else None
            full = is_out_of_space(error) or (isinstance(error, ShardError) and error.out_of_space)
            step = job.manifest.progress.global_step
            return [SaveFailed(global_step=step, message=describe_error(error), out_of_space=full, fatal=fatal)]
        self._events.put(done)  # told before retention, which may take long
        phases.reach(Point.RETENTION)
        try:
            return self._after_commit(done)
        except OSError as error:
            logger.warning("Links and retention after %s are left to the next commit: %s.", done.path, error)
            return []

    def _send(self, job: SaveJob, receipt: Json) -> list[Event]:
        try:
            self._mailbox.put(_receipt_key(job, self._world.rank), json.dumps(receipt).encode())
        except LauncherLostError as error:
            return [SaveFailed(global_step=-1, message=str(error), fatal=error)]
        return []

    def _collect(self, job: SaveJob) -> list[Json]:
        deadline = time.monotonic() + self._receipt_timeout
        keys = [_receipt_key(job, rank) for rank in range(1, self._world.world_size)]
        return [json.loads(self._take(key, deadline)) for key in keys]

    def _take(self, key: str, deadline: float) -> bytes:
        """In slices, since `hurry` may shorten the deadline meanwhile."""
        while True:
            try:
                return self._mailbox.take(key, min(_SLICE_SECONDS, max(deadline - time.monotonic(), 0.001)))
            except DeadlineError:
                if self._hurry.is_set():
                    deadline = min(deadline, time.monotonic() + HURRY_SECONDS)
                    self._hurry.clear()
                if time.monotonic() >= deadline:
                    raise


class ShardError(DistTrainError):
    """A rank could not write its shards."""

    def __init__(self, message: str, out_of_space: bool) -> None:
        super().__init__(message)
        self.out_of_space = out_of_space


def write_shards(store: Store, job: SaveJob, on_chunk: Callable[[memoryview], None] = lambda chunk: None) -> Json:
    """Writes and fsyncs this rank's files; the receipt says what was written or what went wrong."""
    files: dict[str, Json] = {}
    try:
        phases.reach(Point.WRITING)
        job.image.wait(COPY_TIMEOUT_SECONDS)
        for name in job.plan.files:
            entry = _write_file(store, f"{job.staging}/{name}", *job.image.file(name), on_chunk)
            files[name] = {"size": entry.size, "digest": entry.digest, "blocks": entry.blocks}
    except Exception as error:  # also what is none of ours: the main rank would wait for this rank's receipt in vain
        return {"error": describe_error(error), "out_of_space": is_out_of_space(error)}
    return {"files": files, "rank_state": job.rank_state}


def _write_file(
    store: Store, path: str, image: memoryview, length: int, on_chunk: Callable[[memoryview], None]
) -> FileEntry:
    def write(take: Callable[[memoryview], None]) -> None:
        def take_and_tell(chunk: memoryview) -> None:
            take(chunk)
            on_chunk(chunk)

        store.write_image(path, image, length, take_and_tell)

    return write_digested(store, path, write)


def write_digested(store: Store, path: str, write: Callable[[Callable[[memoryview], None]], None]) -> FileEntry:
    """Writes a file and returns what proves it.

    After a failed fsync the kernel may call the lost pages clean: never fsync again, write the file again.

    Args:
        write: writes and fsyncs the whole file, handing each chunk to what it is given; may be called twice.
    """
    for last in (False, True):
        digest = RunningDigest()
        try:
            write(digest.update)
            return digest.entry()
        except OSError as error:
            if last or error.errno != errno.EIO:
                raise
            store.unlink(path)
    raise AssertionError("unreachable")


def commit(store: Store, ownership: Ownership | None, job: SaveJob, receipts: list[Json]) -> Manifest:
    """Publishes a checkpoint whose shards are all durable: the manifest is written last, the rename makes it count."""
    files = _merge_receipts(job, receipts)
    _require_written(store, job, files)
    assert job.manifest is not None
    files |= _write_beside(store, job)
    states = [receipt["rank_state"] for receipt in receipts]
    manifest = replace(job.manifest, files=files, rank_state=states, committed_at=time.time())
    store.sync_file(METRICS_LOG)  # the history that the manifest counts on must survive what the manifest survives
    if ownership is not None:
        ownership.require_held()
    text = manifest.to_json()
    Manifest.from_json(text)  # what cannot be read back must not be acknowledged
    store.write_new(f"{job.staging}/{MANIFEST_NAME}", text.encode())
    store.sync_directory(job.staging)
    store.rename(job.staging, f"{CHECKPOINTS}/{job.target}")
    store.sync_directory(CHECKPOINTS)
    return manifest


def _merge_receipts(job: SaveJob, receipts: list[Json]) -> dict[str, FileEntry]:
    failed = [(rank, one) for rank, one in enumerate(receipts) if "error" in one]
    if failed:
        where = "; ".join(f"rank {rank}: {one['error']}" for rank, one in failed)
        raise ShardError(where, any(one["out_of_space"] for _, one in failed))
    return {name: FileEntry(**entry) for one in receipts for name, entry in one["files"].items()}


def _require_written(store: Store, job: SaveJob, files: Mapping[str, FileEntry]) -> None:
    for name, entry in files.items():
        size = store.size(f"{job.staging}/{name}")
        if size != entry.size:
            raise ShardError(f"{name} is {size} bytes long on the main rank, its writer wrote {entry.size}", False)


def _write_beside(store: Store, job: SaveJob) -> dict[str, FileEntry]:
    """The main rank's own files: the model's index, and what the user has go along."""
    entries: dict[str, FileEntry] = {}
    if index := _model_index(job):
        store.write_new(f"{job.staging}/{MODEL_INDEX}", index.encode())
        entries[MODEL_INDEX] = digest_bytes(index.encode())
    for name, file in job.attached.items():
        store.write_new(f"{job.staging}/{name}", file.data)
        entries[name] = file.entry
    return entries


def _model_index(job: SaveJob) -> str | None:
    """Hugging Face's index of the model's files, so that the folder loads elsewhere as it is."""
    if job.plan.weight_map is None:
        return None
    sizes = [entry for name, entry in job.plan.tensors.items() if name.startswith("model/")]
    total = sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in sizes)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": job.plan.weight_map}, indent=0, sort_keys=True)


def _receipt_key(job: SaveJob, rank: int) -> str:
    return f"receipt/{job.serial}/{rank} (rank {rank}'s shards of {job.target})"


def describe_error(error: BaseException) -> str:
    if is_out_of_space(error):
        path = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the device has no space left or a quota is exceeded{path}"
    return str(error) or type(error).__name__
