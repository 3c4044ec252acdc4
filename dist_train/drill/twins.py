"""Two runs that should be one and the same: what they saved last, and their folded histories, compared bit for bit.

Invariant: only what verifies is compared; nothing is changed. Who wrote a checkpoint and when is no difference.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint.comparison import TensorDifference, compare_tensors, is_weight
from dist_train.checkpoint.inference import find_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import CorruptCheckpointError
from dist_train.history import read_metrics

COMPARED = ("progress", "state", "rank_state", "metrics", "train_loss", "best", "aliases")
_GENERATORS = {"python", "numpy", "torch"}
"""What a state of the random generators holds at the least."""


def differences_of_runs(one: str | Path, other: str | Path, *, unseeded: Collection[str] = ()) -> tuple[list[str], int]:
    """What is not equal of the newest checkpoints (weights, buffers, optimizer, scheduler, random generators, progress)
    and of the histories of metrics: a line each, weights first, none for the same run; and how many tensors there are.

    Args:
        unseeded: random generators (`python`, `numpy`, `torch` ...) that need not be equal.
    """
    opened = [_open(one), _open(other)]
    try:
        (first, first_manifest), (second, second_manifest) = opened
        pairs = list(compare_tensors(first, second, (first_manifest, second_manifest), lambda count: None))
        unequal = sorted(
            (pair for pair in pairs if pair.kind != "equal"), key=lambda pair: (not is_weight(pair.name), -pair.rank)
        )
        found = [_describe(pair) for pair in unequal]
    finally:
        for reader, _ in opened:
            reader.close()
    found += [
        f"{field} differs"
        for field in COMPARED
        if _compared(first_manifest, field, unseeded) != _compared(second_manifest, field, unseeded)
    ]
    return found + _differences_of_histories(read_metrics(Store(one)), read_metrics(Store(other))), len(pairs)


def _open(run_dir: str | Path) -> tuple[CheckpointReader, Manifest]:
    store, path, manifest = find_checkpoint(str(run_dir), "latest")
    if faults := verify_checkpoint(store, path, manifest):
        raise CorruptCheckpointError(f"{store.shown(path)} is not what was committed: {faults[0]}", store.shown(path))
    return CheckpointReader(store, path, manifest), manifest


def _compared(manifest: Manifest, field: str, unseeded: Collection[str]) -> str:
    value = getattr(manifest, field)
    return _text(_without(value, unseeded) if field == "rank_state" else value)


def _without(value: Any, generators: Collection[str]) -> Any:
    """Whatever depth the states of random generators lie at: a loader that is replayed has some, too."""
    if isinstance(value, list):
        return [_without(one, generators) for one in value]
    if not isinstance(value, dict):
        return value
    left_out = set(generators) if value.keys() >= _GENERATORS else set()
    return {name: _without(one, generators) for name, one in value.items() if name not in left_out}


def _describe(pair: TensorDifference) -> str:
    if pair.kind != "differ":
        return f"{pair.name}: {pair.kind}"
    return f"{pair.name}: {pair.differing} of {pair.elements} elements, by at most {pair.max_abs:.3g}"


def _differences_of_histories(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    for a, b in zip(one, other, strict=False):
        if _text(a) != _text(b):
            names = [name for name in a if _text(a[name]) != _text(b.get(name))]
            told = ", ".join(f"{name} is {b.get(name)} instead of {a[name]}" for name in names)
            return [f"the metrics of step {a['global_step']}: {told or 'another record'}"]
    return [] if len(one) == len(other) else [f"{len(other)} records of metrics instead of {len(one)}"]


def _text(value: Any) -> str:
    """Equal for the same NaN."""
    return json.dumps(value, default=lambda one: asdict(one) if is_dataclass(one) else str(one), sort_keys=True)  # type: ignore[arg-type]


def read_checkpoint(run_dir: str | Path, which: str = "latest") -> tuple[Manifest, dict[str, torch.Tensor]]:
    """The manifest and all tensors; its bytes are verified first."""
    store, path, manifest = find_checkpoint(str(run_dir), which)
    if faults := verify_checkpoint(store, path, manifest):
        raise CorruptCheckpointError(f"{store.shown(path)} is not what was committed: {faults[0]}", store.shown(path))
    reader = CheckpointReader(store, path, manifest)
    tensors = {name: reader.create(name, torch.device("cpu")) for name in manifest.tensors}
    reader.close()
    return manifest, tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also strides: a resume must not change how a tensor lies in memory."""
    if (one.shape, one.dtype, one.stride()) != (other.shape, other.dtype, other.stride()):
        return False
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)
