"""One worker: the user's script in a process of its own, as `python script.py` would run it, and why it ended told.

Invariant: what the script can see is what a fresh interpreter shows it: `__main__`, `sys.argv`, `sys.path[0]`, signal
dispositions, random seeds; stdin is empty. The hash seed alone is the fork server's, the same for all workers.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from dist_train import launched
from dist_train.console import print_text
from dist_train.errors import ExitCode

THREADS_SECONDS = 30.0
"""For threads of the script that are no daemons, after an error."""
_BOOT = """
import sys
_, first, root, module, *arguments = sys.argv
if not sys.flags.safe_path:  # with -P python has put nothing there, else the working directory
    sys.path[0] = first
if root not in sys.path:
    sys.path.append(root)
from importlib import import_module
sys.exit(import_module(module).main(arguments))
"""


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


def boot_command(module: str, program: Program, *arguments: str) -> list[str]:
    """A fresh interpreter with this one's flags that calls `main` of a module of ours, with the program's folder first
    on `sys.path` before it imports anything.
    """
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, *flags, "-c", _BOOT, program.first_path, root, module, program.to_json(), *arguments]


def main(arguments: list[str]) -> int:
    """A worker that is a fresh interpreter; its environment is set."""
    return run_program(Program.from_json(arguments[0]))


def run_program(program: Program) -> int:
    """Runs it to its end, with this interpreter's `__main__` replaced; returns the exit code, 0.

    An exception that escapes it is printed by the hook that the script may have set, without frames of ours. Then the
    exit handlers run and the process leaves at once: taking a thousand modules apart would take a second, in which
    the others cannot start anew.
    """
    sys.argv = [program.name, *program.arguments]
    sys.orig_argv = [sys.executable, *(["-m"] if program.is_module else []), *sys.argv]
    try:
        _execute(program)
    except SystemExit as error:
        if error.code not in (None, 0):
            _leave(_code_of(error), error)
    except BaseException as error:
        error.__traceback__ = _users_part(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(ExitCode.INTERRUPTED if isinstance(error, KeyboardInterrupt) else ExitCode.ERROR, error)
    return ExitCode.OK


def _leave(code: int, error: BaseException) -> NoReturn:
    """What the interpreter does at its end, but for the taking apart, and for waiting for ever for a thread that is no
    daemon: the launcher starts the workers again when this one has left.
    """
    error.__traceback__ = _users_part(error.__traceback__)
    launched.note_error(error)
    leaves = threading.Lock()  # is held by the one thread that ends this process

    def leave_without_threads() -> None:
        if leaves.acquire(blocking=False):
            _say_who_stays(THREADS_SECONDS)
            _end(code)

    late = threading.Timer(THREADS_SECONDS, leave_without_threads)
    late.daemon = True
    late.start()
    internals: Any = threading
    internals._shutdown()  # waits for threads that are no daemons
    if not leaves.acquire(blocking=False):
        late.join(THREADS_SECONDS)
    _end(code)


def _end(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, or a pipe that nobody reads
            stream.flush()
    os._exit(code)


def _say_who_stays(seconds: float) -> None:
    names = [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    print_text(
        f"Rank {os.environ.get('RANK', '0')} has failed and leaves without its threads {', '.join(names)}, which did "
        f"not end within {seconds:g} s. Make them daemons, or end them when the training fails.",
        error=True,
    )


def _code_of(error: SystemExit) -> int:
    """As python does it: what is no number is said, and means 1."""
    if isinstance(error.code, int):
        return error.code & 0xFF
    print_text(str(error.code), error=True)
    return ExitCode.ERROR


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
