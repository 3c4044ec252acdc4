"""`dist-train`: what a person does with a run directory from a terminal.

Invariant: it starts without torch, and answers a user's mistake with one paragraph on stderr, never with a traceback.
What a command does stands in `commands`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_train.commands import compare, drill, exchange, keep, launch, look, report
from dist_train.commands.command import refuse
from dist_train.errors import DistTrainError, ExitCode

_FAMILIES = (launch, look, report, keep, compare, exchange, drill)
_EXAMPLES = """\
examples:
  dist-train ls runs/ultra                        what there is, oldest first
  dist-train show runs/ultra                      the run and its newest checkpoint
  dist-train show runs/ultra --checkpoint best    the one with the best metric
  dist-train show runs/ultra --plot               a picture of loss and metrics, ultra.png
  dist-train report runs/ultra                    where its time went, and why it restarted
  dist-train verify runs/ultra                    read every byte, name what is wrong
  dist-train prune runs/ultra                     what the policy would delete
  dist-train pin runs/ultra best                  never delete this one
  dist-train diff runs/ultra best latest          what changed, tensor by tensor
  dist-train ls runs/ultra --json | jq -r '.[-1].path'
  dist-train export runs/ultra best               a .pth that plain torch loads
  dist-train import old.pth --run runs/ultra      go on from an old script's file
  dist-train pack runs/ultra                      best and latest as a zip to download
  dist-train drill -- train.py --lr 3e-4          kill your script, prove that it resumes

exit codes: 0 all is well; 1 something is wrong: damage, no such run, no
checkpoint; 2 wrong usage. Only import, prune --yes, pin and unpin change a run,
which may be training meanwhile.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        _close_stdout()
        return ExitCode.ERROR
    except DistTrainError as error:
        return refuse(str(error))
    except OSError as error:
        path, why = error.filename or args.run_dir, error.strerror or error
        return refuse(f"{path} cannot be read: {why}. Check the path and that you may read it, then try again.")
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    purpose = "What to do with the run directories of dist_train."
    parser = argparse.ArgumentParser(prog="dist-train", description=purpose, **layout)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], purpose: str, *, on_a_run: bool = True
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=purpose, description=purpose, **layout)
        one.set_defaults(command=command)
        if on_a_run:
            one.add_argument("run_dir", metavar="RUN", help="run directory: the run_dir of the training")
        one.add_argument("--json", action="store_true", help="for programs: JSON on stdout")
        return one

    for family in _FAMILIES:
        family.add_commands(add)
    return parser


def _close_stdout() -> None:
    """Lets the interpreter's last flush go nowhere, quietly."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
