"""Which rank writes which bytes: a deterministic function that every rank computes alone.

Invariant: over all ranks every element of every tensor is written exactly once. What every rank holds whole is spread
over them by bytes; the boxes of a sharded tensor are written where they lie, one replica of each. Copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from dist_train.capture import Capture
from dist_train.checkpoint.boxes import boxes_of, is_sharded, local_part
from dist_train.checkpoint.manifest import TensorEntry, digest_of, shard_name
from dist_train.checkpoint.survey import Survey
from dist_train.checkpoint.tensor_file import DTYPE_NAMES, FileLayout, Part, lay_out
from dist_train.errors import UnsaveableStateError

GROUPS = ("model", "optimizer", "state")
ALONE = Survey()
PLACES = (1 << 31) - 1
"""A prime: the sums of places of all ranks stay far below 64 bits, and a wrong one has a chance of one in two thousand
million to look right.
"""
Signature = tuple[tuple[str, tuple[int, ...], torch.dtype, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One rank's share of a checkpoint, and the table of all tensors."""

    files: dict[str, FileLayout]
    """By file name; only files with tensors in them."""
    tensors: dict[str, TensorEntry]
    signature: Signature
    """The plan holds as long as this stays the same."""
    in_parts: frozenset[str] = frozenset()
    """Names of what no rank, or not every rank, holds whole."""
    weight_map: dict[str, str] | None
    """The model's tensors -> their files, None where one of them is sharded."""

    @property
    def num_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self.files.values())

    @property
    def digest(self) -> str:
        """Equal on all ranks when their structures are."""
        return digest_of(sorted(self.described().items()))

    def described(self) -> dict[str, list[object]]:
        """What the ranks must have in common of each tensor: its shape, its dtype, and whether all hold all of it."""
        parts = self.in_parts
        return {name: [one.shape, one.dtype, name not in parts] for name, one in self.tensors.items()}

    def written(self) -> list[int]:
        """Two numbers for each tensor, in the table's order: how many of its elements this rank writes, and the sum of
        their places in it, modulo `PLACES`.
        """
        counts = dict.fromkeys(self.tensors, 0)
        places = dict.fromkeys(self.tensors, 0)
        for layout in self.files.values():
            for part in layout.parts:
                counts[part.name] += part.numel
                places[part.name] += _sum_of_places(self.tensors[part.name].shape, part.offsets, part.sizes)
        return [number for name in self.tensors for number in (counts[name], places[name] % PLACES)]

    def to_be_written(self) -> list[int]:
        """What `written` comes to over all ranks where each element is written once."""
        shapes = [entry.shape for entry in self.tensors.values()]
        sums = [_sum_of_places(shape, [0] * len(shape), shape) % PLACES for shape in shapes]
        return [number for shape, places in zip(shapes, sums, strict=True) for number in (math.prod(shape), places)]


def _sum_of_places(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """Of the elements of a box, counted in the whole tensor's row-major order."""
    twice, stride = 0, 1
    for length, offset, size in zip(reversed(shape), reversed(offsets), reversed(sizes), strict=True):
        twice += stride * (2 * offset + size - 1)
        stride *= length
    return math.prod(sizes) * twice // 2


def signature_of(capture: Capture) -> Signature:
    """Names, shapes, dtypes and placements."""
    everything = [*capture.tensors.items(), *((f"~{name}", value) for name, value in capture.per_rank.items())]
    return tuple((name, tuple(value.shape), value.dtype, _placement(value)) for name, value in everything)


def make_plan(capture: Capture, rank: int, world_size: int, survey: Survey = ALONE) -> Plan:
    """Raises UnsaveableStateError, naming the tensor."""
    for name, tensor in [*capture.tensors.items(), *capture.per_rank.items()]:
        _require_plain_kind(name, tensor)
    spread = {name for name, tensor in capture.tensors.items() if _is_everywhere(tensor, world_size, survey)}
    owners = _assign_whole(capture, spread, world_size)
    shares = _Shares(survey)
    parts: list[Part] = []
    for name, tensor in capture.tensors.items():
        if name in spread:
            parts += [_whole_part(name, tensor)] if owners[name] == rank else []
        else:
            assert isinstance(tensor, DTensor)
            boxes = _box_parts(name, tensor)
            parts += boxes if shares.is_mine(tensor) else []
    parts += [_whole_part(own_name(name, rank), tensor) for name, tensor in capture.per_rank.items()]
    grouped = {group: [part for part in parts if group_of(part.name) == group] for group in GROUPS}
    files = {
        shard_name(group, rank, world_size): lay_out(group, members) for group, members in grouped.items() if members
    }
    return Plan(
        files=files,
        tensors=_table(capture, world_size, survey),
        signature=signature_of(capture),
        in_parts=frozenset(capture.tensors.keys() - spread),
        weight_map=_weight_map(capture, owners, world_size),
    )


def own_name(name: str, rank: int) -> str:
    """Name of one rank's own value of a tensor that differs by rank; an optimizer's stays among the optimizer's."""
    group, _, rest = name.partition("/")
    return f"optimizer/~rank-{rank:05d}/{rest}" if group == "optimizer" else f"rank-{rank:05d}/{name}"


def group_of(name: str) -> str:
    """The file group of a tensor, from its name."""
    head = name.split("/", 1)[0]
    return head if head in GROUPS else "state"


def key_in_file(name: str) -> str:
    """A tensor's name inside its file: a model's are those of its state_dict, so that the file loads anywhere."""
    return name.split("/", 1)[1] if group_of(name) != "state" else name


def full_name(group: str, key: str) -> str:
    return key if group == "state" else f"{group}/{key}"


def _table(capture: Capture, world_size: int, survey: Survey) -> dict[str, TensorEntry]:
    table = {name: _entry(tensor) for name, tensor in capture.tensors.items()}
    for name, tensor in capture.per_rank.items():
        alike = [[list(tensor.shape), DTYPE_NAMES[tensor.dtype]]] * world_size
        for rank, (shape, dtype) in enumerate(survey.apart.get(name, alike)):
            order = None if name in survey.apart else _memory_order(tensor)
            table[own_name(name, rank)] = TensorEntry(shape=shape, dtype=dtype, order=order)
    return table


def _entry(tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(shape=list(tensor.shape), dtype=DTYPE_NAMES[tensor.dtype], order=_memory_order(tensor))


def _memory_order(tensor: torch.Tensor) -> list[int] | None:
    """Dimensions from the slowest to the fastest; None for row-major (also where strides of size 1 differ)."""
    if isinstance(tensor, DTensor) or tensor.is_contiguous() or tensor.numel() == 0:
        return None
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def _is_everywhere(tensor: torch.Tensor, world_size: int, survey: Survey) -> bool:
    """Whether every rank holds all of it; and what has no elements counts as that."""
    if not isinstance(tensor, DTensor) or tensor.numel() == 0:
        return True
    _, copies = survey.copies.get(tensor.device_mesh, (0, 1))
    return not is_sharded(tensor) and tensor.device_mesh.size() * copies == world_size


def _assign_whole(capture: Capture, spread: Set[str], world_size: int) -> dict[str, int]:
    """Greedy by bytes: the largest first, always to the rank that has least."""
    loads = [0] * world_size
    owners = dict.fromkeys(capture.main_only, 0)
    for name in capture.main_only:
        loads[0] += capture.tensors[name].nbytes
    for name in sorted(spread - owners.keys(), key=lambda one: (-capture.tensors[one].nbytes, one)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += capture.tensors[name].nbytes
    return owners


class _Shares:
    """Which of the ranks that hold the same boxes writes them: the one that has least so far.

    Every rank asks for all tensors in the same order, so that all come to the same answer; replicas are the ranks of a
    mesh that differ in replicating dimensions only, and those at the same place of its copies.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._loads: dict[tuple[int, tuple[bool, ...]], list[int]] = {}
        self._meshes: dict[DeviceMesh, int] = {}

    def is_mine(self, tensor: DTensor) -> bool:
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        place, count = self._survey.copies.get(mesh, (0, 1))
        replicating = tuple(isinstance(placement, Replicate) for placement in tensor.placements)
        for dim in (dim for dim, replicates in enumerate(replicating) if replicates):
            place = place * mesh.size(dim) + (coordinate[dim] if coordinate else 0)
            count *= mesh.size(dim)
        key = (self._meshes.setdefault(mesh, len(self._meshes)), replicating)
        loads = self._loads.setdefault(key, [0] * count)
        chosen = loads.index(min(loads))
        loads[chosen] += tensor.numel() * tensor.dtype.itemsize
        return coordinate is not None and chosen == place


def _weight_map(capture: Capture, owners: Mapping[str, int], world_size: int) -> dict[str, str] | None:
    model = [name for name in capture.tensors if group_of(name) == "model"]
    if not model or any(name not in owners for name in model):
        return None
    return {key_in_file(name): shard_name("model", owners[name], world_size) for name in model}


def _whole_part(name: str, tensor: torch.Tensor) -> Part:
    sizes = tuple(tensor.shape)
    dtype = DTYPE_NAMES[tensor.dtype]
    return Part(name=name, key=key_in_file(name), dtype=dtype, sizes=sizes, offsets=(0,) * len(sizes), whole=True)


def _box_parts(name: str, tensor: DTensor) -> list[Part]:
    parts = []
    for box in boxes_of(name, tensor):
        whole = box.sizes == tuple(tensor.shape)
        part = Part(
            name=name,
            key=key_in_file(name) if whole else f"{key_in_file(name)}@{','.join(map(str, box.offsets))}",
            dtype=DTYPE_NAMES[tensor.dtype],
            sizes=box.sizes,
            offsets=box.offsets,
            whole=whole,
            local_offsets=box.local_offsets,
        )
        parts.append(part)
    return parts


def _require_plain_kind(name: str, tensor: torch.Tensor) -> None:
    local = local_part(tensor) if isinstance(tensor, DTensor) else tensor
    if problem := _problem_of_kind(local):
        raise UnsaveableStateError(f"{name} {problem}")


def _problem_of_kind(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being saved, and the way out; empty where nothing does."""
    if tensor.is_quantized:
        return (
            f"has dtype {tensor.dtype}: quantized, it cannot train on. Save the model of floats, and quantize a copy."
        )
    if tensor.is_nested:
        return "is a nested tensor, which has no plain bytes to save. Keep its values() and offsets() as two tensors."
    if tensor.layout != torch.strided:
        return (
            f"is a tensor of layout {tensor.layout}, which has no plain bytes to save. Keep its indices and its values "
            f"as two tensors, or its to_dense()."
        )
    if tensor.is_meta:
        return (
            "is a tensor on the meta device, which has no bytes to save. Give the model memory and values before the "
            "Run is made: model.to_empty(device=...), then its initialization."
        )
    if tensor.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        pair = "Keep torch.view_as_real(it), and make it complex where it is used" if tensor.is_complex() else ""
        return (
            f"has dtype {tensor.dtype}, which safetensors cannot hold. It holds: {known}. "
            f"{pair or 'Keep its bytes: it.view(torch.uint8)'}."
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return (
            f"is a {type(tensor).__name__}, a kind of tensor whose bytes are not known to be all there is to it. Keep "
            f"plain tensors (it.as_subclass(torch.Tensor), or those that it is made of), and make it of them where it "
            f"is used."
        )
    return ""


def _placement(tensor: torch.Tensor) -> object:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else _memory_order(tensor)
