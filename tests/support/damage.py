"""What a disk, a crash or a person may do to a committed file, and what a run directory holds before and after."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Damage:
    """One way to spoil one file: `flip` (seed), `truncate` (a share of its length, or bytes below zero), `delete`."""

    kind: str
    amount: float = 0

    def apply(self, path: Path) -> None:
        data = path.read_bytes()
        if self.kind == "delete":
            path.unlink()
        elif self.kind == "truncate":
            length = len(data) + int(self.amount) if self.amount < 0 else int(len(data) * self.amount)
            os.truncate(path, length)
        else:
            rng = random.Random(f"{path.name} {self.amount}")
            place = rng.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        assert not path.exists() or path.read_bytes() != data, "the damage did nothing"

    def __str__(self) -> str:
        return f"{self.kind}-{self.amount:g}" if self.kind != "delete" else self.kind


DAMAGES = [
    *(Damage("flip", seed) for seed in range(3)),
    *(Damage("truncate", share) for share in (0, 0.1, 0.5, -1)),
    Damage("delete"),
]


def checkpoint_names(run_dir: str | Path) -> list[str]:
    """Committed folders, oldest first."""
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").glob("step-*"))


def events(run_dir: str | Path, kind: str = "") -> list[dict[str, Any]]:
    """Lines of run.jsonl, of one kind if given."""
    lines = [json.loads(line) for line in (Path(run_dir) / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in ("", line["event"])]


def contents(folder: str | Path) -> dict[str, str]:
    """Path -> digest of every file, target of every link, "" of every directory."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        else:
            text = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(folder))] = text
    return found


def copy_run(run_dir: str | Path, target: Path) -> Path:
    shutil.copytree(run_dir, target, symlinks=True)
    return target
