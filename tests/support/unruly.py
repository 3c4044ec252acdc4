"""A script for the launcher's tests: fails as its first argument says, or shows what a worker sees of the world.

unruly.py import | exit CODE | late | look FILE
"""

from __future__ import annotations

import atexit
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader


def look(path: Path) -> None:
    """What a fresh interpreter would show, and whether processes can be started from here."""
    loaders = [DataLoader(list(range(4)), num_workers=1, multiprocessing_context=how) for how in ("fork", "spawn")]
    seen: dict[str, Any] = {
        "argv": sys.argv,
        "file": __file__,
        "name": __name__,
        "main": sys.modules["__main__"].__file__,
        "path": sys.path[0],
        "cwd": os.getcwd(),
        "stdin": sys.stdin.read(),
        "session": os.getsid(0) == os.getpid(),
        "loaded": [torch.cat(list(loader)).tolist() for loader in loaders],
        "threads": torch.get_num_threads(),
        "seeds": [torch.initial_seed(), random.random()],
        "environment": {name: os.environ[name] for name in os.environ if "RANK" in name or "TORCHELASTIC" in name},
        "size": os.environ["WORLD_SIZE"],
    }
    atexit.register(lambda: path.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(seen)))


def main() -> None:
    what = sys.argv[1]
    if what == "import":
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    elif what == "exit":
        sys.exit(int(sys.argv[2]))
    elif what == "late":
        time.sleep(600)
    elif what == "look":
        look(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
