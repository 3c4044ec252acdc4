"""One worker: the user's script in a process of its own, as `python script.py` would run it, and why it ended told.

Invariant: what the script can see is what a fresh interpreter shows it: `__main__`, `sys.argv`, `sys.path[0]`, signal
dispositions, random seeds; stdin is empty. The hash seed alone is the fork server's, the same for all workers.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any

from dist_train import launched
from dist_train.errors import ExitCode

_BOOT = (
    "import sys; sys.path.append(sys.argv[1]) if sys.argv[1] not in sys.path else None; "
    "from importlib import import_module; sys.exit(import_module(sys.argv[2]).main(sys.argv[3:]))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What every worker runs."""

    name: str
    """Path of a script (or of a folder or zip with a `__main__.py`), or the name of a module."""
    arguments: Sequence[str] = ()
    is_module: bool = False

    @property
    def first_path(self) -> str:
        """What python puts first on `sys.path`."""
        if self.is_module:
            return os.getcwd()
        return os.path.realpath(self.name) if os.path.isdir(self.name) else os.path.dirname(os.path.realpath(self.name))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        return cls(**json.loads(text))


def boot_command(module: str, *arguments: str) -> list[str]:
    """A fresh interpreter with this one's flags that calls `main` of a module of ours.

    Not by `-m` and not by path: both would put a folder before the user's own on `sys.path`.
    """
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, *flags, "-c", _BOOT, root, module, *arguments]


def put_first_on_path(program: Program) -> None:
    """Replaces what `-c` has put there: the working directory, as "". With -P python puts nothing."""
    if not sys.flags.safe_path:
        sys.path[:1] = [program.first_path]


def main(arguments: list[str]) -> int:
    """A worker that is a fresh interpreter; its environment is set."""
    program = Program.from_json(arguments[0])
    put_first_on_path(program)
    return run_program(program)


def run_program(program: Program) -> int:
    """Runs it to its end, with this interpreter's `__main__` replaced; returns the exit code.

    An exception that escapes it is printed by the hook that the script may have set, without frames of ours.

    Raises:
        SystemExit: of the script, as it is.
    """
    sys.argv = [program.name, *program.arguments]
    sys.orig_argv = [sys.executable, *(["-m"] if program.is_module else []), *sys.argv]
    try:
        _execute(program)
        return ExitCode.OK
    except SystemExit as error:
        error.__traceback__ = _users_part(error.__traceback__)
        if error.code not in (None, 0):
            launched.note_error(error)
        raise
    except BaseException as error:
        error.__traceback__ = _users_part(error.__traceback__)
        launched.note_error(error)
        sys.excepthook(type(error), error, error.__traceback__)
        return ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.ERROR


def renew_randomness() -> None:
    """Forked processes would share the seeds that the server drew at its start."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _execute(program: Program) -> None:
    main_module = ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main_module
    if program.is_module:
        _run_as_main(program.name)
    elif os.path.isdir(program.name) or program.name.endswith((".zip", ".pyz")):
        sys.path.insert(0, program.name)
        _run_as_main("__main__")
    else:
        path = os.path.abspath(program.name)
        main_module.__dict__.update(__file__=path, __loader__=SourceFileLoader("__main__", path), __cached__=None)
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec")
        exec(code, main_module.__dict__)


def _run_as_main(name: str) -> None:
    """What `python -m` calls; the public `run_module` takes `__main__` away again before the exit handlers run."""
    runner: Any = runpy
    runner._run_module_as_main(name, alter_argv=True)


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """Without the frames between the interpreter's start and the script; none where the script never began."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
