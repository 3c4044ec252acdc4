"""Runs the specimen as if each rank were a node with a disk of its own: a `--run-dir` that is not shared.

split_directories.py --run-dir DIR ...     rank r writes below DIR/node-r and calls itself node-r
"""

from __future__ import annotations

import os
import socket
import sys

rank = os.environ["RANK"]
os.environ["LOCAL_RANK"] = "0"
socket.gethostname = lambda: f"node-{rank}"
place = sys.argv.index("--run-dir") + 1
sys.argv[place] = os.path.join(sys.argv[place], f"node-{rank}", "run")

from tests.support import specimen  # noqa: E402

sys.exit(specimen.main())
