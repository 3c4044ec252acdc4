"""How long training is held by a save of a model on a device: on a side stream, with a copy that the host waits for,
and with torch.save.

A model of --megabytes with AdamW (three times that in all) is trained; the ways save in turn, one each round, and the
medians are printed:

    host      seconds until the call returns
    update    seconds until the device has made the next update: what training really loses beyond an update alone
    durable   seconds until the checkpoint is on the disk (dist_train alone tells)

`--device cpu` runs the same (there is no side stream then: both of dist_train's ways are one), so that the program
itself is tested where there is no GPU. Source of the method: docs/design/0005-cost-of-a-save.md.

    python benchmarks/gpu_save_cost.py [--device cuda] [--megabytes 1000] [--rounds 5] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dist_train as dt
from dist_train.checkpoint import snapshot

WIDTH = 2048
LAYER_MB = WIDTH * WIDTH * 4 / 1e6
WAYS = ("no save", "side stream", "waiting copy", "torch.save")
Row = tuple[float, float]


class Bench:
    """A model in training, and the ways to save it."""

    def __init__(self, device: str, megabytes: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        layers = max(1, round(megabytes / LAYER_MB))
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.inputs = torch.randn(64, WIDTH, device=self.device)
        self.plain = folder / "plain.pth"
        self.rows: dict[str, list[Row]] = {name: [] for name in WAYS}

    def update(self) -> None:
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, save: Callable[[], object]) -> Row:
        """Begins with an idle device."""
        self.synchronize()
        started = time.perf_counter()
        save()
        returned = time.perf_counter()
        self.update()
        self.synchronize()
        return returned - started, time.perf_counter() - started

    def save_plainly(self) -> None:
        with self.plain.open("wb") as file:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def copies_that_the_host_waits_for() -> Iterator[None]:
    """As a save would be without the side stream: from the same page-locked image."""
    is_behind = snapshot.Image._is_behind
    snapshot.Image._is_behind = lambda image, source: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        snapshot.Image._is_behind = is_behind  # type: ignore[method-assign]


def run_rounds(bench: Bench, run: dt.Run, rounds: int) -> None:
    def wait_and_save() -> None:
        with copies_that_the_host_waits_for():
            run.save()

    ways: dict[str, Callable[[], object]] = {
        "no save": lambda: None,
        "side stream": run.save,
        "waiting copy": wait_and_save,
        "torch.save": bench.save_plainly,
    }
    for turn in range(rounds + 1):
        names = WAYS if turn % 2 else tuple(reversed(WAYS))  # none is always after the same one
        for name in names:
            bench.update()
            run.step()
            run._checkpointer.wait()  # the writer of the save before is not to be measured with this one
            row = bench.measure(ways[name])
            if turn:  # the first round touches everything for the first time
                bench.rows[name].append(row)


def report(bench: Bench, durable: list[float], megabytes: int) -> dict[str, Any]:
    medians = {
        name: {
            "host": statistics.median(host for host, _ in rows),
            "update": statistics.median(update for _, update in rows),
        }
        for name, rows in bench.rows.items()
    }
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "cpu"
    found = {
        "device": name,
        "torch": torch.__version__,
        "weights_mb": megabytes,
        "rounds": len(bench.rows["no save"]),
        "medians": medians,
        "durable": statistics.median(durable),
    }
    print(f"{name}, torch {torch.__version__}, {megabytes} MB of weights and AdamW's moments, seconds, medians:")
    print(f"{'':14}{'host':>10}{'update':>10}{'lost':>10}")
    for way, row in medians.items():
        lost = row["update"] - medians["no save"]["update"]
        print(f"{way:14}{row['host']:10.4f}{row['update']:10.4f}{lost:10.4f}")
    print(f"durable {found['durable']:.3f} s after the call")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--json", default="", help="file for the medians")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args.device, args.megabytes, Path(folder))
        parts: dict[str, Any] = {"model": bench.model, "optimizer": bench.optimizer}
        policy = dt.CheckpointPolicy(at_end=False, keep_last=2)
        with dt.Run(f"{folder}/run", policy=policy, **parts) as run:
            for _ in run.epochs(1):
                run_rounds(bench, run, args.rounds)
        events = map(json.loads, (Path(folder) / "run" / "run.jsonl").read_text().splitlines())
        durable = [event["seconds"] for event in events if event["event"] == "committed"]
    found = report(bench, durable, args.megabytes)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
