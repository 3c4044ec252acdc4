"""The worker processes of one run on this machine, by rank, so that a fault can meet all of them at one moment.

Invariant: a signal goes only to a process that said itself which rank it is and that still is the same process: ids
come again, the time at which a process was started does not. [stdlib only]
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

_PREFIX = "pid-"


def say_pid(folder: Path, rank: int) -> None:
    """This process is that rank from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{_PREFIX}{rank}-{os.getpid()}"
    draft.write_text(f"{os.getpid()} {_started(os.getpid())}")
    draft.replace(folder / f"{_PREFIX}{rank}")


def signal_rank(folder: Path, rank: int, what: signal.Signals) -> None:
    """To one rank; nothing happens where it has not said who it is, or is gone."""
    with contextlib.suppress(OSError, ValueError):
        pid, started = (folder / f"{_PREFIX}{rank}").read_text().split()
        if _started(int(pid)) == started:
            os.kill(int(pid), what)


def signal_all(folder: Path, what: signal.Signals) -> None:
    """To every rank but this process, and then to this process."""
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        rank = path.name.removeprefix(_PREFIX)
        if path.read_text().split()[0] != str(os.getpid()):
            signal_rank(folder, int(rank), what)
    os.kill(os.getpid(), what)


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; empty for none, and on a platform that does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
