"""Tied tensors: which names mean the same elements in memory, and what other programs make of them.

Invariant: reads only. A tensor that is tied is one tensor: saved once, restored once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def storage_key(value: torch.Tensor) -> Any:
    """Equal for tied tensors: the same elements in memory."""
    if value.layout != torch.strided or value.is_meta:
        return id(value)  # no address to compare; the plan refuses it by name
    if isinstance(value, DTensor) or value.numel() == 0:
        local = value.to_local() if isinstance(value, DTensor) else value
        kind = (tuple(value.shape), str(value.dtype))
        if local.numel() == 0:  # no address either, but a storage, which `detach` shares
            return (local.untyped_storage()._cdata, local.storage_offset(), *kind)
        return (local.data_ptr(), *kind)
    return (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)


def find_overlap(tensors: Mapping[str, torch.Tensor], new: Collection[str]) -> tuple[str, str] | None:
    """Two names whose tensors have some elements in common, one of them among `new`; None where there are none. Those
    that are the same tensor are not asked for, nor sharded ones.

    Of two views with gaps (columns of a matrix) it is not told whether they lie in each other's gaps: they pass.
    """
    if not new:
        return None
    spans = [(*_span(tensor), name) for name, tensor in tensors.items() if _is_plain(tensor)]
    spans.sort(key=lambda span: span[:2])
    reach: tuple[int, int, bool, str] | None = None  # the span so far that ends last
    for span in spans:
        low, high, dense, name = span
        if reach is not None and low < reach[1] and (name in new or reach[3] in new):
            # The first element of the one or the last of the other lies in what has no gap.
            has_common = reach[2] or (dense and high >= reach[1])
            if has_common:
                return reach[3], name
        if reach is None or high > reach[1]:
            reach = span
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    """With an address that means something."""
    if isinstance(tensor, DTensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _span(tensor: torch.Tensor) -> tuple[int, int, bool]:
    """First address and the one after the last, and whether there is no gap."""
    extent = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    low = tensor.data_ptr()
    return low, low + extent * tensor.itemsize, tensor.numel() >= extent


def group_tied(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[list[str], torch.Tensor]]:
    """Names and value of each tensor; a tied one has several, in order."""
    found: dict[Any, tuple[list[str], torch.Tensor]] = {}
    for name, value in tensors:
        found.setdefault(storage_key(value), ([], value))[0].append(name)
    return list(found.values())


def compare_copies(groups: Iterable[Sequence[str]], read: Callable[[str], torch.Tensor]) -> tuple[set[str], list[str]]:
    """Saved names of what is one tensor here: other programs copy tied tensors one by one (`value.cpu()`).

    Args:
        groups: saved names that are tied here.
        read: the saved values of a name.

    Returns:
        The names that are equal copies of the first one of their group or differ from it, and a text for each that
        differs.
    """
    copies: set[str] = set()
    problems = []
    for names in groups:
        for other in names[1:]:
            copies.add(other)
            if not _same_bytes(read(names[0]), read(other)):
                problems.append(f"{names[0]} and {other} are one tensor in the model and differ in the checkpoint")
    return copies, problems


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(*flat)
