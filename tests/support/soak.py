"""Kills processes of a launched training at seeded moments until it ends, and watches what the launcher holds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.background import Background

SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Held:
    """What the launcher and the process that it forks workers from hold, at one moment."""

    seconds: float
    resident: int
    descriptors: int
    processes: int
    shared_memory: int


@dataclass
class Soak:
    """What was killed, and what was held meanwhile."""

    kills: list[str] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    family: set[tuple[int, float]] = field(default_factory=set)
    """Every process that was seen below the launcher."""
    seconds: float = 0.0
    worked_seconds: float = 0.0
    """From the start of the first worker to the launcher's end, by the clock on the wall."""

    def survivors(self) -> list[int]:
        """Processes that outlived the launcher."""
        return [pid for pid, created in self.family if _is_alive(pid, created)]

    def quarter(self, which: int, name: str) -> float:
        """Median of what was held in a quarter of the time, from 0."""
        part = [one for one in self.held if which <= 4 * one.seconds / max(self.seconds, 1e-9) < which + 1]
        values = sorted(getattr(one, name) for one in part)
        return float(values[len(values) // 2])


def soak(
    launch: Background, folder: Path, *, ranks: int, every_seconds: float, seed: int, deadline_seconds: float
) -> Soak:
    """Until the launch has ended. Between two kills lies a uniformly random time whose mean is `every_seconds`; the
    first one comes when there is something to lose.
    """
    launch.wait_until(lambda: any(folder.glob("a*.jsonl")), "the first step", deadline_seconds)
    first_worker = min(json.loads(path.read_text())[1] for path in folder.glob("pid-*"))
    rng, soaked, began = random.Random(seed), Soak(), time.monotonic()
    next_kill = rng.uniform(0.2, 1.8) * every_seconds
    next_sample = 0.0
    while launch.is_running:
        soaked.seconds = time.monotonic() - began
        assert soaked.seconds < deadline_seconds, f"still running after {deadline_seconds} s:\n{launch.output[-6000:]}"
        if soaked.seconds >= next_sample:
            next_sample = soaked.seconds + SAMPLE_SECONDS
            _look(launch.pid, _pids(folder, ranks), soaked)
        if soaked.seconds >= next_kill and (killed := _kill(folder, rng, ranks)):
            soaked.kills.append(killed)
            next_kill = soaked.seconds + rng.uniform(0.2, 1.8) * every_seconds
        time.sleep(0.02)
    soaked.worked_seconds = time.time() - first_worker
    return soaked


def _kill(folder: Path, rng: random.Random, ranks: int) -> str:
    """One rank, all of them, or one of a rank's loader workers; "" where nobody is there to be killed."""
    present = [one for rank in range(ranks) if (one := _worker(folder / f"pid-{rank}")) is not None]
    if len(present) < ranks:
        return ""
    kind = rng.choice(["rank", "rank", "all", "loader"])
    rank = rng.randrange(ranks)
    victims = present if kind == "all" else [present[rank]]
    if kind == "loader":
        children = _children(present[rank])
        kind, victims = ("loader", children[:1]) if children else ("rank", victims)
    for one in victims:
        try:
            one.send_signal(signal.SIGKILL)  # by its id and start: never another process's
        except psutil.NoSuchProcess:
            return ""
    return kind if kind == "all" else f"{kind} {rank}"


def _worker(path: Path) -> psutil.Process | None:
    try:
        pid, created = json.loads(path.read_text())
        process = psutil.Process(pid)
        return process if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def _pids(folder: Path, ranks: int) -> set[int]:
    workers = (_worker(folder / f"pid-{rank}") for rank in range(ranks))
    return {one.pid for one in workers if one is not None}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _look(launcher: int, workers: set[int], soaked: Soak) -> None:
    """Counts what the launcher holds and the process that it forks workers from: its children that are no workers."""
    try:
        root = psutil.Process(launcher)
        family, lasting = root.children(recursive=True), [root, *root.children()]
    except psutil.NoSuchProcess:
        return
    resident = descriptors = processes = 0
    for one in [root, *family]:
        with contextlib.suppress(psutil.Error):
            soaked.family.add((one.pid, one.create_time()))
            processes += one.status() != psutil.STATUS_ZOMBIE
            if one in lasting and one.pid not in workers:
                resident += one.memory_info().rss
                descriptors += one.num_fds()
    pids = {pid for pid, _ in soaked.family}
    names = [name for name in os.listdir("/dev/shm") if _owner(name) in pids]
    soaked.held.append(Held(soaked.seconds, resident, descriptors, processes, len(names)))


def _owner(name: str) -> int:
    """Of a name that torch has given in /dev/shm."""
    parts = name.split("_")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "torch" and parts[1].isdigit() else 0


def _is_alive(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
