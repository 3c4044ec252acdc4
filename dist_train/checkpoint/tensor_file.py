"""The safetensors format as we lay it: header bytes, element types, and where each tensor's bytes are.

Invariant: the data section starts on a 4096-byte boundary (the header is padded with spaces, which the format allows),
so that an image can be written past the page cache. Reads and writes no file. Source: safetensors' README, section
"Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_train.errors import CorruptCheckpointError

ALIGNMENT = 4096
PARTS_KEY = "dist_train.parts"

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of one tensor, in one file."""

    name: str
    """The tensor's name in the manifest."""
    key: str
    """Its name in the file."""
    dtype: str
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor."""
    whole: bool
    local_offsets: tuple[int, ...] = ()
    """Where the box begins in the tensor that it is copied from; empty for that tensor's beginning."""
    start: int = 0
    """First byte, counted from the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """One file to be: its header and where each part's bytes go."""

    group: str
    header: bytes
    parts: list[Part] = field(default_factory=list)
    num_bytes: int = 0


def lay_out(group: str, parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Header and byte positions of a file; widest elements first, so that every tensor is aligned to its element."""
    ordered = sorted(parts, key=lambda part: (-DTYPES[part.dtype].itemsize, part.key))
    entries: dict[str, Any] = {}
    position = 0
    for part in ordered:
        stop = position + part.num_bytes
        entries[part.key] = {"dtype": part.dtype, "shape": list(part.sizes), "data_offsets": [position, stop]}
        position = stop
    header = _header({"format": "pt", **_describe_parts(ordered), **(metadata or {})}, entries)
    starts = [len(header) + entries[part.key]["data_offsets"][0] for part in ordered]
    placed = [replace(part, start=start) for part, start in zip(ordered, starts, strict=True)]
    return FileLayout(group=group, header=header, parts=placed, num_bytes=len(header) + position)


def header_bytes(data: Any) -> int:
    """Length of the JSON that begins at byte 8, as a file's first bytes tell it: whatever a damaged one says."""
    return int.from_bytes(bytes(data[:8]), "little")


def read_layout(data: Any, path: str) -> list[tuple[str, Part]]:
    """(key in the file, part) of every tensor in a file's bytes; names of whole tensors are the keys.

    Raises:
        CorruptCheckpointError: the header cannot be read or points outside of the file.
    """
    try:
        length = header_bytes(data)
        entries = json.loads(bytes(data[8 : 8 + length]))
        described = json.loads(entries.pop("__metadata__", {}).get(PARTS_KEY, "{}"))
        return [_read_part(key, entry, described.get(key), 8 + length, len(data)) for key, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: the safetensors header cannot be read ({error}).", path) from error


def _read_part(
    key: str, entry: dict[str, Any], described: dict[str, Any] | None, base: int, file_bytes: int
) -> tuple[str, Part]:
    sizes = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    part = Part(
        name=described["name"] if described else key,
        key=key,
        dtype=entry["dtype"],
        sizes=sizes,
        offsets=tuple(described["offsets"]) if described else (0,) * len(sizes),
        whole=described is None,
        start=base + start,
    )
    if not all(type(size) is int and size >= 0 for size in sizes) or part.num_bytes != stop - start:
        raise ValueError(f"{key} is {part.dtype} {list(sizes)} in {stop - start} bytes")
    if start < 0 or base + stop > file_bytes:
        raise ValueError(f"{key} lies outside of the file")
    return key, part


def _describe_parts(parts: Sequence[Part]) -> dict[str, str]:
    partial = {part.key: {"name": part.name, "offsets": list(part.offsets)} for part in parts if not part.whole}
    return {PARTS_KEY: json.dumps(partial, sort_keys=True)} if partial else {}


def _header(metadata: dict[str, str], entries: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
