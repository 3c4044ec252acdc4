"""`diff`: how two checkpoints differ, in settings, metrics, progress and every tensor.

Invariant: only what was verified is compared, and nothing is changed. As of diff(1): exit code 0 where they are equal,
1 where they differ, 2 where they cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.selection import open_run, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.commands.command import AddCommand, print_json, print_lines, refuse, selector
from dist_train.console import ByteMeter
from dist_train.errors import CheckpointError, DistTrainError, ExitCode, NoCheckpointError

if TYPE_CHECKING:
    from dist_train.checkpoint.comparison import TensorDifference

Json = Any
Side = tuple[Store, str, Manifest]
_TOP = 20


def add_commands(add: AddCommand) -> None:
    diff = add("diff", _diff, "Compare two checkpoints: exit code 0 if equal, 1 if they differ, 2 on trouble.")
    names = "latest, best, epoch:N, step:N or a path, also into another run"
    for name in ("a", "b"):
        diff.add_argument(name, type=selector, metavar=name.upper(), help=names)
    diff.add_argument("--weights-only", action="store_true", help="the model's parameters and buffers and nothing else")
    diff.add_argument("--top", type=int, default=_TOP, metavar="N", help=f"most tensors to show ({_TOP})")


def _diff(args: argparse.Namespace) -> int:
    try:
        sides = [_select(args.run_dir, which) for which in (args.a, args.b)]
        sections, differences = _compare(sides, weights_only=args.weights_only)
    except (DistTrainError, OSError) as error:
        refuse(str(error))
        return ExitCode.USAGE
    if args.json:
        print_json(_facts(sides, sections, differences))
    else:
        _print(sides, sections, differences, args)
    equal = not any(sections.values()) and all(one.kind == "equal" for one in differences)
    return ExitCode.OK if equal else ExitCode.ERROR


def _select(run_dir: str, which: str) -> Side:
    store, found = select_checkpoint(open_run(run_dir, or_checkpoint=True), which)
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"{store.shown(found.path)} holds no checkpoint.")
    return store, found.path, found.manifest


def _compare(sides: Sequence[Side], *, weights_only: bool) -> tuple[dict[str, Json], list[TensorDifference]]:
    """Verifies both, then streams through them."""
    try:
        from dist_train.checkpoint.comparison import compare_manifests, compare_tensors
        from dist_train.checkpoint.inference import files_for_inference, require_whole
        from dist_train.checkpoint.reader import CheckpointReader
    except ModuleNotFoundError as error:
        raise CheckpointError(f"diff needs {error.name}, which is not installed here.") from error
    manifests = (sides[0][2], sides[1][2])
    files = [files_for_inference(one) if weights_only else sorted(one.files) for one in manifests]
    sizes = [one.files[name].size for one, names in zip(manifests, files, strict=True) for name in names]
    meter = ByteMeter(sum(sizes), sys.stderr, name="compare")
    readers: list[CheckpointReader] = []
    try:
        for (store, path, manifest), names in zip(sides, files, strict=True):
            require_whole(store, path, manifest, names)
            readers.append(CheckpointReader(store, path, manifest))
        found = compare_tensors(readers[0], readers[1], manifests, meter.add, weights_only=weights_only)
        differences = list(found)
    finally:
        meter.pause()
        for reader in readers:
            reader.close()
    return {} if weights_only else compare_manifests(*manifests), differences


def _print(
    sides: Sequence[Side], sections: dict[str, Json], differences: list[TensorDifference], args: argparse.Namespace
) -> None:
    from dist_train.checkpoint.comparison_listing import heading_lines, tensor_lines, value_lines, verdict_lines

    print_lines(heading_lines([(store.shown(path), manifest) for store, path, manifest in sides]))
    print_lines(value_lines(sections))
    print_lines(tensor_lines(differences, args.top))
    print_lines(verdict_lines(sections, differences, weights_only=args.weights_only))


def _facts(sides: Sequence[Side], sections: dict[str, Json], differences: list[TensorDifference]) -> Json:
    wrong = [one for one in differences if one.kind != "equal"]
    a, b = ({"path": store.shown(path), "digest": manifest.digest} for store, path, manifest in sides)
    return {
        "a": a,
        "b": b,
        "equal": not wrong and not any(sections.values()),
        "tensors_compared": len(differences),
        "tensors_differ": len(wrong),
        "differences": {
            section: {place: list(pair) for place, pair in values.items()} for section, values in sections.items()
        },
        "tensors": [
            {
                "name": one.name,
                "kind": one.kind,
                "shape": [None if entry is None else entry.shape for entry in (one.a, one.b)],
                "dtype": [None if entry is None else entry.dtype for entry in (one.a, one.b)],
                "elements": one.elements,
                "differing": one.differing,
                "not_finite": one.not_finite,
                "max_abs": one.max_abs,
                "relative": one.relative,
            }
            for one in sorted(wrong, key=lambda one: (-one.rank, one.name))
        ],
    }
