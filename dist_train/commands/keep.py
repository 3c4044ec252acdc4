"""`prune`, `pin`, `unpin`: what stays in a run directory.

Invariant: `prune` changes nothing without --yes, and then never what a run that is training may be using. What may go
is decided in `checkpoint.retention`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.ownership import newest_attempt
from dist_train.checkpoint.pins import pin, unpin
from dist_train.checkpoint.pruning import Pruning, open_pruning
from dist_train.checkpoint.pruning_listing import done_line, name_of, plan_lines, summary_lines
from dist_train.checkpoint.retention import Decision, Verdict
from dist_train.checkpoint.selection import open_run, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.commands.command import AddCommand, print_json, print_lines, selector
from dist_train.console import ByteMeter, EventLog, print_text
from dist_train.errors import ConfigError, ExitCode, NoCheckpointError, StorageError
from dist_train.units import parse_bytes

Json = Any
_COUNTS = {
    "keep_last": "newest checkpoints to keep",
    "keep_best": "checkpoints with the best metric to keep besides; 0 for none",
    "keep_every_epochs": "keep every K-th epoch for ever; 0 for none",
    "keep_every_steps": "keep multiples of this step for ever; 0 for none",
    "keep_optimizer": "newest ones that keep the optimizer, older ones become weights-only; 0 for all",
}
_NEVER_NONE = ("keep_last", "keep_best")


def add_commands(add: AddCommand) -> None:
    prune = add("prune", _prune, "Show what the policy would delete and why; --yes does it.")
    policy = prune.add_argument_group("policy", "by default the one that the newest checkpoint was saved by")
    for name, purpose in _COUNTS.items():
        policy.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help=purpose)
    policy.add_argument("--max-bytes", type=_size, metavar="SIZE", help="for all of RUN, like 18GB; 0 for no limit")
    prune.add_argument("--abandoned", action="store_true", help="besides, what branches left behind")
    prune.add_argument("--corrupt", action="store_true", help="besides, what was set aside because it is damaged")
    consent = prune.add_mutually_exclusive_group()
    consent.add_argument("--dry-run", action="store_true", help="change nothing: the default")
    consent.add_argument("--yes", action="store_true", help="do it")
    for name, command, purpose in (
        ("pin", _pin, "Keep a checkpoint from being deleted or made weights-only."),
        ("unpin", _unpin, "Let retention have a pinned checkpoint again."),
    ):
        one = add(name, command, purpose)
        names = "latest, best, epoch:N, step:N or a path"
        one.add_argument("which", type=selector, nargs="+", metavar="WHICH", help=names)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _size(text: str) -> str | int:
    try:
        return 0 if parse_bytes(int(text) if text.isdecimal() else text) == 0 else text
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# prune


def _prune(args: argparse.Namespace) -> int:
    changes = {name: value for name in (*_COUNTS, "max_bytes") if (value := getattr(args, name)) is not None}
    for name, value in changes.items():
        if value == 0 and name not in _NEVER_NONE:
            changes[name] = None
        elif name == "max_bytes" and value.isdecimal():
            changes[name] = int(value)
    unwanted = [place for place in ("abandoned", "corrupt") if getattr(args, place)]
    pruning = open_pruning(open_run(args.run_dir), changes, unwanted)  # type: ignore[arg-type]
    return _carry_out(args, pruning) if args.yes else _show_plan(args, pruning)


def _show_plan(args: argparse.Namespace, pruning: Pruning) -> int:
    verdict, to_read = pruning.foresee()
    if args.json:
        return print_json({**_facts(pruning, verdict, []), "dry_run": True, "reads_first": to_read})
    print_lines(plan_lines(pruning, verdict, to_read, _command(args)))
    return ExitCode.OK


def _carry_out(args: argparse.Namespace, pruning: Pruning) -> int:
    verdict, to_read = pruning.foresee()
    if to_read:
        verdict = _prove(pruning, to_read)
    width = max(len(name_of(one)) for one in verdict.decisions)
    events = EventLog(pruning.store)
    events.attempt = newest_attempt(pruning.store)
    done: list[Decision] = []
    for decision in pruning.carry_out(verdict):
        done.append(decision)
        name = "pruned" if decision.action == "delete" else "stripped"
        events.write(
            name, path=decision.holding.path, reason=decision.reason, bytes=decision.bytes_freed, by="dist-train prune"
        )
        print_lines([] if args.json else done_line(decision, width))
    if args.json:
        print_json({**_facts(pruning, verdict, done), "dry_run": False})
    else:
        print_lines(summary_lines(pruning, verdict, done))
    damaged = any(one.holding.problem.startswith("damaged") for one in verdict.decisions)
    return ExitCode.ERROR if damaged else ExitCode.OK


def _prove(pruning: Pruning, to_read: list[str]) -> Verdict:
    """Reads back what must stay before anything goes."""
    from dist_train.checkpoint.verify import verify_as_it_is  # brings xxhash, which a dry run does not need

    manifests = {one.path: one.manifest for one in pruning.holdings}
    sizes = [manifest.num_bytes for path in to_read if (manifest := manifests[path])]
    meter = ByteMeter(sum(sizes), sys.stderr)

    def check(path: str, manifest: Manifest) -> str:
        meter.name = f"verify {path.rsplit('/', 1)[-1]}"
        return "; ".join(map(str, verify_as_it_is(pruning.store, path, manifest, meter.add)))

    try:
        return pruning.prove(check)
    finally:
        meter.pause()


def _command(args: argparse.Namespace) -> str:
    """The same command with --yes."""
    words = ["dist-train", "prune", args.run_dir]
    for name in (*_COUNTS, "max_bytes"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += [f"--{place}" for place in ("abandoned", "corrupt") if getattr(args, place)]
    return shlex.join([*words, "--yes"])


def _facts(pruning: Pruning, verdict: Verdict, done: list[Decision]) -> dict[str, Json]:
    return {
        "run_dir": pruning.store.given,
        "policy": pruning.policy.to_json(),
        "monitor": pruning.monitor,
        "is_training": pruning.is_live,
        "bytes_now": verdict.bytes_now,
        "bytes_after": verdict.bytes_now - sum(one.bytes_freed for one in done) if done else verdict.bytes_after,
        "shortfall": verdict.shortfall,
        "checkpoints": [
            {
                "path": pruning.store.shown(one.holding.path),
                "step": one.holding.manifest.progress.global_step if one.holding.manifest else None,
                "sequence": one.holding.manifest.sequence if one.holding.manifest else None,
                "place": one.holding.place,
                "pinned": one.holding.pinned,
                "bytes": one.holding.num_bytes,
                "action": one.action,
                "reason": one.reason,
                "bytes_after": one.bytes_after,
                "done": one in done,
            }
            for one in verdict.decisions
        ],
    }


# pin, unpin


def _pin(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    told = []
    for which in args.which:
        path, manifest = _select_own(store, which)
        try:
            pin(store, path, manifest)
        except OSError as error:
            if isinstance(error, NoCheckpointError):
                raise
            raise StorageError(
                f"{store.shown(path)} was not pinned: {error.strerror or error}. A pin is a small file in the run "
                f"directory; make room or see that you may write there, then try again."
            ) from error
        told.append({"path": store.shown(path), "digest": manifest.digest, "pinned": True})
        if not args.json:
            print_text(f"{store.shown(path)} is pinned: it is neither deleted nor made weights-only.")
    return print_json(told) if args.json else ExitCode.OK


def _unpin(args: argparse.Namespace) -> int:
    store = open_run(args.run_dir)
    told = []
    for which in args.which:
        path, manifest = _select_own(store, which)
        was_pinned = unpin(store, manifest)
        told.append({"path": store.shown(path), "digest": manifest.digest, "was_pinned": was_pinned, "pinned": False})
        if not args.json:
            state = "is no longer pinned" if was_pinned else "was not pinned"
            print_text(f"{store.shown(path)} {state}.")
    return print_json(told) if args.json else ExitCode.OK


def _select_own(store: Store, which: str) -> tuple[str, Manifest]:
    home, found = select_checkpoint(store, which)
    if home is not store:
        raise NoCheckpointError(
            f"{which} lies outside of {store.given}: a checkpoint is pinned in its own run directory. Give that one."
        )
    if found.manifest is None:
        raise NoCheckpointError(f"{found.problem} `dist-train ls {store.given}` lists what can be used.")
    return found.path, found.manifest
