"""Two runs that should be one and the same: what they saved last, and their folded histories, compared bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.checkpoint.inference import find_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.history import read_metrics
from dist_train.tree import decode

COMPARED = ("progress", "state", "rank_state", "metrics", "train_loss", "best", "aliases")


def read_checkpoint(run_dir: str | Path, which: str = "latest") -> tuple[Manifest, dict[str, torch.Tensor]]:
    """The manifest and all tensors; its bytes are verified first."""
    store, path, manifest = find_checkpoint(str(run_dir), which)
    assert verify_checkpoint(store, path, manifest) == []
    reader = CheckpointReader(store, path, manifest)
    tensors = {name: reader.create(name, torch.device("cpu")) for name in manifest.tensors}
    reader.close()
    return manifest, tensors


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Weights, buffers, optimizer, scheduler, RNG, progress and folded metrics are equal, bit for bit."""
    (first, first_tensors), (second, second_tensors) = read_checkpoint(one), read_checkpoint(other)
    assert first_tensors.keys() == second_tensors.keys()
    different = [name for name in first_tensors if not same_bits(first_tensors[name], second_tensors[name])]
    assert not different, f"{len(different)} of {len(first_tensors)} tensors differ, the first: {different[:5]}"
    for field in COMPARED:
        assert getattr(first, field) == getattr(second, field), f"{field} differs"
    histories = read_metrics(Store(one)), read_metrics(Store(other))
    assert histories[0]
    assert histories[0] == histories[1]


def assert_same_as_bare(run_dir: str | Path, bare: list[dict[str, Any]]) -> None:
    """The run's end equals that of the loop without the library; `bare` has one state a rank."""
    manifest, tensors = read_checkpoint(run_dir)
    model = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    assert model.keys() == bare[0]["model"].keys()
    for name, value in bare[0]["model"].items():
        assert same_bits(model[name], value), f"{name} differs from the bare loop's"
    for name, state in bare[0]["optimizer"].items():
        for key, value in state.items():
            assert same_bits(tensors[f"optimizer/{name}/{key}"], value), f"{key} of {name} differs"
    groups = manifest.state["optimizer"]["groups"]
    assert [group["settings"]["lr"] for group in groups] == bare[0]["lr"]
    assert manifest.state["scheduler"]["last_epoch"] == bare[0]["last_epoch"]
    for rank, state in enumerate(bare):
        rng = decode(manifest.rank_state[rank]["rng"], lambda name, device: torch.empty(0))
        assert rng["torch"] == bytes(state["torch_rng"].numpy().tobytes())
        words = torch.frombuffer(bytearray(rng["numpy"][1]), dtype=torch.uint32).to(torch.int64)
        assert torch.equal(words, state["numpy_rng"])
        assert np.frombuffer(rng["python"][1], dtype=np.uint32).tolist() == state["python_rng"]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype, one.stride()) != (other.shape, other.dtype, other.stride()):
        return False
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def consumed_samples(run_dir: str | Path, folder: str | Path) -> dict[int, Counter[int]]:
    """Epoch -> how often each sample was consumed, folded along the chain of resumes."""
    events = [json.loads(line) for line in (Path(run_dir) / "run.jsonl").read_text().splitlines()]
    starts = {event["attempt"]: event for event in events if event["event"] in ("started", "resumed")}
    metrics = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    parents = {line["attempt"]: line["parent_attempt"] for line in metrics if line.get("kind") == "attempt"}
    attempt, limit = max(starts), float("inf")
    counts: dict[int, Counter[int]] = {}
    while attempt is not None:
        for path in Path(folder).glob(f"a{attempt:06d}-r*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                if line["step"] <= limit:
                    counts.setdefault(line["epoch"], Counter()).update(line["indices"])
        limit = min(limit, starts[attempt].get("global_step", 0))
        attempt = parents[attempt]
    return counts
