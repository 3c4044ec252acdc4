"""What `diff` says: two checkpoints side by side, what differs most first.

Invariant: tables are cut short, --json is not. Prints nothing, reads no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.checkpoint.comparison import TensorDifference
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.text import counted, number_text, some_names, table, wrap

Json = Any
_MOST_VALUES = 20
_WIDEST_VALUE = 24
_STRANGE = ("shape", "dtype", "only in a", "only in b")


def heading_lines(sides: Sequence[tuple[str, Manifest]]) -> list[str]:
    """Which two."""
    lines = []
    for letter, (path, manifest) in zip("ab", sides, strict=True):
        progress = manifest.progress
        done = f"step {progress.global_step}, {counted(progress.epochs_completed, 'epoch')} completed"
        lines += wrap(f"{path} ({done})", "   ", first=f"{letter}  ")
    return lines


def value_lines(sections: Mapping[str, Mapping[str, tuple[Json, Json]]]) -> list[str]:
    """What differs besides tensors, section by section."""
    lines: list[str] = []
    for section, values in sections.items():
        if not values:
            continue
        shown = list(values.items())[:_MOST_VALUES]
        rows = [[section, "a", "b"], *(_value_row(section, place, pair) for place, pair in shown)]
        cells = [[("" if index == 0 else "  ") + row[0], *row[1:]] for index, row in enumerate(rows)]
        hidden = len(values) - len(shown)
        more = [f"  ... and {hidden} more (--json lists them all)"] if hidden else []
        lines += ["", *table(cells, left={0}), *more]
    return lines


def tensor_lines(differences: Sequence[TensorDifference], top: int) -> list[str]:
    """Tensors that differ, by how much; then those that only one side has, or otherwise."""
    differ = sorted((one for one in differences if one.kind == "differ"), key=lambda one: (-one.rank, one.name))
    lines: list[str] = []
    if differ:
        header = ["tensors", "elements", "differ", "at most", "relative"]
        rows = [[f"  {one.name}", *_number_cells(one)] for one in differ[:top]]
        hidden = len(differ) - len(rows)
        more = [f"  ... and {hidden} more (--top {len(differ)} or --json lists them all)"] if hidden else []
        lines += ["", *table([header, *rows], left={0}), *more]
    for kind in _STRANGE:
        strange = [one for one in differences if one.kind == kind]
        title = {"shape": "other shape", "dtype": "other dtype"}.get(kind, kind)
        if strange:
            lines += ["", *wrap(some_names([_strange_text(one) for one in strange]), "  ", first=f"{title}: ")]
    return lines


def verdict_lines(
    sections: Mapping[str, Mapping[str, Json]], differences: Sequence[TensorDifference], *, weights_only: bool
) -> list[str]:
    """The last word."""
    wrong = [one for one in differences if one.kind != "equal"]
    besides = [section for section, values in sections.items() if values]
    what = "weights" if weights_only else "tensors"
    if not wrong:
        text = f"All {len(differences):,} {what} are equal, bit for bit" if differences else f"Neither has {what}"
        more = "" if weights_only else "; so are settings, metrics and progress"
        more = f"; what differs is {', '.join(besides)}" if besides else more
        return ["", *wrap(f"{text}{more}.")]
    text = f"{len(wrong):,} of {counted(len(differences), 'tensor')} differ"
    differ = [one for one in wrong if one.kind == "differ"]
    if differ:
        most = max(differ, key=lambda one: one.rank)
        text += f"; largest: {most.name} ({_extent_text(most)})"
    return ["", *wrap(f"{text}.")]


def _value_row(section: str, place: str, pair: tuple[Json, Json]) -> list[str]:
    if place == "random generators":
        return [place, "one state", "another"]
    if section == "metrics":
        return [place, *(number_text(place, value) for value in pair)]
    return [place, *map(_short, pair)]


def _short(value: Json) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDEST_VALUE else text[: _WIDEST_VALUE - 3] + "..."


def _number_cells(one: TensorDifference) -> list[str]:
    far = "not finite" if one.not_finite else f"{one.max_abs:.3g}"
    return [f"{one.elements:,}", f"{one.differing:,}", far, _relative_text(one.relative)]


def _relative_text(relative: float) -> str:
    if math.isinf(relative):
        return "a is zero"
    if relative >= 10:
        return f"{relative:.3g} x"
    return f"{relative:.1%}" if relative >= 1e-3 or relative == 0 else f"{100 * relative:.1e}%"


def _extent_text(one: TensorDifference) -> str:
    if one.not_finite:
        return f"{counted(one.not_finite, 'element')} not finite on one side or both"
    if math.isinf(one.relative):
        return f"all zero in a, at most {one.max_abs:.3g} away in b"
    return f"by {_relative_text(one.relative)} of its norm, at most {one.max_abs:.3g}"


def _strange_text(one: TensorDifference) -> str:
    if one.kind == "shape" and one.a and one.b:
        return f"{one.name} {one.a.shape} in a, {one.b.shape} in b"
    if one.kind == "dtype" and one.a and one.b:
        return f"{one.name} {one.a.dtype} in a, {one.b.dtype} in b"
    return one.name
