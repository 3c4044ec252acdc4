"""Which rank writes which bytes: a deterministic function that every rank computes alone.

Invariant: over all ranks every element of every tensor is written exactly once. Plain tensors are equal on all ranks
and are spread over them by bytes; a DTensor's parts are written where they lie, one replica of each. Copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_train.capture import Capture
from dist_train.checkpoint.manifest import TensorEntry, digest_of, shard_name
from dist_train.checkpoint.tensor_file import DTYPE_NAMES, FileLayout, Part, lay_out
from dist_train.errors import UnsaveableStateError

GROUPS = ("model", "optimizer", "state")
Signature = tuple[tuple[str, tuple[int, ...], torch.dtype, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One rank's share of a checkpoint, and the table of all tensors."""

    files: dict[str, FileLayout]
    """By file name; only files with tensors in them."""
    tensors: dict[str, TensorEntry]
    signature: Signature
    """The plan holds as long as this stays the same."""
    weight_map: dict[str, str] | None
    """The model's tensors -> their files, None where one of them is sharded."""

    @property
    def num_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self.files.values())

    @property
    def digest(self) -> str:
        """Equal on all ranks when their structures are."""
        return digest_of([[name, entry.shape, entry.dtype] for name, entry in sorted(self.tensors.items())])

    def written_elements(self) -> list[int]:
        """Elements of each tensor that this rank writes, in the table's order."""
        written = dict.fromkeys(self.tensors, 0)
        for layout in self.files.values():
            for part in layout.parts:
                written[part.name] += part.numel
        return list(written.values())


def signature_of(capture: Capture) -> Signature:
    """Names, shapes, dtypes and placements."""
    everything = [*capture.tensors.items(), *((f"~{name}", value) for name, value in capture.per_rank.items())]
    return tuple((name, tuple(value.shape), value.dtype, _placement(value)) for name, value in everything)


def make_plan(capture: Capture, rank: int, world_size: int) -> Plan:
    """Raises UnsaveableStateError, naming the tensor."""
    for name, tensor in [*capture.tensors.items(), *capture.per_rank.items()]:
        _require_plain_kind(name, tensor)
    owners = _assign_plain(capture, world_size)
    parts: list[Part] = []
    for index, (name, tensor) in enumerate(capture.tensors.items()):
        if isinstance(tensor, DTensor):
            parts += _shard_parts(name, tensor, index)
        elif owners[name] == rank:
            parts.append(_whole_part(name, tensor))
    parts += [_whole_part(own_name(name, rank), tensor) for name, tensor in capture.per_rank.items()]
    grouped = {group: [part for part in parts if group_of(part.name) == group] for group in GROUPS}
    files = {
        shard_name(group, rank, world_size): lay_out(group, members) for group, members in grouped.items() if members
    }
    return Plan(
        files=files,
        tensors=_table(capture, world_size),
        signature=signature_of(capture),
        weight_map=_weight_map(capture, owners, world_size),
    )


def own_name(name: str, rank: int) -> str:
    """Name of one rank's own value of a tensor that differs by rank."""
    return f"rank-{rank:05d}/{name}"


def group_of(name: str) -> str:
    """The file group of a tensor, from its name."""
    head = name.split("/", 1)[0]
    return head if head in GROUPS else "state"


def key_in_file(name: str) -> str:
    """A tensor's name inside its file: a model's are those of its state_dict, so that the file loads anywhere."""
    return name.split("/", 1)[1] if group_of(name) != "state" else name


def full_name(group: str, key: str) -> str:
    return key if group == "state" else f"{group}/{key}"


def _table(capture: Capture, world_size: int) -> dict[str, TensorEntry]:
    table = {name: _entry(tensor) for name, tensor in capture.tensors.items()}
    for name, tensor in capture.per_rank.items():
        table.update({own_name(name, rank): _entry(tensor) for rank in range(world_size)})
    return table


def _entry(tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(shape=list(tensor.shape), dtype=DTYPE_NAMES[tensor.dtype], order=_memory_order(tensor))


def _memory_order(tensor: torch.Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest; None for row-major (also where strides of size 1 differ)."""
    if isinstance(tensor, DTensor) or tensor.is_contiguous() or tensor.numel() == 0:
        return None
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _assign_plain(capture: Capture, world_size: int) -> dict[str, int]:
    """Greedy by bytes: the largest first, always to the rank that has least."""
    loads = [0] * world_size
    owners = dict.fromkeys(capture.main_only, 0)
    for name in capture.main_only:
        loads[0] += capture.tensors[name].nbytes
    spread: Mapping[str, torch.Tensor] = {
        name: tensor
        for name, tensor in capture.tensors.items()
        if name not in capture.main_only and not isinstance(tensor, DTensor)
    }
    for name in sorted(spread, key=lambda one: (-spread[one].nbytes, one)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += spread[name].nbytes
    return owners


def _weight_map(capture: Capture, owners: Mapping[str, int], world_size: int) -> dict[str, str] | None:
    model = [name for name in capture.tensors if group_of(name) == "model"]
    if not model or any(name not in owners for name in model):
        return None
    return {key_in_file(name): shard_name("model", owners[name], world_size) for name in model}


def _whole_part(name: str, tensor: torch.Tensor) -> Part:
    sizes = tuple(tensor.shape)
    dtype = DTYPE_NAMES[tensor.dtype]
    return Part(name=name, key=key_in_file(name), dtype=dtype, sizes=sizes, offsets=(0,) * len(sizes), whole=True)


def _shard_parts(name: str, tensor: DTensor, index: int) -> list[Part]:
    """The box of a DTensor that lies here, unless another replica of it is the one to be written."""
    if not _is_written_replica(tensor, index):
        return []
    (item,) = tensor.__create_write_items__(name, tensor)
    sizes, offsets = tuple(item.tensor_data.chunk.sizes), tuple(item.tensor_data.chunk.offsets)
    whole = sizes == tuple(tensor.shape)
    if math.prod(sizes) == 0 and not whole:
        return []
    key = key_in_file(name) if whole else f"{key_in_file(name)}@{','.join(map(str, offsets))}"
    return [Part(name=name, key=key, dtype=DTYPE_NAMES[tensor.dtype], sizes=sizes, offsets=offsets, whole=whole)]


def _is_written_replica(tensor: DTensor, index: int) -> bool:
    """One of the ranks that hold the same box; which one turns with the tensor's index, so that bytes spread."""
    mesh, place = tensor.device_mesh, 0
    replicas = 1
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return False
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            place = place * mesh.size(dim) + coordinate[dim]
            replicas *= mesh.size(dim)
    return place == index % replicas


def _require_plain_kind(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise UnsaveableStateError(
            f"{name} has dtype {tensor.dtype}, which safetensors cannot hold. It holds: {known}."
        )
    if isinstance(tensor, DTensor):
        odd = [p for p in tensor.placements if type(p) is not Shard and not isinstance(p, Replicate)]
        if odd:
            raise UnsaveableStateError(f"{name} is a DTensor placed {odd}; only Shard and Replicate can be saved.")
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise UnsaveableStateError(f"{name} is a tensor {kind}, which has no plain bytes to save.")
    elif type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UnsaveableStateError(
            f"{name} is a {type(tensor).__name__}, a kind of tensor whose bytes are not known to be all there is to it."
        )


def _placement(tensor: torch.Tensor) -> str:
    return f"{tensor.device_mesh}{tensor.placements}" if isinstance(tensor, DTensor) else str(_memory_order(tensor))
