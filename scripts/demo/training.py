"""One launch of plain torchrun: its lines, its workers, its end. Knows nothing of dist_train.

Invariant: whatever happens to the demo, short of SIGKILL, no process that it started outlives it; each is ended by its
own id, never by its name. Workers have sessions of their own, so a process group would not reach them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

TICK_SECONDS = 0.05
GRACE_SECONDS = 10.0
"""How long torchrun may take to end its workers before all of them are killed."""
LAUNCHER = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Training:
    """A training script under torchrun, as a context manager that leaves nothing behind.

    What the script prints comes out of `lines`; all output, torchrun's own reports included, goes to `log`.
    """

    def __init__(self, script: Sequence[str], log: Path, deadline_seconds: float) -> None:
        self.log = log
        self._deadline = time.monotonic() + deadline_seconds
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log = log.open("a", encoding="utf-8", errors="replace")
        self._process = psutil.Popen(
            [sys.executable, "-m", "torch.distributed.run", *LAUNCHER[1:], *script],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to the demo alone, which then ends everything in order
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # the log is closed: the demo is leaving
                print(line, end="", file=self._log, flush=True)
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._log.close()

    def lines(self) -> Iterator[str | None]:
        """What the script prints, line by line, with None in between whenever there is time to look around."""
        while True:
            try:
                line = self._lines.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                if time.monotonic() > self._deadline:
                    raise DemoError(f"the training is not done by its deadline; see {self.log}") from None
                continue
            if line is None:
                return
            yield line

    def wait(self) -> int:
        """Torchrun's exit code, once it has nothing more to say."""
        try:
            return int(self._process.wait(timeout=GRACE_SECONDS))
        except psutil.TimeoutExpired:
            raise DemoError(f"torchrun does not end; see {self.log}") from None

    def find_worker(self, rank: int) -> psutil.Process | None:
        """The live child of torchrun that it made this rank."""
        for child in self._process.children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == str(rank):
                    return child
        return None

    def end(self) -> None:
        """Ends what still runs: torchrun politely, which ends its workers, then whoever is left."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family = self._process.children(recursive=True)
            self._process.terminate()
        psutil.wait_procs([self._process, *family], timeout=GRACE_SECONDS)
        for process in [self._process, *family]:
            with contextlib.suppress(psutil.Error):  # gone; psutil never signals a stranger who got the number since
                process.kill()
