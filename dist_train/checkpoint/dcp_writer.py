"""Format 1 for `torch.distributed.checkpoint.save` and `async_save`: durable, verified, all or nothing.

    prepare_global_plan (coordinator: the staging folder) -> write_data (each rank: its files, a receipt)
        -> finish (coordinator: receipts checked, manifest, rename)

Invariant: when `dcp.save` returns, the checkpoint is on the disk; whatever fails or dies before, the one that was there
is whole. No collective is called here: receipts travel in what torch gathers anyway.
Source of the contract: torch/distributed/checkpoint/storage.py, filesystem.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dist_train.checkpoint.dcp_keys import STATE, key_of
from dist_train.checkpoint.dcp_share import Receipt, Share
from dist_train.checkpoint.manifest import MANIFEST_NAME, MODEL_INDEX, FileEntry, Manifest, Progress, TensorEntry
from dist_train.checkpoint.plan import group_of, key_in_file
from dist_train.checkpoint.publication import REASON, Publication, rank_name
from dist_train.checkpoint.store import Store, is_out_of_space
from dist_train.checkpoint.tensor_file import DTYPES
from dist_train.checkpoint.verify import RunningDigest
from dist_train.checkpoint.writer import describe_error
from dist_train.environment import describe_environment
from dist_train.errors import ConfigError, StorageError, UnsaveableStateError
from dist_train.tree import encode

Json = Any
_ABSENT = ["optimizer", "scheduler", "scaler", "rng", "user"]
"""What a run that starts from such a checkpoint does not find where it looks for it."""
_TAKEN_AWAY = (FileExistsError, FileNotFoundError)
"""What a rank meets where its staging folder is gone, or is that of another save of the same path."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which files are a rank's; nothing of one save alone, since torch keeps plans for the saves that follow."""

    rank: int
    world_size: int


@dataclass(slots=True)
class _Save:
    """One save; torch makes all calls of one in one thread, and an `async_save` may overlap with others."""

    path: str | os.PathLike[str] | None
    save_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_set_up: bool = False
    rank: int | None = None
    use_collectives: bool = True
    publication: Publication | None = None
    """On the coordinator, between `prepare_global_plan` and `finish`."""
    before: Manifest | None = None


class StorageWriter(dcp.StorageWriter, BlockingAsyncStager):
    """Writes checkpoints of format 1 for `torch.distributed.checkpoint.save` and `async_save`.

    A checkpoint appears under its path as a whole, durable when `save` returns, or not at all; a failed or killed save
    leaves the one that was there. No pickle is written: tensors lie in safetensors, all other values in JSON, and what
    that cannot hold is refused by name. One writer serves any number of saves, one at a time.

    Args:
        path: the folder to be; `checkpoint_id` of the call overrides it.
        overwrite: replace the checkpoint that is there under the path; it is gone when the new one is durable.
        cache_staged_state_dict: `async_save` keeps its copy in memory for the next save, which is faster.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = True,
        cache_staged_state_dict: bool = False,
    ) -> None:
        BlockingAsyncStager.__init__(self, cache_staged_state_dict=cache_staged_state_dict)
        self.overwrite = overwrite
        self._path = path or None
        self._latest = _Save(self._path)
        self._of_thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """For a save in another process: without the copy of the state that `async_save` keeps in this one."""
        return {**self.__dict__, "state_dict_cache": None, "_latest": _Save(self._path), "_of_thread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._of_thread = threading.local()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, of this path where one is given."""
        self._path = checkpoint_id or self._path
        self._of_thread.save = self._latest = _Save(self._path)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on every rank, with `rank` and `use_collectives` by newer versions of torch."""
        save = self._save
        if save.is_set_up:
            save = _Save(self._path)
        save.is_set_up = True
        save.rank = kwargs.get("rank")
        save.use_collectives = kwargs.get("use_collectives", True)
        self._of_thread.save = self._latest = save

    @property
    def _save(self) -> _Save:
        """This thread's, else the latest: a caller of its own kind may spread one save over threads."""
        return getattr(self._of_thread, "save", self._latest)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the staging folder: no rank writes before every rank has its plan back."""
        save, publication = self._save, self._new_publication()
        self._require_one_kind()
        save.before = publication.require_replaceable(overwrite=self.overwrite)
        with self._told("could not be begun"):
            publication.begin()
        save.publication = publication
        return [replace(plan, storage_data=Seat(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes and fsyncs this rank's files; the first result carries the receipt."""
        seat = plan.storage_data
        if not isinstance(seat, Seat):
            raise ConfigError(
                f"The plan of this save was made for another storage writer ({type(seat).__name__}). A planner with "
                f"enable_plan_caching serves one kind of writer in a process: use another planner class for each."
            )
        publication = self._new_publication()
        share = Share(planner, seat.rank, seat.world_size)
        try:
            sizes = share.add(plan.items)
            with self._told(f"failed on rank {seat.rank}"):
                if self._save.publication is not None:
                    self._save.publication.require_begun()
                receipt = share.write(publication.store, publication.staging)
        except BaseException as error:
            if not isinstance(error.__cause__, _TAKEN_AWAY):
                publication.discard(publication.staging)
                raise
            receipt = Receipt(is_lost=True)  # the folder is another save's, and stays; or another rank tells why
        carried = [receipt, *[None] * (len(sizes) - 1)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [
                WriteResult(index=item.index, size_in_bytes=size, storage_data=data)
                for item, size, data in zip(plan.items, sizes, carried, strict=False)
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publishes the checkpoint; the old one is gone then."""
        save = self._save
        publication, save.publication = save.publication, None
        assert publication is not None
        receipts = [one[0].storage_data for one in results if one]
        with self._told("could not be committed"):
            if any(one.is_lost for one in receipts):
                raise publication.overtaken()
            sealed = publication.seal()
            try:
                manifest = self._manifest(metadata, receipts, len(results))
                _complete(publication.store, sealed, manifest, receipts)
            except BaseException:
                publication.discard(sealed)
                raise
            publication.publish(sealed)
        metadata.storage_meta = self.storage_meta()

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save.save_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """The path of the save."""
        path = self._save.path
        return None if path is None else Path(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path below a folder that can be written."""
        if isinstance(checkpoint_id, Path):
            return True
        parents = Path(checkpoint_id).parents
        return "://" not in str(checkpoint_id) and any(one.exists() and os.access(one, os.W_OK) for one in parents)

    def _new_publication(self) -> Publication:
        path = self._save.path
        if path is None:
            raise ConfigError("No path to save to: give StorageWriter(path), or checkpoint_id in the call of dcp.save.")
        if not isinstance(path, Path) and "://" in str(path):
            raise ConfigError(f"{path} is an address, expected the path of a folder on a mounted file system.")
        return Publication(path if self._save.use_collectives else Path(path, rank_name(self._save.rank or 0)), Store)

    def _require_one_kind(self) -> None:
        path = self._save.path
        if not self._save.use_collectives and (Path(str(path)) / MANIFEST_NAME).exists():
            raise ConfigError(
                f"{path} is a checkpoint that all ranks wrote together, and use_collectives=False lets each "
                f"write one of its own, which cannot replace it at once. It was left as it is; give another path."
            )

    @contextlib.contextmanager
    def _told(self, what: str) -> Any:
        """An error of the file system says which checkpoint it hit, and what has become of the one before."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            help_by = "Free space or raise the quota" if is_out_of_space(error) else "Look at the file system"
            raise StorageError(
                f"The save of {self._save.path} {what}: {describe_error(error)}. Nothing was published: a checkpoint "
                f"that was there before is as it was. {help_by}, then save again."
            ) from error

    def _manifest(self, metadata: Metadata, receipts: list[Receipt], world_size: int) -> Manifest:
        """Raises UnsaveableStateError: the planner's data is no plain value, or what was written is not whole."""
        tensors = _require_whole(metadata, receipts)
        before = self._save.before
        return Manifest(
            run_id=before.run_id if before else uuid.uuid4().hex,
            sequence=before.sequence + 1 if before else 1,
            attempt=1,
            parent=before.digest if before else None,
            committed_at=time.time(),
            progress=Progress(),
            files={name: entry for one in receipts for name, entry in one.files.items()},
            tensors=tensors,
            state={STATE: _kept(metadata, receipts, tensors)},
            rank_state=[{} for _ in range(world_size)],
            settings={"absent": list(_ABSENT)},
            environment=describe_environment(world_size, torch.device("cpu")),
            world_size=world_size,
            reason=REASON,
        )


def _kept(metadata: Metadata, receipts: list[Receipt], tensors: Mapping[str, TensorEntry]) -> dict[str, Json]:
    """What torch's planners need of a checkpoint besides its tensors."""
    inner: dict[str, torch.Tensor] = {}
    planner_data = encode(metadata.planner_data, "planner_data", inner)
    if inner:
        raise UnsaveableStateError(
            f"The planner's own data holds tensors ({', '.join(list(inner)[:3])}); it may hold plain values. Put them "
            f"into the dictionary that is saved."
        )
    fragments = {name: fragment for one in receipts for name, fragment in one.fragments.items()}
    actual = {
        fragments[name].key if name in fragments else key_of(name): entry.dtype for name, entry in tensors.items()
    }
    declared = {
        key: value.properties.dtype
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata) and key in actual and value.properties.dtype != DTYPES[actual[key]]
    }
    return {
        "values": {key: value for one in receipts for key, value in one.values.items()},
        "planner_data": planner_data,
        "fragments": {name: asdict(one) for name, one in fragments.items()},
        "dtypes": {key: str(dtype).removeprefix("torch.") for key, dtype in declared.items()},
    }


def _require_whole(metadata: Metadata, receipts: list[Receipt]) -> dict[str, TensorEntry]:
    """What is acknowledged can be loaded: every key was written, every element of every tensor once, in one dtype.

    Returns:
        the tensors by their stored names, as those ranks have them that hold something of them.
    """
    missing = metadata.state_dict_metadata.keys() - {key for one in receipts for key in one.keys}
    if missing:
        raise UnsaveableStateError(f"The planner announced {sorted(missing)[:3]} and no rank was given them to write.")
    tensors: dict[str, TensorEntry] = {}
    written: dict[str, int] = {}
    for rank, receipt in enumerate(receipts):
        for name, entry in receipt.tensors.items():
            if not written.get(name) and receipt.written.get(name):
                tensors[name] = entry
            elif tensors.setdefault(name, entry) != entry and receipt.written.get(name):
                raise UnsaveableStateError(
                    f"{key_of(name)!r} is {entry.shape} {entry.dtype} on rank {rank} and {tensors[name].shape} "
                    f"{tensors[name].dtype} on an earlier one; all ranks must hold one tensor."
                )
            written[name] = written.get(name, 0) + receipt.written.get(name, 0)
    for name, entry in tensors.items():
        if written[name] != math.prod(entry.shape):
            raise UnsaveableStateError(
                f"{key_of(name)!r}: the ranks wrote {written[name]} elements, expected the {math.prod(entry.shape)} of "
                f"{entry.shape}, each once. Either not all ranks that hold a part of it took part in the save, or the "
                f"planner gave the same part to several."
            )
    return tensors


def _complete(store: Store, sealed: str, manifest: Manifest, receipts: list[Receipt]) -> None:
    """Every data file is durable; the manifest is written last, and then the folder is durable as a whole."""
    for name, entry in manifest.files.items():
        size = store.size(f"{sealed}/{name}")
        if size != entry.size:
            raise StorageError(f"{name} is {size} bytes long on the coordinator, its writer wrote {entry.size}.")
    files = dict(manifest.files)
    if index := _model_index(manifest, receipts):
        store.write_new(f"{sealed}/{MODEL_INDEX}", index)
        files[MODEL_INDEX] = _entry_of(index)
    text = replace(manifest, files=files).to_json()
    Manifest.from_json(text)  # what cannot be read back must not be acknowledged
    store.write_new(f"{sealed}/{MANIFEST_NAME}", text.encode())
    store.sync_directory(sealed)


def _model_index(manifest: Manifest, receipts: list[Receipt]) -> bytes | None:
    """Hugging Face's index, where every tensor of the model is whole."""
    places: Mapping[str, str] = {name: file for one in receipts for name, file in one.places.items()}
    model = {name: entry for name, entry in manifest.tensors.items() if group_of(name) == "model"}
    if not model or not places.keys() >= model.keys():
        return None
    total = sum(math.prod(entry.shape) * DTYPES[entry.dtype].itemsize for entry in model.values())
    weight_map = {key_in_file(name): places[name] for name in sorted(model)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=0).encode()


def _entry_of(data: bytes) -> FileEntry:
    digest = RunningDigest()
    digest.update(memoryview(data))
    return digest.entry()
