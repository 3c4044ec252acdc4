"""Manifests and found checkpoints with as little said as possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_train.checkpoint.catalog import Found
from dist_train.checkpoint.manifest import Manifest, Progress, step_name

EMPTY = Manifest(
    run_id="run", sequence=1, attempt=1, parent=None, committed_at=0.0, progress=Progress(), files={}, tensors={}
)


def manifest(sequence: int = 1, *, step: int | None = None, **fields: Any) -> Manifest:
    """A manifest without files; the step follows the sequence unless given."""
    return replace(
        EMPTY, sequence=sequence, progress=Progress(global_step=sequence if step is None else step), **fields
    )


def found(sequence: int, **fields: Any) -> Found:
    """A committed checkpoint as the catalog reports it."""
    return Found(f"checkpoints/{step_name(sequence)}", manifest(sequence, **fields))
