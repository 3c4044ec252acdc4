"""Compares the newest checkpoints and the histories of two runs, bit for bit; exit code 1 if anything differs.

python scripts/demo/compare.py runs/one runs/other
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dist_train.checkpoint.inference import find_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import DistTrainError
from dist_train.history import read_metrics

Tensors = dict[str, torch.Tensor]
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Part:
    """One line of the verdict."""

    title: str
    size: str
    differences: list[str]
    """What differs; empty when the two runs agree."""


def read_end(run_dir: str) -> tuple[Manifest, Tensors]:
    """The newest checkpoint's manifest and tensors; every byte is verified first. Raises DistTrainError."""
    store, path, manifest = find_checkpoint(run_dir, "latest")
    damages = verify_checkpoint(store, path, manifest)
    if damages:
        raise DistTrainError(f"{store.path(path)} is damaged: {'; '.join(map(str, damages))}.")
    reader = CheckpointReader(store, path, manifest)
    tensors = {name: reader.create(name, torch.device("cpu")) for name in manifest.tensors}
    reader.close()
    return manifest, tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bits, not values: 0.0 and -0.0 differ, two equal NaNs do not."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def compare_tensors(title: str, one: Tensors, other: Tensors) -> Part:
    names = one.keys() | other.keys()
    unequal = [name for name in names if not (name in one and name in other and same_bits(one[name], other[name]))]
    numbers = sum(tensor.numel() for tensor in one.values())
    return Part(title, f"{len(one)} tensors, {numbers:,} numbers", sorted(unequal))


def compare_values(title: str, size: str, one: object, other: object) -> Part:
    return Part(title, size, [] if one == other else ["not the same"])


def compare_runs(first: str, second: str) -> Iterator[Part]:
    """Everything that a run holds at its end. Raises DistTrainError."""
    (one, one_tensors), (other, other_tensors) = read_end(first), read_end(second)
    groups = {"model": "weights", "optimizer": "optimizer"}
    for head in sorted({name.partition("/")[0] for name in one_tensors.keys() | other_tensors.keys()}):
        of_head = (
            {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] == head}
            for tensors in (one_tensors, other_tensors)
        )
        yield compare_tensors(groups.get(head, head), *of_head)
    yield compare_values("learning rates, scheduler", "every setting and counter", one.state, other.state)
    yield compare_values("random numbers", f"{len(one.rank_state)} ranks", one.rank_state, other.rank_state)
    updates = f"{one.progress.global_step:,} updates, {one.progress.epochs_completed} epochs"
    yield compare_values("progress", updates, one.progress, other.progress)
    ends = [(manifest.metrics, manifest.train_loss, manifest.best) for manifest in (one, other)]
    yield compare_values("final and best metrics", f"{len(one.metrics)} metrics", *ends)
    histories = [read_metrics(Store(run_dir)) for run_dir in (first, second)]
    yield compare_values("history of losses", f"{len(histories[0])} records", *histories)


def describe(part: Part) -> str:
    if not part.differences:
        return f"equal   {part.title:26} {part.size}"
    more = len(part.differences) - SHOWN_NAMES
    names = ", ".join(part.differences[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"DIFFERS {part.title:26} {names}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run directory")
    args = parser.parse_args()
    try:
        parts = list(compare_runs(*args.runs))
    except DistTrainError as error:
        sys.exit(f"error: {error}")
    for part in parts:
        print(describe(part))
    different = sum(bool(part.differences) for part in parts)
    print("The two runs are one and the same, bit for bit." if not different else f"{different} parts differ.")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
