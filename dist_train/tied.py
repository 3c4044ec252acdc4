"""Tied tensors: which names mean the same elements in memory, and what other programs make of them.

Invariant: reads only. A tensor that is tied is one tensor: saved once, restored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
