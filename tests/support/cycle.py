"""Capture -> plan -> image -> files -> reader -> restore in one process, for any number of simulated ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dist_train.capture import Capture
from dist_train.checkpoint.manifest import CHECKPOINTS, Manifest, saving_name, step_name
from dist_train.checkpoint.plan import Plan, make_plan
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.snapshot import Image
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.checkpoint.writer import SaveJob, commit, write_shards
from tests.support.manifests import manifest

FOLDER = f"{CHECKPOINTS}/{step_name(1)}"


def sample_tensor(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Bytes that differ from each other, of any dtype; values may be anything but are valid."""
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(list(shape))
    raw = (torch.arange(count * dtype.itemsize, dtype=torch.int64) * 37 + 11).to(torch.uint8)
    return raw.view(dtype).reshape(list(shape)) if count else torch.empty(list(shape), dtype=dtype)


def write_checkpoint(root: Path, captures: Sequence[Capture], settings: dict[str, object] | None = None) -> Manifest:
    """Writes and commits the captures of all ranks, rank 0 first, as the writers of real ranks would."""
    store, world_size = Store(root), len(captures)
    staging = f"{CHECKPOINTS}/{saving_name(step_name(1), 1)}"
    store.make_directory("")
    store.make_directory(staging, exist_ok=False)
    receipts, main_job = [], None
    for rank, capture in enumerate(captures):
        plan = make_plan(capture, rank, world_size)
        image = Image(plan)
        image.fill(plan, capture, rank)
        job = SaveJob(
            serial=1,
            staging=staging,
            target=step_name(1),
            plan=plan,
            image=image,
            rank_state=capture.rank_state,
            manifest=_draft(capture, plan, world_size, settings or {}) if rank == 0 else None,
        )
        main_job = main_job or job
        receipts.append(write_shards(store, job))
        image.close()
    assert main_job is not None
    return commit(store, None, main_job, receipts)


def _draft(capture: Capture, plan: Plan, world_size: int, settings: dict[str, object]) -> Manifest:
    return replace(
        manifest(1),
        tensors=plan.tensors,
        aliases=capture.aliases,
        state=capture.state,
        settings=settings,
        world_size=world_size,
    )


def open_checkpoint(root: Path, rank: int = 0) -> tuple[Manifest, CheckpointReader]:
    """The manifest as it lies on disk and a reader of verified files."""
    store = Store(root)
    found = Manifest.from_json(store.read(f"{FOLDER}/manifest.json"))
    assert not verify_checkpoint(store, FOLDER, found)
    return found, CheckpointReader(store, FOLDER, found, rank=rank)
