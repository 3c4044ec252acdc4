"""Runs a script as it is, with the faults of the environment armed in it.

    python -m dist_train.drill.victim train.py ARGS...
    torchrun --nproc-per-node 2 -m dist_train.drill.victim train.py ARGS...
    accelerate launch -m dist_train.drill.victim train.py ARGS...

Invariant: for the script all is as if it had been started itself: its name, arguments, path of imports and exit code.
Without faults in the environment nothing else happens.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from dist_train.drill.fault_plan import FaultPlan
from dist_train.drill.rehearsal import Rehearsal
from dist_train.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Arms, then runs `script.py args` or `-m module args`; what the script raises comes out."""
    if not arguments or (arguments[0] == "-m" and len(arguments) < 2):
        raise ConfigError("usage: python -m dist_train.drill.victim SCRIPT ARGS... (or -m MODULE ARGS...)")
    if (rehearsal := Rehearsal.from_environment()) is not None:
        from dist_train.drill.recorder import Recorder

        rehearsal.arm()
        Recorder(rehearsal.folder, int(os.environ.get("RANK", "0"))).arm()
    if (plan := FaultPlan.from_environment()) is not None:
        from dist_train.drill.injector import Injector

        Injector(plan, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))).arm()
    run_script(arguments)


def run_script(arguments: Sequence[str]) -> None:
    """As the interpreter would."""
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
