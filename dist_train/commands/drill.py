"""`drill`: runs a script to its end, then again with faults, and says whether the two are the same.

Invariant: exit code 0 where it resumes exactly, 1 where it does not, 2 where it cannot be drilled (safely). What was
started is ended, and the scratch removed, also on Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dist_train.commands.command import AddCommand, print_json, print_lines
from dist_train.console import Console, print_text
from dist_train.drill.rehearse import Drill, Order
from dist_train.drill.report import facts_of, lines_of
from dist_train.errors import ExitCode

Json = Any
_CODES = {"pass": ExitCode.OK, "differ": ExitCode.ERROR, "cannot": ExitCode.USAGE, "unsafe": ExitCode.USAGE}


def add_commands(add: AddCommand) -> None:
    purpose = "Prove on your own script that it resumes exactly: run it, kill it, compare."
    drill = add("drill", _drill, purpose, on_a_run=False)
    defaults = Order(script=())
    drill.set_defaults(run_dir="")
    number: dict[str, Any] = {"type": _positive, "metavar": "N"}
    drill.add_argument("--kills", **number, default=defaults.kills, help=f"faults to inject ({defaults.kills})")
    drill.add_argument("--steps", **number, default=defaults.steps, help=f"most updates of a run ({defaults.steps})")
    drill.add_argument("--nproc-per-node", **number, default=1, dest="processes", help="ranks on this machine (1)")
    drill.add_argument("--seed", type=int, default=0, metavar="S", help="which faults come when (0)")
    patience = f"seconds that the uninterrupted run may take for one step ({defaults.patience_seconds:.0f})"
    drill.add_argument("--patience", type=float, default=defaults.patience_seconds, metavar="S", help=patience)
    drill.add_argument("--scratch", metavar="DIR", help="where the drill's runs live; a temporary folder by default")
    drill.add_argument("--keep", action="store_true", help="keep what it wrote: checkpoints, records, output")
    drill.add_argument("script", nargs=argparse.REMAINDER, metavar="-- SCRIPT ARGS", help="your script, as it is")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _drill(args: argparse.Namespace) -> int:
    script = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not script or (script[0] != "-m" and not os.path.isfile(script[0])):
        missing = f"there is no file {script[0]}" if script else "no script was given"
        print_text(f"dist-train: {missing}; write `dist-train drill -- train.py ARGS`.", error=True)
        return ExitCode.USAGE
    order = Order(
        script=script,
        kills=args.kills,
        steps=args.steps,
        processes=args.processes,
        seed=args.seed,
        patience_seconds=args.patience,
    )
    with _ended_by_signals():
        return _conduct(order, args)


def _conduct(order: Order, args: argparse.Namespace) -> int:
    try:
        scratch = _make_scratch(args.scratch)
    except OSError as error:
        print_text(
            f"dist-train: the drill's scratch folder cannot be made in {args.scratch or tempfile.gettempdir()}: "
            f"{error.strerror or error}. Name with --scratch a folder that you may write to.",
            error=True,
        )
        return ExitCode.USAGE
    # With --json stdout holds nothing but JSON; what is going on is then told beside it.
    console = Console(stream=sys.stderr if args.json else sys.stdout)
    try:
        faults = f"{args.kills} fault{'s' * (args.kills > 1)}"
        console.say(f"Drilling {' '.join(order.script)}: at most {args.steps} steps, {faults}, seed {args.seed}.")
        outcome = Drill(order, scratch, console.show, console.say).conduct()
        console.end_live()
        kept = str(scratch) if args.keep else None
        if args.json:
            print_json(facts_of(order, outcome, kept))
        else:
            print_lines([*lines_of(order, outcome), *([f"      Kept: {kept}"] if kept else [])])
        return _CODES[outcome.verdict]
    finally:
        console.end_live()
        if not args.keep:
            shutil.rmtree(scratch, ignore_errors=True)


def _make_scratch(place: str | None) -> Path:
    """A folder of this drill's own, in one that is made if it is missing."""
    if place is not None:
        os.makedirs(place, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="dist-train-drill-", dir=place)).resolve()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM (a scheduler, a CI) and SIGHUP (a closed terminal) end the drill as Ctrl-C does: by an exception, so that
    all is cleaned up. A further one does not interrupt that. One that is ignored (nohup) stays so.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for one in former:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    former = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    former = {one: handler for one, handler in former.items() if handler not in (None, signal.SIG_IGN)}
    for one in former:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)
