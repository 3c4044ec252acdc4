"""What a save costs training: stall and slowdown, side by side with torch.save and with no save at all.

One process, a 200 MB model with AdamW (600 MB of state). The ways are run in turn, several rounds, and medians are
printed: seconds that training waits for the save, and seconds of the next step, which competes with the writer.

    python benchmarks/save_cost.py [--rounds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dist_train as dt

WIDTH, LAYERS = 2048, 12


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(64, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain = Path(folder) / "plain.pth"

        def save_plainly() -> None:
            with plain.open("wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

        policy = dt.CheckpointPolicy(at_end=False, keep_last=2)
        with dt.Run(f"{folder}/run", model=model, optimizer=optimizer, policy=policy) as run:
            ways = {"no save": lambda: None, "torch.save": save_plainly, "dist_train": run.save}
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in run.epochs(1):
                for turn in range(args.rounds + 1):
                    for name, save in ways.items():
                        train_step(model, optimizer)
                        run.step()
                        both = timed(save), timed(lambda: train_step(model, optimizer))
                        if turn:  # the first round touches everything for the first time
                            seconds[name].append(both)
        events = map(json.loads, (Path(folder) / "run" / "run.jsonl").read_text().splitlines())
        behind = [event["seconds"] for event in events if event["event"] == "committed"]
    print(f"{'':12}{'save':>10}{'next step':>12}   (seconds, medians of {args.rounds})")
    for name, rows in seconds.items():
        stall, next_step = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:12}{stall:10.3f}{next_step:12.3f}")
    print(f"dist_train's checkpoint is durable {statistics.median(behind):.3f} s after training went on")


if __name__ == "__main__":
    main()
