"""Tables, labelled values and wrapped paragraphs: the means of every `... listing`.

Invariant: plain text without colours, numbers aligned, wrapped to the terminal but for tables. Prints nothing.
"""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from dist_train.console import metric_text

_SHOWN_NAMES = 6


def table(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Aligned lines: the columns of `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(width) if index in left else cell.rjust(width) for index, (cell, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    return ["  ".join(cells).rstrip() for cells in aligned]


def labelled(pairs: Mapping[str, str]) -> list[str]:
    """Labels and values; empty values are left out."""
    lines: list[str] = []
    for label, value in pairs.items():
        lines += wrap(value, " " * 17, first=f"  {label:13}  ") if value else []
    return lines


def terminal_width() -> int:
    return min(max(shutil.get_terminal_size().columns, 60), 120)


def wrap(text: str, indent: str = "", first: str | None = None) -> list[str]:
    """A paragraph; `first` begins its first line."""
    wrapper = textwrap.TextWrapper(
        terminal_width(),
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(text)


def some_names(names: Sequence[str]) -> str:
    hidden = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {hidden} more" if hidden > 0 else "")


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def value_text(value: Any) -> str:
    return "-" if value is None else str(value)


def number_text(name: str, value: float | None) -> str:
    return "-" if value is None else metric_text(name, value)


def when_text(seconds: float | None, now: float | None = None) -> str:
    """Local time; the age instead while it is under a day, where `now` is given."""
    if seconds is None:
        return "-"
    if now is not None and now - seconds < 86400:
        return age_text(seconds, now)
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def age_text(seconds: float, now: float | None = None) -> str:
    """`3 min ago`."""
    age = max((time.time() if now is None else now) - seconds, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= length:
            return f"{age // length:.0f} {unit} ago"
    return f"{age:.0f} s ago"
