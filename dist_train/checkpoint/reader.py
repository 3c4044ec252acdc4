"""A verified checkpoint -> live tensors, whatever layout it was written in and whatever layout they have now.

Invariant: a tensor is filled element by element exactly once, with the dtype it was saved in, or it is an error that
names it. Bytes go from the mapped file to their destination, a few megabytes at a time; no second copy of the model is
made, and of the files no more is read than this rank's part (and gaps that are too small to be worth leaving out).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate

from dist_train.checkpoint import paging
from dist_train.checkpoint.boxes import boxes_of, local_part, region_of
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.plan import full_name, own_name
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.tensor_file import DTYPES, Part, header_bytes, read_layout
from dist_train.errors import CorruptCheckpointError, StateMismatchError

_MAPPED_AT_ONCE_BYTES = 1 << 20
"""What the kernel may map around the first byte that is touched: a part counts as no less."""


class CheckpointReader:
    """Random access to the tensors of one checkpoint; implements `state.TensorSource`."""

    def __init__(self, store: Store, path: str, manifest: Manifest, *, rank: int = 0) -> None:
        self._path = str(store.path(path))
        self._manifest = manifest
        self._rank = rank
        self._maps: list[mmap.mmap] = []
        self._file_names: dict[int, str] = {}
        self._read_bytes = 0
        self._parts: dict[str, list[tuple[mmap.mmap, Part]]] = {}
        self.on_bytes: Callable[[int], None] = lambda count: None
        """Told of bytes that were copied into live tensors."""
        for name in sorted(manifest.files):
            if name.endswith(".safetensors"):
                self._index(self._map(store, f"{path}/{name}"), name)
        self._require_coverage()

    def _map(self, store: Store, path: str) -> mmap.mmap:
        if store.size(path) == 0:  # cannot be mapped, and no safetensors file is empty
            raise CorruptCheckpointError(f"{store.path(path)} is empty.", self._path)
        return store.map(path)

    def _index(self, data: mmap.mmap, name: str) -> None:
        self._maps.append(data)
        self._file_names[id(data)] = name
        group = name.split("-", 1)[0]
        paging.read_on_request(data)
        paging.request_range(data, 8, header_bytes(data))
        for _, part in read_layout(data, f"{self._path}/{name}"):
            full = full_name(group, part.key) if part.whole else part.name
            self._parts.setdefault(full, []).append((data, part))

    def close(self) -> None:
        self._parts.clear()
        for data in self._maps:
            with contextlib.suppress(BufferError):  # a view is still referenced; the mapping goes with it
                data.close()

    def names(self, prefix: str) -> list[str]:
        """Names of stored tensors (tied ones under the name that is stored)."""
        return [name for name in self._manifest.tensors if name.startswith(prefix)]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        entry = self._manifest.tensors[self._resolve(name)]
        return tuple(entry.shape), DTYPES[entry.dtype]

    def parts(self, name: str) -> list[tuple[str, Part]]:
        """The boxes that a tensor is stored in, each with the name of its file."""
        return [(self._file_names[id(data)], part) for data, part in self._parts.get(self._resolve(name), [])]

    def files_with(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[str]:
        """The files that hold something of a box of a tensor."""
        return [file for file, part in self.parts(name) if _overlap(part, offsets, sizes) is not None]

    def is_sharded(self, name: str) -> bool:
        """Whether it was saved in several parts."""
        return len(self._parts.get(self._resolve(name), [])) > 1

    def own_name(self, name: str) -> str:
        """The name of this rank's own value where every rank's was kept."""
        own = own_name(name, self._rank)
        return own if own in self._manifest.tensors else name

    def own_names(self, name: str) -> list[str]:
        """Of every rank's own value, where every rank's was kept."""
        owned = [own_name(name, rank) for rank in range(self._manifest.world_size)]
        return [own for own in owned if own in self._manifest.tensors]

    def fill(self, name: str, target: torch.Tensor) -> None:
        """Overwrites a live tensor (or this rank's part of a DTensor) with the stored values."""
        shape, dtype = self.describe(name)
        if (tuple(target.shape), target.dtype) != (shape, dtype):
            here = f"{list(target.shape)} {target.dtype}"
            raise StateMismatchError(f"{name} is {list(shape)} {dtype} in {self._path} and {here} here.")
        if isinstance(target, DTensor):
            local = local_part(target)
            for box in boxes_of(name, target):
                region = region_of(local, box.local_offsets, box.sizes)
                self.fill_box(name, region, box.offsets, box.sizes)
        else:
            self.fill_box(name, target.detach(), (0,) * len(shape), shape)

    def create(self, name: str, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor:
        """A new tensor with the stored values and memory order.

        Args:
            like: a parameter whose state it is. Where that is a DTensor, so is this: sharded alike if it is of the same
                shape, else (sums over rows) a replica on each rank; not so a lone number, or what is this rank's own.
        """
        shape, dtype = self.describe(name)
        if isinstance(like, DTensor) and tuple(like.shape) == shape and not self._is_own(name):
            created = torch.empty_like(like, dtype=dtype, device=device)
        else:
            order = self._manifest.tensors[self._resolve(name)].order or list(range(len(shape)))
            laid = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
            created = laid.permute(sorted(range(len(order)), key=order.__getitem__))
            if isinstance(like, DTensor) and created.numel() > 1 and not self._is_own(name):
                mesh = like.device_mesh
                created = DTensor.from_local(created, mesh, [Replicate()] * mesh.ndim, run_check=False)
        self.fill(name, created)
        return created.detach()

    def view(self, name: str) -> torch.Tensor:
        """The stored values on the CPU, mapped from the file without a copy where they lie there in one piece."""
        shape, _ = self.describe(name)
        parts = self._parts[self._resolve(name)]
        if len(parts) == 1 and parts[0][1].sizes == shape and not self._manifest.tensors[self._resolve(name)].order:
            data, part = parts[0]
            paging.read_ahead(data, part.start, part.num_bytes)
            return _view(data, part)
        return self.create(name, torch.device("cpu"))

    def read_box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """A part of a tensor, on the CPU, whatever files hold its bytes: no more memory than the part takes."""
        box = torch.empty(sizes, dtype=self.describe(name)[1])
        self.fill_box(name, box, offsets, sizes)
        return box

    def forget(self, name: str) -> int:
        """Lets the memory go that reading a tensor took; returns its bytes in the files."""
        num_bytes = sum(part.num_bytes for _, part in self._parts.get(self._resolve(name), []))
        self._forget(num_bytes)
        return num_bytes

    def _resolve(self, name: str) -> str:
        """Where a tensor is stored: a tied one under another name, one without a common value under this rank's own (or
        the main rank's, which is as good where such a value may be given to other ranks at all).
        """
        stored = self._manifest.aliases.get(name, name)
        if stored in self._manifest.tensors:
            return stored
        owned = (own_name(stored, rank) for rank in (self._rank, 0))
        return next((own for own in owned if own in self._manifest.tensors), stored)

    def _is_own(self, name: str) -> bool:
        return self._resolve(name) not in (name, self._manifest.aliases.get(name))

    def fill_box(self, name: str, target: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        """Overwrites a tensor of these sizes with a box of the stored one; another dtype is converted."""
        filled = 0
        for data, part in self._parts[self._resolve(name)]:
            overlap = _overlap(part, offsets, sizes)
            if overlap is None:
                continue
            lows, counts = overlap
            values = region_of(_view(data, part), _minus(lows, part.offsets), counts)
            region = region_of(target, _minus(lows, offsets), counts)
            is_mapped = part.start % values.element_size() == 0
            for piece, place in paging.pieces(values, region):
                span = paging.request(data, part.start, piece) if is_mapped else piece.nbytes
                _write(place, piece)
                self.on_bytes(piece.nbytes)
                self._forget(span)
            filled += values.numel()
        if filled != target.numel():
            raise CorruptCheckpointError(
                f"{self._path}: {name} has {filled} of the {target.numel()} elements that are needed here.", self._path
            )

    def _forget(self, num_bytes: int) -> None:
        """Lets the kernel drop the pages that were read, so that a resume needs no more memory than training.

        Small tensors too, once they come to something: a model may have nothing but small ones.
        """
        self._read_bytes += max(num_bytes, _MAPPED_AT_ONCE_BYTES)
        if self._read_bytes >= paging.PIECE_BYTES:
            self._read_bytes = 0
            for data in self._maps:
                paging.let_go(data)

    def _require_coverage(self) -> None:
        """Every tensor of the table is there once and whole."""
        for name, entry in self._manifest.tensors.items():
            parts = [part for _, part in self._parts.get(name, [])]
            expected = 1
            for size in entry.shape:
                expected *= size
            found = sum(part.numel for part in parts)
            wrong_type = next((part for part in parts if part.dtype != entry.dtype), None)
            if found != expected or (expected and not parts) or wrong_type or _any_overlap(parts):
                raise CorruptCheckpointError(
                    f"{self._path}: the files hold {found} elements of {name}, expected {expected} of {entry.dtype}, "
                    f"each once.",
                    self._path,
                )


def _view(data: mmap.mmap, part: Part) -> torch.Tensor:
    if part.numel == 0:
        return torch.empty(part.sizes, dtype=DTYPES[part.dtype])
    flat = torch.frombuffer(data, dtype=torch.uint8, count=part.num_bytes, offset=part.start)
    aligned = flat if part.start % DTYPES[part.dtype].itemsize == 0 else flat.clone()
    return aligned.view(DTYPES[part.dtype]).view(part.sizes)


def _write(region: torch.Tensor, values: torch.Tensor) -> None:
    for dim in range(region.dim()):
        if region.stride(dim) == 0 and region.size(dim) > 1:  # expanded: one element stands for all of them
            region, values = region.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    with torch.no_grad():
        region.copy_(values)


def _overlap(part: Part, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[list[int], list[int]] | None:
    """Where what a part and a box have in common begins, and its size."""
    lows = [max(a, b) for a, b in zip(part.offsets, offsets, strict=True)]
    highs = [min(a + n, b + m) for a, n, b, m in zip(part.offsets, part.sizes, offsets, sizes, strict=True)]
    counts = _minus(highs, lows)
    return None if any(count <= 0 for count in counts) else (lows, counts)


def _minus(places: Sequence[int], origin: Sequence[int]) -> list[int]:
    return [place - start for place, start in zip(places, origin, strict=True)]


def _any_overlap(parts: list[Part]) -> bool:
    return any(_overlap(one, other.offsets, other.sizes) for one, other in _neighbours(parts) if one.sizes)


def _neighbours(parts: list[Part]) -> Iterator[tuple[Part, Part]]:
    """Pairs that could overlap: with equal counts of elements in all, an overlap always shows among these."""
    ordered = sorted(parts, key=lambda part: part.offsets)
    for index, one in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if one.sizes and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            yield one, other
