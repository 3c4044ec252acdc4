"""What a `dcp.save` costs with torch's own FileSystemWriter and with StorageWriter, and a `dcp.load` after it.

One process, 600 MB of float32. The two are run in turn, several rounds; medians are printed. `dcp.load` is timed with
digests verified (ours alone can) and without.

    python benchmarks/dcp_cost.py [--rounds 7] [--folder DIR]
"""

from __future__ import annotations

import argparse
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

TENSORS, ELEMENTS = 60, 2_500_000


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    state: dict[str, Any] = {f"model.{index}": torch.randn(ELEMENTS) for index in range(TENSORS)}
    size = sum(one.nbytes for one in state.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        seconds: dict[str, list[float]] = {}

        def note(what: str, work: Callable[[], object]) -> None:
            seconds.setdefault(what, []).append(timed(work))

        for _ in range(args.rounds):
            shutil.rmtree(folder / "torch", ignore_errors=True)
            shutil.rmtree(folder / "ours", ignore_errors=True)
            writers = {"torch": dcp.FileSystemWriter(folder / "torch"), "ours": dt.StorageWriter(folder / "ours")}
            for kind, writer in writers.items():
                note(f"save, new, {kind}", lambda writer=writer: dcp.save(state, storage_writer=writer))  # type: ignore[misc]
            for kind, writer in writers.items():
                note(f"save, overwriting, {kind}", lambda writer=writer: dcp.save(state, storage_writer=writer))  # type: ignore[misc]
            readers = {
                "torch": dcp.FileSystemReader(folder / "torch"),
                "ours, verified": dt.StorageReader(folder / "ours"),
                "ours, not verified": dt.StorageReader(folder / "ours", verify=False),
            }
            for kind, reader in readers.items():
                note(f"load, {kind}", lambda reader=reader: dcp.load(state, storage_reader=reader))  # type: ignore[misc]
    print(f"{size:.0f} MB, medians of {args.rounds}")
    for what, times in seconds.items():
        print(f"{what:30} {statistics.median(times):.3f} s  {size / statistics.median(times):6.0f} MB/s")


if __name__ == "__main__":
    main()
