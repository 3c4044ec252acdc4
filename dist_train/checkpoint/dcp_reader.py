"""A checkpoint of format 1, whoever wrote it, for `torch.distributed.checkpoint.load`.

    read_metadata (manifest, headers) -> prepare_local_plan (which files) -> prepare_global_plan (who verifies which)
        -> read_data (verify, then fill)

Invariant: `dcp.load` returns on no rank before every byte that any rank has used was proved to be what was committed.
Nothing is unpickled that a file holds. Source of the contract: torch/distributed/checkpoint/storage.py, filesystem.py.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.dcp_keys import Offer, name_of_fragment, offer_of, tensors_inside
from dist_train.checkpoint.dcp_writer import StorageWriter
from dist_train.checkpoint.manifest import CHECKPOINTS, Manifest
from dist_train.checkpoint.plain_values import write_saved
from dist_train.checkpoint.publication import Publication, rank_name
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import (
    ConfigError,
    CorruptCheckpointError,
    DisagreementError,
    DistTrainError,
    NoCheckpointError,
    StateMismatchError,
)
from dist_train.tree import decode

_CPU = torch.device("cpu")
_TELLS_WHY = "2.13"
"""Up to this version of torch `dcp.load` drops what `read_metadata` raises, and says "metadata is None"."""


class _Unread:
    """Stands for metadata that could not be read, where torch would not tell why: whoever uses it is told."""

    def __init__(self, error: DistTrainError) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


@dataclass(frozen=True, slots=True)
class _Opened:
    store: Store
    place: str
    """The checkpoint's folder in the store."""
    manifest: Manifest
    reader: CheckpointReader
    offer: Offer
    is_own: bool
    """Whether this rank wrote it without the others."""
    is_let_go: bool = False
    """Its files are mapped anew when they are asked for again."""

    @property
    def path(self) -> str:
        return str(self.store.path(self.place))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What travels with a load plan: the files that a rank reads; afterwards those that it has to verify."""

    digest: str
    """Of the manifest."""
    files: tuple[str, ...]
    is_own: bool


class StorageReader(dcp.StorageReader):
    """Reads checkpoints of format 1 for `torch.distributed.checkpoint.load`.

    It opens what `StorageWriter` wrote, and the checkpoint folders of a run: there the model is found under "model",
    the optimizer under "optimizer" in the form of `torch.distributed.checkpoint.state_dict`, and so on.

    Args:
        path: the checkpoint's folder; `checkpoint_id` of the call overrides it.
        verify: compare the digests of the files that are used, each rank a share, before `load` returns.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, verify: bool = True) -> None:
        self.verify = verify
        self._path = path or None
        self._load_id = uuid.uuid4().hex
        self._opened: _Opened | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, from this path where one is given."""
        self._close()
        self._path = checkpoint_id or self._path
        self._load_id = uuid.uuid4().hex

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the planners need, rebuilt from the manifest and the headers of the files.

        Args:
            kwargs: with `rank`, of the checkpoint that this rank wrote without the others.

        Raises:
            NoCheckpointError, CorruptCheckpointError: names what is missing or wrong.
        """
        self._close()
        try:
            return self._read_metadata(kwargs.get("rank"))
        except DistTrainError as error:
            if "rank" in kwargs and torch.__version__ < _TELLS_WHY:
                return cast(Metadata, _Unread(error))
            raise

    def _read_metadata(self, rank: int | None) -> Metadata:
        self._opened = opened = self._open(rank)
        offer = opened.offer
        table: dict[str, Any] = {key: self._describe(opened, key, name) for key, name in offer.tensors.items()}
        for name, one in offer.fragments.items():
            table[one.key].chunks.append(_chunk(one.offsets, opened.manifest.tensors[name].shape))
        table.update({key: BytesStorageMetadata() for key in offer.values})
        order = offer.planner_data if isinstance(offer.planner_data, dict) else {}
        table = {key: table[key] for key in (*order, *table) if key in table}  # as it was saved
        meta = StorageMeta(checkpoint_id=self.checkpoint_id, load_id=self._load_id)
        return Metadata(state_dict_metadata=table, planner_data=offer.planner_data, storage_data={}, storage_meta=meta)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if isinstance(metadata, _Unread):
            raise metadata.error
        if self._opened is None:
            raise ConfigError("StorageReader.read_metadata comes first, as in torch.distributed.checkpoint.load.")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self._wanted(plan))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Each file that anybody reads is verified once, by one of the ranks.

        Raises:
            DisagreementError: the ranks see different checkpoints under the path.
        """
        wanted = [plan.storage_data for plan in plans]
        if not all(isinstance(one, _Wanted) for one in wanted) or any(one.is_own for one in wanted):
            return plans
        if len({one.digest for one in wanted}) > 1:
            raise DisagreementError(
                f"The ranks see different checkpoints at {self._path}: either it was replaced while it was opened "
                f"(load again), or it does not lie in a directory that all nodes share."
            )
        sizes = {name: self._of_opened().manifest.files[name].size for one in wanted for name in one.files}
        shares = _spread(sizes, len(plans))
        return [
            replace(plan, storage_data=replace(one, files=share))
            for plan, one, share in zip(plans, wanted, shares, strict=True)
        ]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Verifies this rank's share, then fills what the planner asks for. The files are let go of afterwards."""
        wanted = plan.storage_data if isinstance(plan.storage_data, _Wanted) else self._wanted(plan)
        if self.verify:
            self._require_whole(wanted.files)
        opened = self._of_opened()
        try:
            for item in plan.items:
                if item.type is LoadItemType.BYTE_IO:
                    self._load_value(opened, item, planner)
                else:
                    _load_tensor(opened, item, planner)
        finally:  # a reader that somebody keeps must not keep the bytes of a checkpoint that is deleted meanwhile
            self._opened = replace(opened, is_let_go=True)
            opened.reader.close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """The path of the load."""
        return None if self._path is None else Path(self._path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path below a folder that can be written."""
        return StorageWriter.validate_checkpoint_id(checkpoint_id)

    def _open(self, rank: int | None) -> _Opened:
        if self._path is None:
            raise ConfigError(
                "No path to load from: give StorageReader(path), or checkpoint_id in the call of dcp.load."
            )
        publication = Publication(self._path)
        is_own = rank is not None and publication.store.is_directory(f"{publication.name}/{rank_name(rank)}")
        if is_own:
            publication = Publication(Path(self._path, rank_name(rank or 0)))
        store, place = publication.store, publication.locate()
        if place is None or not store.is_directory(place):
            raise NoCheckpointError(f"{publication.path}: there is no such folder, expected a checkpoint.")
        found = read_checkpoint(store, place)
        if found.manifest is None:
            raise _why_not(store, place, found.problem)
        _require_files(store, place, found.manifest)
        reader = CheckpointReader(store, place, found.manifest)
        return _Opened(store, place, found.manifest, reader, offer_of(found.manifest), is_own)

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.reader.close()

    def _of_opened(self) -> _Opened:
        opened = self._opened
        assert opened is not None, "read_metadata comes first"
        if opened.is_let_go:
            reader = CheckpointReader(opened.store, opened.place, opened.manifest)
            self._opened = opened = replace(opened, reader=reader, is_let_go=False)
        return opened

    def _describe(self, opened: _Opened, key: str, name: str) -> TensorStorageMetadata:
        shape, dtype = opened.reader.describe(name)
        declared = opened.offer.dtypes.get(key)
        fragment = opened.offer.fragments.get(name)
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=getattr(torch, declared) if declared else dtype),
            size=torch.Size(fragment.size if fragment else shape),
            chunks=[] if fragment else [_chunk(part.offsets, part.sizes) for _, part in opened.reader.parts(name)],
        )

    def _wanted(self, plan: LoadPlan) -> _Wanted:
        """The files that hold what a plan asks for."""
        opened = self._of_opened()
        files: set[str] = set()
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                names = tensors_inside(opened.offer.values[key])
                files.update(file for name in names for file, _ in opened.reader.parts(name))
            else:
                name, offsets = _box_of(opened, item)
                files.update(opened.reader.files_with(name, offsets, tuple(item.lengths)))
        return _Wanted(opened.manifest.digest, tuple(sorted(files)), opened.is_own)

    def _require_whole(self, files: Collection[str]) -> None:
        opened = self._of_opened()
        damages = verify_checkpoint(opened.store, opened.place, opened.manifest, files=files)
        if not damages:
            return
        now = read_checkpoint(opened.store, opened.place).manifest
        if now is not None and now.digest != opened.manifest.digest:
            raise CorruptCheckpointError(f"{opened.path} was replaced while it was loaded. Load again.", opened.path)
        raise CorruptCheckpointError(
            f"{opened.path} cannot be used: {'; '.join(map(str, damages))}. Load another checkpoint; what was filled "
            f"in so far is not to be trusted.",
            opened.path,
        )

    def _load_value(self, opened: _Opened, item: ReadItem, planner: LoadPlanner) -> None:
        json = opened.offer.values[item.storage_index.fqn]
        value = decode(json, lambda name, device: opened.reader.create(name, _CPU))
        planner.load_bytes(item, write_saved(value))


def _load_tensor(opened: _Opened, item: ReadItem, planner: LoadPlanner) -> None:
    name, offsets = _box_of(opened, item)
    target = planner.resolve_tensor(item).detach()
    if target.shape != item.lengths:
        raise StateMismatchError(
            f"{item.storage_index.fqn!r}: {list(item.lengths)} of {opened.path} go into {list(target.shape)} here.",
            opened.path,
        )
    opened.reader.fill_box(name, target, offsets, tuple(item.lengths))
    planner.commit_tensor(item, target)


def _box_of(opened: _Opened, item: ReadItem) -> tuple[str, tuple[int, ...]]:
    """The stored tensor that a read item means, and where in it the item's box begins."""
    index, inner = item.storage_index, tuple(item.storage_offsets)
    if opened.offer.fragments:
        name = name_of_fragment(index.fqn, index.offset or ())
        if name in opened.offer.fragments:
            return name, inner
    begin = tuple(index.offset) if index.offset is not None else (0,) * len(inner)
    return opened.offer.tensors[index.fqn], tuple(one + other for one, other in zip(begin, inner, strict=True))


def _chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


def _spread(sizes: dict[str, int], ranks: int) -> list[tuple[str, ...]]:
    """Greedy by bytes: the largest first, always to the rank that has least."""
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]  # type: tuple[list[int], list[list[str]]]
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return [tuple(share) for share in shares]


def _require_files(store: Store, place: str, manifest: Manifest) -> None:
    """Each file is there in its length; what is in it, the digests tell."""
    for name, entry in manifest.files.items():
        try:
            size = store.size(f"{place}/{name}")
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{store.path(place)}: {name} is missing.", str(store.path(place))) from None
        if size != entry.size:
            raise CorruptCheckpointError(
                f"{store.path(place)}: {name} is {size} bytes long, expected {entry.size}.", str(store.path(place))
            )


def _why_not(store: Store, place: str, problem: Exception | None) -> Exception:
    names = store.list(place)
    if CHECKPOINTS in names:
        return NoCheckpointError(
            f"{store.path(place)} is a run directory, expected one checkpoint: give a folder of its {CHECKPOINTS}/."
        )
    if ".metadata" in names:
        return NoCheckpointError(
            f"{store.path(place)} was written by torch's own FileSystemWriter; load it with FileSystemReader."
        )
    return problem or NoCheckpointError(f"{store.path(place)} holds no checkpoint.")
