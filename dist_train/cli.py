"""`dist-train`: what lies in a run directory, and whether it is whole.

Invariant: it changes nothing, starts without torch, and answers a user's mistake with one paragraph on stderr, never
with a traceback. With --json, stdout holds valid JSON or nothing. Facts come from `checkpoint.overview`, their text
from `checkpoint.listing`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_train.checkpoint.catalog import Found, read_checkpoint
from dist_train.checkpoint.listing import list_lines, result_lines, show_lines, verdict_lines
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME
from dist_train.checkpoint.overview import (
    describe_checkpoint,
    describe_run,
    find_abandoned,
    find_leftovers,
    list_rows,
    problem_text,
    tensors_between,
)
from dist_train.checkpoint.selection import find_checkpoints, open_run, parse_step_selector, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.console import Console, bytes_text, print_text
from dist_train.errors import CheckpointError, DistTrainError, ExitCode

Json = Any
_SECONDS_BETWEEN_DRAWS = 0.1
_EXAMPLES = """\
examples:
  dist-train ls runs/ultra                        what there is, oldest first
  dist-train show runs/ultra                      the run and its newest checkpoint
  dist-train show runs/ultra --checkpoint best    the one with the best metric
  dist-train verify runs/ultra                    read every byte, name what is wrong
  dist-train ls runs/ultra --json | jq -r '.[-1].path'

exit codes: 0 all is well; 1 something is wrong: damage, no such run, no
checkpoint; 2 wrong usage. Nothing is ever changed, and the run may be training.
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
        return _fail(str(error))
    except OSError as error:
        path, why = error.filename or args.run_dir, error.strerror or error
        return _fail(f"{path} cannot be read: {why}. Check the path and that you may read it, then try again.")
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    purpose = "Looks into the run directories of dist_train."
    parser = argparse.ArgumentParser(prog="dist-train", description=purpose, **layout)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], purpose: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=purpose, description=purpose, **layout)
        one.set_defaults(command=command)
        one.add_argument("run_dir", metavar="RUN", help="run directory: the run_dir of the training")
        one.add_argument("--json", action="store_true", help="for programs: JSON on stdout")
        return one

    add("ls", _ls, "List the checkpoints of a run, oldest first.")
    show = add("show", _show, "Show how a run stands, and all about one checkpoint.")
    which: dict[str, Any] = {"type": _selector, "metavar": "WHICH"}
    names = "latest, best, step:N or a path"
    show.add_argument("--checkpoint", default="latest", help=f"{names}; latest by default", **which)
    verify = add("verify", _verify, "Read every byte and compare it with what was committed.")
    choice = verify.add_mutually_exclusive_group()
    choice.add_argument("--checkpoint", help=f"{names}; by default every checkpoint of the run", **which)
    choice.add_argument("--all", action="store_true", help="besides, those that a branch left behind in abandoned/")
    return parser


def _selector(text: str) -> str:
    if not text or (text.startswith("step:") and parse_step_selector(text) is None):
        raise argparse.ArgumentTypeError(f"{text!r} is no checkpoint; write latest, best, step:1200 or a path")
    return text


def _ls(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    rows = list_rows(store)
    if args.json:
        return _print_json(rows)
    if not rows:
        print_text(f"{args.run_dir} holds no checkpoint yet.")
    _print_lines(list_lines(rows, find_leftovers(store)))
    return ExitCode.OK


def _show(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    home, found = select_checkpoint(store, args.checkpoint)
    if found.manifest is None:
        return _fail(f"{found.problem} Choose another one: `dist-train ls {args.run_dir}` lists them.")
    facts = {"run": describe_run(store), "checkpoint": describe_checkpoint(home, found.path, found.manifest)}
    if args.json:
        return _print_json(facts)
    _print_lines(show_lines(facts["run"], facts["checkpoint"]))
    return ExitCode.OK


def _verify(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    targets = _targets(store, args)
    width = max(len(_name(found)) for _, found in targets)
    meter = _Meter(sum(found.manifest.num_bytes for _, found in targets if found.manifest))
    results: list[dict[str, Json]] = []
    try:
        for home, found in targets:
            result = _verify_one(home, found, meter)
            if result is None:
                continue
            results.append(result)
            meter.pause()
            _print_lines([] if args.json else result_lines(result, _name(found), width))
    finally:
        meter.pause()
    damaged = sum(not result["ok"] for result in results)
    if args.json:
        sums = {"bytes": meter.done, "seconds": meter.seconds}
        _print_json({"run_dir": args.run_dir, "ok": not damaged, **sums, "checkpoints": results})
    else:
        _print_lines(verdict_lines(len(results), damaged, meter.done, meter.seconds))
    return ExitCode.ERROR if damaged else ExitCode.OK


def _targets(store: Store, args: argparse.Namespace) -> list[tuple[Store, Found]]:
    if args.checkpoint:
        return [select_checkpoint(store, args.checkpoint)]
    found = find_checkpoints(store)
    if args.all:
        found += [read_checkpoint(store, path) for path in find_abandoned(store)]
    return [(store, one) for one in found] or [select_checkpoint(store, "latest")]


def _verify_one(store: Store, found: Found, meter: _Meter) -> dict[str, Json] | None:
    """None for a checkpoint that was pruned while it was read."""
    manifest = found.manifest
    damages = _damages(store, found, meter) if manifest else [_manifest_damage(found.problem)]
    if damages and not store.is_directory(found.path):
        return None
    return {
        "path": store.shown(found.path),
        "ok": not damages,
        "bytes": manifest.num_bytes if manifest else 0,
        "files": len(manifest.files) if manifest else 0,
        "damages": damages,
    }


def _damages(store: Store, found: Found, meter: _Meter) -> list[dict[str, Json]]:
    from dist_train.checkpoint.verify import verify_checkpoint  # brings xxhash, which ls and show do not need

    assert found.manifest is not None
    meter.name = _name(found)
    damages = []
    for one in verify_checkpoint(store, found.path, found.manifest, on_bytes=meter.add):
        where = {"file": one.file, "problem": one.problem, "start": one.start, "stop": one.stop}
        known = one.start is not None and one.stop is not None and one.file.endswith(".safetensors")
        tensors = tensors_between(store, found, one.file, one.start or 0, one.stop or 0) if known else []
        damages.append({**where, "tensors": tensors})
    return damages


def _manifest_damage(problem: CheckpointError | None) -> dict[str, Json]:
    assert problem is not None
    return {"file": MANIFEST_NAME, "problem": problem_text(problem), "start": None, "stop": None, "tensors": []}


def _name(found: Found) -> str:
    return found.path.removeprefix(f"{CHECKPOINTS}/")


class _Meter:
    """How far a verification is, as a live line on a terminal."""

    def __init__(self, total: int) -> None:
        self.done = 0
        self.name = ""
        self._total = total
        self._console = Console(stream=sys.stderr)
        self._started = time.monotonic()
        self._drawn = self._started

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWS:
            self._drawn = now
            speed = bytes_text(self.done / (now - self._started))
            self._console.show(f"{self.name}  {bytes_text(self.done)} of {bytes_text(self._total)}, {speed}/s")

    def pause(self) -> None:
        self._console.end_live()


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print_text(line)


def _print_json(value: Json) -> int:
    print_text(json.dumps(_finite(value), indent=2, allow_nan=False))
    return ExitCode.OK


def _finite(value: Json) -> Json:
    """NaN and infinities as strings: JSON has none."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _fail(message: str) -> int:
    print_text(f"dist-train: {' '.join(message.split())}", error=True)
    return ExitCode.ERROR


def _close_stdout() -> None:
    """Lets the interpreter's last flush go nowhere, quietly."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
