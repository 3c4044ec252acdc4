"""What a `dcp.save` costs with torch's own FileSystemWriter and with StorageWriter, and a `dcp.load` after it.

One process; 600 MB in 60 tensors, and 2000 tensors of 4 kB. All kinds run in turn, in another order each round; medians
are printed. FileSystemWriter fsyncs its files and no directory; `no fsync` is its `sync_files=False`, which ours does
not have. `stall` is how long `dcp.async_save` keeps training waiting. `dcp.load` is timed with digests verified (ours
alone can) and without; cold is from the disk, warm from the page cache.

    python benchmarks/dcp_cost.py [--rounds 7] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import dist_train as dt

State = dict[str, Any]
STATES: dict[str, Callable[[], State]] = {
    "600 MB in 60": lambda: {f"model.{index}": torch.randn(2_500_000) for index in range(60)},
    "8 MB in 2000": lambda: {f"model.{index}": torch.randn(1000) for index in range(2000)},
}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch": dcp.FileSystemWriter,
    "torch, no fsync": lambda path: dcp.FileSystemWriter(path, sync_files=False),
    "ours": dt.StorageWriter,
}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "torch": ("torch", dcp.FileSystemReader),
    "ours": ("ours", dt.StorageReader),
    "ours, not verified": ("ours", lambda path: dt.StorageReader(path, verify=False)),
}


class Times:
    """Seconds by what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def take(self, what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = work()
        self.seconds.setdefault(what, []).append(time.perf_counter() - started)
        return done


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_round(state: State, folder: Path, times: Times) -> None:
    def in_turn(kinds: Any) -> list[str]:
        return random.sample(list(kinds), len(kinds))

    for kind in WRITERS:
        shutil.rmtree(folder / kind, ignore_errors=True)
    for what in ("save", "save over it"):
        for kind in in_turn(WRITERS):
            writer = WRITERS[kind](folder / kind)
            times.take(f"{what:14}{kind}", lambda writer=writer: dcp.save(state, storage_writer=writer))  # type: ignore[misc]
    for kind in in_turn(READERS):
        source, make = READERS[kind]
        reader = make(folder / source)
        forget(folder / source)
        for what in ("load, cold", "load, warm"):
            times.take(f"{what:14}{kind}", lambda reader=reader: dcp.load(state, storage_reader=reader))  # type: ignore[misc]
    for kind in in_turn(["torch", "ours"]):
        writer = WRITERS[kind](folder / kind)
        save = times.take(f"{'stall':14}{kind}", lambda writer=writer: dcp.async_save(state, storage_writer=writer))  # type: ignore[misc]
        save.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, make in STATES.items():
        state, times = make(), Times()
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for _ in range(args.rounds):
                one_round(state, Path(folder), times)
        print(f"{name} tensors, {args.rounds} rounds: median, least, most seconds")
        for what, seconds in sorted(times.seconds.items()):
            print(f"  {what:34}{statistics.median(seconds):7.3f}{min(seconds):8.3f}{max(seconds):8.3f}")


if __name__ == "__main__":
    main()
