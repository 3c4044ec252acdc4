"""What a person sees on a terminal and without one, and the two logs that a run writes of itself."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from dist_train import console as console_module
from dist_train.checkpoint.store import Operation, Store
from dist_train.console import (
    Console,
    EventLog,
    MetricsLog,
    bytes_text,
    metric_label,
    metric_text,
    print_text,
    set_up_logging,
)
from dist_train.history import read_metrics


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The package's logger as the test found it."""
    package = logging.getLogger("dist_train")
    kept = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = kept


# Plain lines and the live line


class Terminal:
    """A pseudo-terminal: what is written to `stream` is what a person's screen would show."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")
        self._text = ""

    def screen(self) -> list[str]:
        """Rows without trailing spaces; a carriage return goes back to the row's start."""
        self.stream.flush()
        while select.select([self._master], [], [], 0)[0]:
            self._text += os.read(self._master, 4096).decode()
        rows, column = [""], 0
        for character in self._text:
            if character == "\r":
                column = 0
            elif character == "\n":
                rows.append("")
                column = 0
            else:
                rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    one = Terminal()
    yield one
    one.close()


def test_without_a_terminal_lines_are_plain_and_there_is_no_live_line() -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.show("Epoch 1/2 - step 1")
    console.say("Checkpoint saved: epoch 1")
    console.show("Epoch 1/2 - step 2")
    console.end_live()
    assert stream.getvalue() == "Checkpoint saved: epoch 1\n"


def test_on_a_terminal_one_live_line_is_overwritten(terminal: Terminal) -> None:
    console = Console(stream=terminal.stream)
    for text in ("Epoch 1/2 - step 100", "Epoch 1/2 - step 1", "step 3"):
        console.show(text)
        assert terminal.screen() == [text]


def test_plain_lines_stay_whole_above_the_live_line(terminal: Terminal) -> None:
    console = Console(stream=terminal.stream)
    console.show("a long live line that reaches far")
    console.say("short")
    assert terminal.screen() == ["short", "a long live line that reaches far"]
    console.show("live")
    console.say("a plain line, longer than the live one")
    console.show("live again")
    assert terminal.screen() == ["short", "a plain line, longer than the live one", "live again"]


def test_the_live_line_goes_away_at_the_end(terminal: Terminal) -> None:
    console = Console(stream=terminal.stream)
    console.say("first")
    console.show("live")
    console.end_live()
    assert terminal.screen() == ["first", ""]
    console.say("last")
    assert terminal.screen() == ["first", "last", ""]


@pytest.mark.parametrize(("columns", "shown"), [("40", 39), ("5", 20)])
def test_a_live_line_never_wraps_on_a_terminal_of_usual_width(
    columns: str, shown: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    Console(stream=terminal.stream).show("x" * 100)
    assert terminal.screen() == ["x" * shown]


def test_other_ranks_print_nothing(terminal: Terminal) -> None:
    console = Console(enabled=False, stream=terminal.stream)
    console.say("plain")
    console.show("live")
    console.end_live()
    assert terminal.screen() == [""]


def test_the_command_lines_output_and_errors_go_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_text("fine")
    print_text("wrong", error=True)
    assert capsys.readouterr() == ("fine\n", "wrong\n")


# Logging


def test_the_main_rank_logs_from_info_and_the_others_from_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 3):
        set_up_logging(rank, 8, attempt=2)
        logging.getLogger("dist_train.somewhere").info("info of %d", rank)
        logging.getLogger("dist_train.somewhere").warning("warning of %d", rank)
    assert capsys.readouterr().err.splitlines() == [
        "[rank 0/8 attempt 2] INFO info of 0",
        "[rank 0/8 attempt 2] WARNING warning of 0",
        "[rank 3/8 attempt 2] WARNING warning of 3",
    ]


def test_one_process_logs_without_a_prefix_and_once_however_often_it_is_set_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(3):
        set_up_logging()
    logging.getLogger("dist_train").warning("once")
    assert capsys.readouterr().err == "WARNING once\n"


def test_a_handler_of_the_users_own_is_kept() -> None:
    package, own = logging.getLogger("dist_train"), logging.NullHandler()
    package.addHandler(own)
    set_up_logging()
    assert own in package.handlers


# Numbers and names as people write them


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("val_smape", "Val SMAPE"),
        ("val_loss", "Val Loss"),
        ("accuracy", "Accuracy"),
        ("test-mae", "Test MAE"),
        ("RMSE", "RMSE"),
    ],
)
def test_metric_names_are_written_as_people_do(name: str, label: str) -> None:
    assert metric_label(name) == label


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("val_smape", 41.8203, "41.82%"),
        ("MAPE", 7.0, "7.00%"),
        ("val_loss", 0.34209, "0.3421"),
        ("val_loss", 0.0, "0.0000"),
        ("val_loss", -3.5, "-3.5000"),
        ("val_loss", 0.00012345, "0.0001234"),
        ("val_loss", 1234567.0, "1.235e+06"),
        ("val_loss", float("nan"), "nan"),
        ("val_loss", float("inf"), "inf"),
    ],
)
def test_metric_values_are_written_with_their_unit(name: str, value: float, text: str) -> None:
    assert metric_text(name, value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (48_200_000, "48.2 MB"), (18e9, "18.0 GB"), (2.5e12, "2.5 TB")],
)
def test_bytes_are_written_in_decimal_units(count: float, text: str) -> None:
    assert bytes_text(count) == text


# run.jsonl


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_has_its_attempt_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module.time, "time", lambda: 12.5)
    log = EventLog(Store(tmp_path))
    log.attempt = 3
    log.write("committed", global_step=7, stall_seconds=0.25)
    (line,) = lines_of(tmp_path / "run.jsonl")
    assert line == {"time": 12.5, "attempt": 3, "event": "committed", "global_step": 7, "stall_seconds": 0.25}


def test_other_ranks_write_no_log(tmp_path: Path) -> None:
    EventLog(Store(tmp_path), enabled=False).write("started")
    log = MetricsLog(Store(tmp_path), enabled=False)
    log.start(1, None, 0)
    log.write(kind="step", loss=1.0)
    assert list(tmp_path.iterdir()) == []
    assert log.count == 1  # as on the main rank: it stands in the manifest's progress


def test_values_that_json_lacks_are_written_as_strings(tmp_path: Path) -> None:
    EventLog(Store(tmp_path)).write("odd", values={"loss": float("nan"), "norm": float("inf")})
    (line,) = lines_of(tmp_path / "run.jsonl")
    assert line["values"] == {"loss": "nan", "norm": "inf"}


def test_a_full_disk_is_a_warning_and_not_the_end_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(operation: Operation) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    logging.getLogger("dist_train").propagate = True
    with caplog.at_level(logging.WARNING, "dist_train"):
        EventLog(Store(tmp_path, observer=full)).write("started")
    assert f"{tmp_path}/run.jsonl was not written" in caplog.text


def test_lines_that_could_not_be_written_come_with_the_next_ones(tmp_path: Path) -> None:
    full = [True]

    def observer(operation: Operation) -> None:
        if full[0] and operation.path == "metrics.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(Store(tmp_path, observer=observer))
    log.start(1, None, 0)
    log.write(kind="step", loss=5)
    assert not (tmp_path / "metrics.jsonl").exists()
    full[0] = False
    log.write(kind="step", loss=4)
    assert [record["loss"] for record in read_metrics(Store(tmp_path))] == [5, 4]
    full[0] = True
    log.write(kind="step", loss=3)
    full[0] = False
    log.flush()
    log.flush()
    assert [record["loss"] for record in read_metrics(Store(tmp_path))] == [5, 4, 3]
