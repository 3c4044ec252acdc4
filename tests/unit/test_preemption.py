"""Signals: what they mean to a run, at each moment of it, in one process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import Any

import pytest

from dist_train.errors import StopReason
from dist_train.run import Run
from tests.support.small_run import (
    SmallRun,
    events_of,
    manifests_of,
    status_of,
)
from tests.unit.test_run import assert_same_run, once_at

ALL = [Signals.SIGTERM, Signals.SIGINT, Signals.SIGUSR1, Signals.SIGHUP]


def send(number: Signals) -> Callable[[Run], None]:
    return lambda run: signal.raise_signal(number)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in ALL]


@pytest.mark.parametrize("number", ALL)
def test_a_signal_ends_the_run_at_the_next_boundary_saved_and_the_next_start_goes_on_exactly(
    number: Signals, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    before = handlers()
    run = SmallRun(run_dir=run_dir, at_batch=once_at(6, send(number))).train()
    assert handlers() == before
    reason, code = (StopReason.INTERRUPTED, 130) if number is Signals.SIGINT else (StopReason.PREEMPTED, 0)
    assert (run.reason, run.exit_code, run.global_step) == (reason, code, 7)
    assert manifests_of(run_dir)[-1]["progress"]["global_step"] == 7
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"]) == (reason, code)
    (event,) = events_of(run_dir, "preempted")
    assert (event["signal"], event["global_step"]) == (number.name, 7)
    said = capsys.readouterr().out
    assert f"{number.name}: saving at the next step boundary and stopping." in said
    assert f"Stopped by {number.name} after step 7. In {run_dir} the newest checkpoint is step 7." in said
    SmallRun(run_dir=run_dir).train()
    assert_same_run(tmp_path / "twin", run_dir)
