"""How far long work on bytes is, on a terminal and elsewhere, with an injected clock."""

from __future__ import annotations

import io

import pytest

from dist_train.console import ByteMeter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(meter: ByteMeter, clock: Clock, seconds: float, steps: int, bytes_a_step: int) -> None:
    for _ in range(steps):
        clock.now += seconds / steps
        meter.add(bytes_a_step)


def test_off_a_terminal_a_plain_line_comes_every_ten_seconds() -> None:
    clock, stream = Clock(), io.StringIO()
    meter = ByteMeter(12_400_000_000, stream, name="export", clock=clock)
    work(meter, clock, 25.0, 100, 31_000_000)
    meter.pause()
    assert stream.getvalue().splitlines() == [
        "export: 1.2 of 12.4 GB (10%), 124.0 MB/s, 1 min 30 s left",
        "export: 2.5 of 12.4 GB (20%), 124.0 MB/s, 1 min 20 s left",
    ]


def test_short_work_says_nothing_off_a_terminal() -> None:
    clock, stream = Clock(), io.StringIO()
    work(ByteMeter(1000, stream, name="verify", clock=clock), clock, 9.9, 99, 10)
    assert stream.getvalue() == ""


def test_on_a_terminal_one_line_is_overwritten_and_taken_away() -> None:
    clock, stream = Clock(), Screen()
    meter = ByteMeter(2_000_000, stream, name="verify step-00000005", clock=clock)
    work(meter, clock, 1.0, 8, 125_000)
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\rverify step-00000005: 1.0 of 2.0 MB (50%), 1.0 MB/s, 1 s left")
    meter.pause()
    assert stream.getvalue().rsplit("\r", 1)[-1] == ""


@pytest.mark.parametrize(
    ("total", "done", "line"),
    [
        (0, 5_000_000, "5.0 MB, 500.0 kB/s"),
        (2_000_000_000, 5_000_000, "5.0 MB of 2.0 GB (0%), 500.0 kB/s, 1 h 06 min left"),
        (5_000_000, 8_000_000, "8.0 of 5.0 MB (100%), 800.0 kB/s"),
    ],
    ids=["unknown total", "two units", "more than foreseen"],
)
def test_the_line_fits_what_is_known(total: int, done: int, line: str) -> None:
    clock, stream = Clock(), io.StringIO()
    meter = ByteMeter(total, stream, clock=clock)
    clock.now = 10.0
    meter.add(done)
    assert stream.getvalue() == f"{line}\n"


def test_other_ranks_say_nothing() -> None:
    clock, stream = Clock(), io.StringIO()
    work(ByteMeter(100, stream, enabled=False, clock=clock), clock, 100.0, 10, 10)
    assert stream.getvalue() == ""
