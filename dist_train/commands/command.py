"""What every command of `dist-train` is made with: its parser, its output, its selectors.

Invariant: with --json, stdout holds valid JSON or nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dist_train.checkpoint.resume import Selector
from dist_train.console import finite, print_text
from dist_train.errors import ConfigError, ExitCode

Json = Any


class AddCommand(Protocol):
    """Adds a command that takes RUN (but for one that sets `run_dir` otherwise) and --json; the parser that is
    returned takes its further options.
    """

    def __call__(
        self, name: str, command: Callable[[argparse.Namespace], int], purpose: str, /, *, on_a_run: bool = True
    ) -> argparse.ArgumentParser: ...


def selector(text: str) -> str:
    """An argument that names a checkpoint."""
    try:
        Selector.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print_text(line)


def print_json(value: Json) -> int:
    print_text(json.dumps(finite(value), indent=2, allow_nan=False))
    return ExitCode.OK


def refuse(message: str) -> int:
    """One paragraph on stderr."""
    print_text(f"dist-train: {' '.join(message.split())}", error=True)
    return ExitCode.ERROR
