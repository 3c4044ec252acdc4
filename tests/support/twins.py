"""Two runs that should be one and the same: what they saved last, and their folded histories, compared bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.checkpoint.store import Store
from dist_train.drill.twins import differences_of_runs, read_checkpoint, same_bits
from dist_train.history import read_metrics
from dist_train.tree import decode

__all__ = ["assert_same_as_bare", "assert_same_run", "consumed_samples", "read_checkpoint", "same_bits"]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Weights, buffers, optimizer, scheduler, RNG, progress and folded metrics are equal, bit for bit."""
    (_, first), (_, second) = read_checkpoint(one), read_checkpoint(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not same_bits(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, the first: {different[:5]}"
    assert read_metrics(Store(one))
    found, compared = differences_of_runs(one, other)
    assert not found
    assert compared >= len(first)


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
