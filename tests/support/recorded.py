"""Runs a script, and once more with other arguments in the same process, while every store's changes go to a log.

recorded.py SCRIPT ARGS... --then ARGS...      the log is the file named by the variable STORE_LOG
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

VARIABLE = "STORE_LOG"


def record_changes(log: str) -> None:
    """One line a change, before it happens; appended whole by all threads and ranks."""
    from dist_train.checkpoint.store import Store

    before = Store._before
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def recording_before(store: Any, kind: str, path: str, target: str = "") -> str:
        absolute = target if kind == "symlink" or not target else str(store.root / target)
        line = {"pid": os.getpid(), "kind": kind, "path": str(store.root / path), "target": absolute}
        os.write(descriptor, (json.dumps(line) + "\n").encode())
        return before(store, kind, path, target)

    Store._before = recording_before  # type: ignore[method-assign]


def run(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise


if __name__ == "__main__":
    record_changes(os.environ[VARIABLE])
    script, arguments = sys.argv[1], sys.argv[2:]
    middle = arguments.index("--then")
    run(script, arguments[:middle])
    run(script, arguments[middle + 1 :])
