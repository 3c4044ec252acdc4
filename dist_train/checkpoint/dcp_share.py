"""One rank's part of a `dcp.save`: the planner's write items -> safetensors files, streamed, and a receipt.

Invariant: no more than one chunk is in memory besides what the planner holds, and of a tensor that is not row-major a
block of rows. The planner is asked for each item once, when its bytes are due; but where it hands over another dtype
than it has announced, for all of them once more: the dtype in a file is that of the data.
"""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dist_train.checkpoint.dcp_keys import Fragment, key_of, name_of, name_of_fragment, place_of_value, take_out_bytes
from dist_train.checkpoint.manifest import FileEntry, TensorEntry, shard_name
from dist_train.checkpoint.plain_values import read_saved, unsaveable
from dist_train.checkpoint.plan import group_of, key_in_file
from dist_train.checkpoint.store import CHUNK_BYTES, Store
from dist_train.checkpoint.tensor_file import DTYPE_NAMES, FileLayout, Part, lay_out
from dist_train.checkpoint.writer import write_digested
from dist_train.errors import UnsaveableStateError
from dist_train.tree import encode

Json = Any
_BLOCK_BYTES = 1 << 20
Source = Callable[[], Any]
"""Gives a tensor's data once more."""


@dataclass(slots=True, kw_only=True)
class Receipt:
    """What one rank wrote, for the coordinator."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    """By stored name; the whole tensor, also where this rank has no element of it."""
    written: dict[str, int] = field(default_factory=dict)
    """Stored name -> elements in these files."""
    places: dict[str, str] = field(default_factory=dict)
    """Stored name of a tensor that is whole -> its file."""
    values: dict[str, Json] = field(default_factory=dict)
    """Key -> nested value."""
    fragments: dict[str, Fragment] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    is_lost: bool = False
    """Nothing was written: there was no folder for it any more."""


class Share:
    """Collects what the items want to be written, then writes it.

    Args:
        rank: of those that take part, from 0; numbers the files.
        world_size: how many take part; where it is one, what is not whole here is not whole at all.
    """

    def __init__(self, planner: SavePlanner, rank: int, world_size: int) -> None:
        self._planner = planner
        self._rank = rank
        self._world_size = world_size
        self._parts: dict[tuple[str, tuple[int, ...]], tuple[Part, Source]] = {}
        self.receipt = Receipt()

    def add(self, items: Sequence[WriteItem]) -> list[int]:
        """Returns the bytes of each item.

        Raises:
            UnsaveableStateError: names the key.
        """
        parted = _keys_in_parts(items) if self._world_size == 1 else set()
        return [self._add(item, item.index.fqn in parted) for item in items]

    def write(self, store: Store, folder: str) -> Receipt:
        """Writes and fsyncs the files.

        Raises:
            UnsaveableStateError: names the key.
        """
        try:
            return self._write(store, folder)
        except _AnotherDtypeError:
            self._take_dtypes_of_data()
            for group in self._groups():
                store.unlink(f"{folder}/{shard_name(group, self._rank, self._world_size)}")
            return self._write(store, folder)

    def _write(self, store: Store, folder: str) -> Receipt:
        for group, members in self._groups().items():
            name = shard_name(group, self._rank, self._world_size)
            self.receipt.files[name] = _write_file(store, f"{folder}/{name}", group, members)
            self.receipt.places.update({part.name: name for part, _ in members if part.whole})
        return self.receipt

    def _groups(self) -> dict[str, list[tuple[Part, Source]]]:
        groups: dict[str, list[tuple[Part, Source]]] = {}
        for part, source in self._parts.values():
            groups.setdefault(group_of(part.name), []).append((part, source))
        return groups

    def _take_dtypes_of_data(self) -> None:
        for place, (part, source) in self._parts.items():
            kind = DTYPE_NAMES[_checked(source(), part).dtype]
            self._parts[place] = replace(part, dtype=kind), source
            self.receipt.tensors[part.name] = replace(self.receipt.tensors[part.name], dtype=kind)

    def _add(self, item: WriteItem, is_in_parts: bool) -> int:
        key = item.index.fqn
        self.receipt.keys.add(key)
        if item.type is WriteItemType.BYTE_IO:
            return self._add_value(key, self._planner.resolve_data(item))
        if item.tensor_data is None:
            raise UnsaveableStateError(f"{key!r}: the planner announced a tensor without saying which.")
        announced = item.tensor_data.properties
        require_bytes(key, announced.dtype, announced.layout)
        chunk, size = item.tensor_data.chunk, tuple(item.tensor_data.size)
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        name = name_of(key)
        if is_in_parts:
            name = name_of_fragment(key, offsets)
            self.receipt.fragments[name] = Fragment(key=key, offsets=list(offsets), size=list(size))
            offsets, size = (0,) * len(sizes), sizes
        return self._add_part(name, announced.dtype, size, offsets, sizes, partial(self._planner.resolve_data, item))

    def _add_value(self, key: str, data: Any) -> int:
        if not isinstance(data, io.BytesIO):
            raise UnsaveableStateError(f"{key!r}: the planner announced bytes and gave a {type(data).__name__}.")
        inner: dict[str, torch.Tensor] = {}
        value = read_saved(data, key)
        place = place_of_value(key)
        try:
            self.receipt.values[key] = take_out_bytes(encode(value, place, inner), place, inner)
        except UnsaveableStateError as error:
            raise UnsaveableStateError(unsaveable(key, _what_was_refused(error))) from error
        for name, tensor in inner.items():
            require_plain_kind(key, tensor)
            sizes = tuple(tensor.shape)
            self._add_part(name, tensor.dtype, sizes, (0,) * len(sizes), sizes, partial(_same, tensor))
        return data.getbuffer().nbytes

    def _add_part(
        self,
        name: str,
        dtype: torch.dtype,
        size: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        source: Source,
    ) -> int:
        whole, kind = sizes == size, DTYPE_NAMES[dtype]
        self.receipt.tensors[name] = TensorEntry(shape=list(size), dtype=kind)
        if not whole and not math.prod(sizes):
            return 0
        key = key_in_file(name) if whole else f"{key_in_file(name)}@{','.join(map(str, offsets))}"
        part = Part(name=name, key=key, dtype=kind, sizes=sizes, offsets=offsets, whole=whole)
        if (name, offsets) in self._parts:
            raise UnsaveableStateError(
                f"{key_of(name)!r}: the planner wants the part at {list(offsets)} written twice."
            )
        self._parts[name, offsets] = part, source
        self.receipt.written[name] = self.receipt.written.get(name, 0) + part.numel
        return part.num_bytes


def require_plain_kind(key: str, tensor: torch.Tensor) -> None:
    """Raises UnsaveableStateError for a tensor whose bytes are not known to be all there is to it."""
    if tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else "that is quantized"
    elif isinstance(tensor, DTensor):
        kind = "that is a DTensor inside of another value"
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        kind = f"of the class {type(tensor).__name__}"
    else:
        return require_bytes(key, tensor.dtype, tensor.layout)
    raise UnsaveableStateError(unsaveable(key, f"a tensor {kind}"))


def require_bytes(key: str, dtype: torch.dtype, layout: torch.layout) -> None:
    """Raises UnsaveableStateError for what safetensors has no bytes for."""
    if layout != torch.strided:
        raise UnsaveableStateError(unsaveable(key, f"a tensor of layout {layout}"))
    if dtype not in DTYPE_NAMES:
        raise UnsaveableStateError(unsaveable(key, f"a tensor of dtype {dtype}, which safetensors does not know"))


def _keys_in_parts(items: Sequence[WriteItem]) -> set[str]:
    """Keys of tensors of which the items do not have all elements."""
    missing: dict[str, int] = {}
    for item in items:
        if item.tensor_data is not None:
            whole = math.prod(item.tensor_data.size)
            missing[item.index.fqn] = missing.get(item.index.fqn, whole) - math.prod(item.tensor_data.chunk.sizes)
    return {key for key, count in missing.items() if count}


def _what_was_refused(error: UnsaveableStateError) -> str:
    """`PLACE holds a KIND, which ...` -> `a KIND`."""
    return str(error).partition(" holds ")[2].partition(", which")[0] or str(error)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _write_file(store: Store, path: str, group: str, members: Sequence[tuple[Part, Source]]) -> FileEntry:
    taken = {part.key for part, _ in members if part.whole}
    sources: dict[str, Source] = {}
    parts: list[Part] = []
    for part, source in members:
        key = part.key
        while not part.whole and key in taken:  # a whole tensor has that very name
            key += "~"
        taken.add(key)
        parts.append(replace(part, key=key))
        sources[key] = source
    layout = lay_out(group, parts)
    return write_digested(store, path, lambda take: store.write_chunks(path, _chunks(layout, sources), take))


def _chunks(layout: FileLayout, sources: Mapping[str, Source]) -> Iterator[tuple[memoryview, int]]:
    """A file's bytes through one page-aligned buffer."""
    memory = mmap.mmap(-1, CHUNK_BYTES)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    filled = 0
    for piece in _pieces(layout, sources):
        taken = 0
        while taken < piece.numel():
            count = min(piece.numel() - taken, CHUNK_BYTES - filled)
            buffer[filled : filled + count].copy_(piece[taken : taken + count])
            taken, filled = taken + count, filled + count
            if filled == CHUNK_BYTES:
                yield memoryview(memory), filled
                filled = 0
    if filled:
        yield memoryview(memory), filled


class _AnotherDtypeError(Exception):
    """The planner's data are of another dtype than it had announced, and the header is wrong."""


def _pieces(layout: FileLayout, sources: Mapping[str, Source]) -> Iterator[torch.Tensor]:
    """Flat bytes, in the file's order, wherever they lie."""
    yield torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
    for part in layout.parts:
        if part.numel:
            tensor = _checked(sources[part.key](), part)
            if DTYPE_NAMES[tensor.dtype] != part.dtype:
                raise _AnotherDtypeError
            yield from _rows(tensor)


def _checked(data: Any, part: Part) -> torch.Tensor:
    """What the planner has handed over, if it is what it had announced but for its dtype."""
    key = key_of(part.name).removeprefix("~fragments/")
    if not isinstance(data, torch.Tensor):
        raise UnsaveableStateError(f"{key!r}: the planner announced a tensor and gave a {type(data).__name__}.")
    require_plain_kind(key, data)
    if tuple(data.shape) != part.sizes:
        raise UnsaveableStateError(
            f"{key!r}: the planner announced a part of shape {list(part.sizes)} and gave one of {list(data.shape)}."
        )
    return data.detach()


def _rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Row-major bytes; of a tensor that is laid out otherwise never more than a block is copied at a time."""
    if tensor.is_contiguous() or tensor.nbytes <= _BLOCK_BYTES:
        yield tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return
    rows = _BLOCK_BYTES // (tensor.nbytes // tensor.shape[0])
    for block in tensor.split(rows) if rows else tensor.unbind():
        yield from _rows(block)
