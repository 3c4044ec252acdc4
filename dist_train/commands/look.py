"""`ls`, `show`, `verify`: what lies in a run directory, and whether it is whole.

Invariant: these change nothing and need neither torch nor the model. Facts come from `checkpoint.overview`, their text
from `checkpoint.listing`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from dist_train.checkpoint.catalog import Found, find_abandoned, read_checkpoint
from dist_train.checkpoint.listing import abandoned_lines, list_lines, result_lines, show_lines, verdict_lines
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME
from dist_train.checkpoint.overview import (
    abandoned_row,
    describe_checkpoint,
    describe_run,
    find_leftovers,
    list_rows,
    problem_text,
    tensors_between,
)
from dist_train.checkpoint.selection import find_checkpoints, open_run, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.commands.command import AddCommand, print_json, print_lines, refuse, selector
from dist_train.console import ByteMeter, print_text
from dist_train.errors import CheckpointError, ExitCode

Json = Any


def add_commands(add: AddCommand) -> None:
    ls = add("ls", _ls, "List the checkpoints of a run, oldest first.")
    ls.add_argument("--all", action="store_true", help="besides, those that a branch left behind in abandoned/")
    show = add("show", _show, "Show how a run stands, and all about one checkpoint.")
    which: dict[str, Any] = {"type": selector, "metavar": "WHICH"}
    names = "latest, best, epoch:N, step:N or a path"
    show.add_argument("--checkpoint", default="latest", help=f"{names}; latest by default", **which)
    show.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="besides, a picture of loss and metrics; NAME-OF-RUN.png by default",
    )
    show.add_argument(
        "--with", action="append", default=[], dest="others", metavar="RUN", help="another run in the plot"
    )
    show.add_argument("--log", action="store_true", help="the plot's loss on a logarithmic scale")
    verify = add("verify", _verify, "Read every byte and compare it with what was committed.")
    choice = verify.add_mutually_exclusive_group()
    choice.add_argument("--checkpoint", help=f"{names}; by default every checkpoint of the run", **which)
    choice.add_argument("--all", action="store_true", help="besides, those that a branch left behind in abandoned/")


def _ls(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    rows = list_rows(store)
    left = [read_checkpoint(store, path) for path in find_abandoned(store)] if args.all else []
    if args.json:
        return print_json([*rows, *(abandoned_row(store, one) for one in left)])
    if not rows:
        print_text(f"{args.run_dir} holds no checkpoint yet.")
    print_lines(list_lines(rows, find_leftovers(store)))
    print_lines(abandoned_lines([abandoned_row(store, one) for one in left]))
    return ExitCode.OK


def _show(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir, or_checkpoint=True)
    plot = None if args.plot is None else _plot(store, args)
    home, found = select_checkpoint(store, args.checkpoint)
    if found.manifest is None:
        return refuse(f"{found.problem} Choose another one: `dist-train ls {args.run_dir}` lists them.")
    run = None if store.exists(MANIFEST_NAME) else describe_run(store)  # a checkpoint that belongs to no run
    checkpoint = describe_checkpoint(home, found.path, found.manifest)
    if args.json:
        facts = {"run": run, "checkpoint": checkpoint}
        return print_json(facts if plot is None else {**facts, "plot": plot})
    print_lines(show_lines(run, checkpoint))
    print_lines([] if plot is None else ["", f"Plot written: {plot}"])
    return ExitCode.OK


def _plot(store: Store, args: argparse.Namespace) -> str:
    from dist_train.commands.plot import write_plot

    path = args.plot or f"{os.path.basename(os.path.abspath(args.run_dir))}.png"
    write_plot([store, *map(open_run, args.others)], path, log_scale=args.log)
    return str(path)


def _verify(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir, or_checkpoint=True)
    targets = _targets(store, args)
    width = max(len(_name(found)) for _, found in targets)
    meter = ByteMeter(sum(found.manifest.num_bytes for _, found in targets if found.manifest), sys.stderr)
    results: list[dict[str, Json]] = []
    try:
        for home, found in targets:
            result = _verify_one(home, found, meter)
            if result is None:
                continue
            results.append(result)
            meter.pause()
            print_lines([] if args.json else result_lines(result, _name(found), width))
    finally:
        meter.pause()
    damaged = sum(not result["ok"] for result in results)
    if args.json:
        sums = {"bytes": meter.done, "seconds": meter.seconds}
        print_json({"run_dir": args.run_dir, "ok": not damaged, **sums, "checkpoints": results})
    else:
        print_lines(verdict_lines(len(results), damaged, meter.done, meter.seconds))
    return ExitCode.ERROR if damaged else ExitCode.OK


def _targets(store: Store, args: argparse.Namespace) -> list[tuple[Store, Found]]:
    if args.checkpoint:
        return [select_checkpoint(store, args.checkpoint)]
    found = find_checkpoints(store)
    if args.all:
        found += [read_checkpoint(store, path) for path in find_abandoned(store)]
    return [(store, one) for one in found] or [select_checkpoint(store, "latest")]


def _verify_one(store: Store, found: Found, meter: ByteMeter) -> dict[str, Json] | None:
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


def _damages(store: Store, found: Found, meter: ByteMeter) -> list[dict[str, Json]]:
    from dist_train.checkpoint.verify import verify_as_it_is  # brings xxhash, which ls and show do not need

    assert found.manifest is not None
    meter.name = _name(found)
    damages = []
    for one in verify_as_it_is(store, found.path, found.manifest, meter.add):
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
