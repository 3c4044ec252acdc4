"""The folder of one attempt's hang: how the ranks' watchdogs talk when collectives cannot, and what they leave behind.

    hangs/a000007/asked            a rank is near its deadline: who is at work with time left, says so
                  working-2.json   rank 2 is; renewed as long as it is
                  hung.json        the verdict: who is hung, where, since when; from then on all ranks leave
                  rank-3.txt       the stacks of all threads of rank 3
                  told             the verdict is in run.jsonl

Invariant: the verdict is passed once. Folders are listed, not probed for names: NFS remembers for half a minute that a
name is not there, and looks again when a folder is opened. It waits for nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = Any
HANGS = "hangs"
VERDICT = "hung.json"
_ASKED = "asked"
_TOLD = "told"
_STACKS = re.compile(r"rank-(\d+)\.txt")
_WORKING = re.compile(r"working-(\d+)\.json")


class HangFolder:
    """Of one attempt. A file system that fails raises OSError in what writes; what reads finds nothing."""

    def __init__(self, run_dir: Path, attempt: int, rank: int) -> None:
        self.path = run_dir / HANGS / f"a{attempt:06d}"
        self._rank = rank
        self._has_asked = self._works = False

    def names(self) -> frozenset[str]:
        """What lies there; nothing as long as no rank has asked."""
        try:
            return frozenset(os.listdir(self.path))
        except OSError:
            return frozenset()

    def ask(self) -> None:
        """Who is at work with time left is to say so."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _ASKED).touch()
        self._has_asked = True

    def withdraw(self) -> None:
        """It went on after all: takes away what this rank has put here."""
        self.work_is_over()
        if self._has_asked:
            self._has_asked = False
            self._remove(_ASKED)

    @staticmethod
    def is_asked(names: frozenset[str]) -> bool:
        return _ASKED in names

    def say_working(self, **what: Json) -> None:
        """This rank is at work and has time left: whoever waits for it is not hung."""
        _replace(self.path / f"working-{self._rank}.json", what)
        self._works = True

    def work_is_over(self) -> None:
        """Takes that back."""
        if self._works:
            self._works = False
            self._remove(f"working-{self._rank}.json")

    def working(self, names: frozenset[str]) -> dict[int, bytes]:
        """What the ranks at work have said last; it differs each time that they renew it."""
        found = {}
        for name in names:
            if (match := _WORKING.fullmatch(name)) and int(match[1]) != self._rank:
                with contextlib.suppress(OSError):
                    found[int(match[1])] = (self.path / name).read_bytes()
        return found

    def _remove(self, name: str) -> None:
        """With the folder when that was all."""
        (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is more in it
            self.path.rmdir()
            self.path.parent.rmdir()

    def pass_verdict(self, verdict: Mapping[str, Json]) -> bool:
        """Whether this rank was the first."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with (self.path / VERDICT).open("x") as file:
                file.write(json.dumps(verdict))
        except FileExistsError:
            return False
        return True

    def verdict(self, names: frozenset[str]) -> dict[str, Json] | None:
        """None before it is passed, and while it is being written."""
        return _read(self.path / VERDICT) if VERDICT in names else None

    def take_back_verdict(self) -> None:
        """What hung goes on: takes away the verdict, and this rank's stacks, which a next verdict would count."""
        self._remove(VERDICT)
        self._remove(f"rank-{self._rank}.txt")

    def is_verdict_gone(self) -> bool:
        """Whether the rank that passed the verdict that was seen has taken it back."""
        try:
            return VERDICT not in os.listdir(self.path)
        except OSError:
            return False  # nobody knows

    def write_stacks(self, text: str) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"rank-{self._rank}.txt"
        with path.open("a") as file:
            file.write(text)
        return path

    @staticmethod
    def ranks_with_stacks(names: frozenset[str]) -> set[int]:
        return {int(match[1]) for name in names if (match := _STACKS.fullmatch(name))}

    def line_of(self, rank: int, beginning: str) -> str:
        """The rest of the line that begins so in a rank's stacks; empty where there is none."""
        with contextlib.suppress(OSError):
            for line in (self.path / f"rank-{rank}.txt").read_text().splitlines():
                if line.startswith(beginning):
                    return line.removeprefix(beginning)
        return ""

    def mark_told(self) -> None:
        """run.jsonl has it."""
        (self.path / _TOLD).touch()


def untold_hangs(run_dir: Path) -> Iterator[tuple[Path, dict[str, Json]]]:
    """(folder, verdict) of each hang that no rank could write into run.jsonl; marks it as told when asked for more."""
    with contextlib.suppress(OSError):
        for path in sorted((run_dir / HANGS).iterdir()):
            verdict = None if (path / _TOLD).exists() else _read(path / VERDICT)
            if verdict is not None:
                yield path, verdict
                (path / _TOLD).touch()


def _read(path: Path) -> dict[str, Json] | None:
    try:
        found: dict[str, Json] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return None


def _replace(path: Path, content: Mapping[str, Json]) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(content))
    draft.replace(path)
