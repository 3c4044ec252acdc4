"""Whether a directory is as it was: names, sizes, times and modes of everything below it, and the bytes of small files.

Invariant: reading it changes nothing but access times. Large files are not read: a run directory may hold terabytes,
and nobody changes a file without its time. [stdlib only]
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SMALL_BYTES: Final = 1 << 20
MOST_FILES: Final = 50_000
_IGNORED: Final = frozenset({".git", "__pycache__", ".venv", "node_modules", ".ipynb_checkpoints"})


def listing(directory: Path, *, contents: bool = True) -> dict[str, str]:
    """Relative path -> what would differ if it were changed; of the first MOST_FILES files."""
    found: dict[str, str] = {}
    for folder, names, files in os.walk(directory):
        names[:] = sorted(set(names) - _IGNORED)
        for name in sorted(files):
            if len(found) >= MOST_FILES:
                return found
            path = os.path.join(folder, name)
            found[os.path.relpath(path, directory)] = _describe(path, contents)
    return found


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What two listings do not share: changed, made or removed."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def is_own_output(path: str | Path) -> bool:
    """Whether this process's stdout or stderr goes to that file."""
    for stream in (1, 2):
        try:
            facts = os.fstat(stream)
            if stat.S_ISREG(facts.st_mode) and os.path.samestat(facts, os.stat(path)):
                return True
        except OSError:
            continue
    return False


def _describe(path: str, contents: bool) -> str:
    try:
        facts = os.lstat(path)
        text = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_mode}"
        if contents and facts.st_size <= SMALL_BYTES and not os.path.islink(path):
            with open(path, "rb") as file:
                text += " " + hashlib.sha256(file.read()).hexdigest()
        return text
    except OSError as error:
        return type(error).__name__
