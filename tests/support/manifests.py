"""Manifests and found checkpoints with as little said as possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_train.checkpoint.catalog import Found
from dist_train.checkpoint.manifest import Best, Manifest, Progress, step_name

EMPTY = Manifest(
    run_id="run", sequence=1, attempt=1, parent=None, committed_at=0.0, progress=Progress(), files={}, tensors={}
)


def manifest(
    sequence: int = 1, *, step: int | None = None, epochs: int = 0, samples: int = 0, **fields: Any
) -> Manifest:
    """A manifest without files; the step follows the sequence unless given. Metrics are monitored by the first one."""
    progress = Progress(
        global_step=sequence if step is None else step,
        epoch=epochs,
        epochs_completed=epochs,
        samples_into_epoch=samples,
    )
    for name, value in list(fields.get("metrics", {}).items())[:1]:
        fields.setdefault(
            "best",
            Best(monitor=name, mode="min", value=value, global_step=progress.global_step, epochs_completed=epochs),
        )
    return replace(EMPTY, sequence=sequence, progress=progress, **fields)


def found(sequence: int, **fields: Any) -> Found:
    """A committed checkpoint as the catalog reports it."""
    return Found(f"checkpoints/{step_name(sequence)}", manifest(sequence, **fields))
