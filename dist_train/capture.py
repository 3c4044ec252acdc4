"""One rank's state as it is handed to a save: tensors by name, and JSON.

Invariant: by reference; nothing is copied, and nothing here knows where a value came from or where it goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Json = Any


@dataclass(slots=True, kw_only=True)
class Capture:
    """One rank's state, by reference. Names are equal on all ranks."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Equal on all ranks, or a DTensor."""
    main_only: set[str] = field(default_factory=set)
    """Names whose value is the main rank's (DDP buffers differ by rank)."""
    per_rank: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values that differ by rank and are all kept. A name that is not in `tensors`, too, has no common value: its shape
    may differ by rank."""
    aliases: dict[str, str] = field(default_factory=dict)
    state: dict[str, Json] = field(default_factory=dict)
    rank_state: dict[str, Json] = field(default_factory=dict)


def place_of(kind: str, name: str) -> str:
    """Where something is in a checkpoint: `model`, or `model/critic` of several."""
    return f"{kind}/{name}" if name else kind
