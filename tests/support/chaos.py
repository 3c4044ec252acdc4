"""Kills a rank, or all of them, at a seeded moment of training or inside a save, and counts what it really did.

    chaos.py SCRIPT ARGS...      runs a script with the plan of the environment variable CHAOS armed

Each life of the worker group has at most one kill, chosen from (seed, kills so far). The victim notes the kill durably
before it sends SIGKILL, so that a test can require a number of kills, and of kills inside a save.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "CHAOS"


@dataclass(frozen=True)
class ChaosPlan:
    """Where kills are noted, how many there will be, and when they come."""

    folder: str
    seed: int
    kills: int
    most_micro_steps: int = 60
    """A kill in training comes after at most so many micro-steps of a life."""
    most_operations: int = 60
    """A kill inside a save comes before at most the so-manyth file operation below checkpoints/ of a life."""

    def to_environment(self) -> dict[str, str]:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        return {VARIABLE: json.dumps(asdict(self))}

    def fired(self) -> list[dict[str, Any]]:
        path = Path(self.folder) / "fired.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arm(plan: ChaosPlan) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number = len(plan.fired())
    (Path(plan.folder) / f"pid-{rank}").write_text(str(os.getpid()))
    if number >= plan.kills:
        return
    rng = random.Random(f"{plan.seed}-{number}")
    inside, everyone, victim = rng.random() < 0.6, rng.random() < 0.35, rng.randrange(world_size)
    after = rng.randint(1, plan.most_operations if inside else plan.most_micro_steps)
    if rank == victim:
        note = {"number": number, "rank": rank, "everyone": everyone, "inside_save": inside}
        _before_operation(plan, after, note) if inside else _after_micro_steps(plan, after, note)


def _after_micro_steps(plan: ChaosPlan, after: int, note: dict[str, Any]) -> None:
    from dist_train.run import Run

    step, count = Run.step, 0

    def counting_step(run: Any, loss: Any = None) -> None:
        nonlocal count
        count += 1
        if count == after:
            _kill(plan, {**note, "micro_step": count})
        step(run, loss)

    Run.step = counting_step  # type: ignore[method-assign]


def _before_operation(plan: ChaosPlan, after: int, note: dict[str, Any]) -> None:
    from dist_train.checkpoint.store import Store

    before, count, saving = Store._before, 0, False

    def counting_before(store: Any, kind: str, path: str, target: str = "") -> str:
        nonlocal count, saving
        saving = saving or ".saving-" in path
        if saving and (path.startswith("checkpoints") or kind == "symlink"):
            count += 1
            if count == after:
                _kill(plan, {**note, "operation": f"{kind} {path}"})
        return before(store, kind, path, target)

    Store._before = counting_before  # type: ignore[method-assign]


def _kill(plan: ChaosPlan, note: dict[str, Any]) -> None:
    descriptor = os.open(Path(plan.folder) / "fired.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, (json.dumps(note) + "\n").encode())
    os.fsync(descriptor)
    if note["everyone"]:
        for path in Path(plan.folder).glob("pid-*"):
            _kill_sibling(int(path.read_text()))
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_sibling(pid: int) -> None:
    """Only a process with our own parent: what was written may be of an earlier life."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if parent == os.getppid() and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    if VARIABLE in os.environ:
        arm(ChaosPlan(**json.loads(os.environ[VARIABLE])))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
