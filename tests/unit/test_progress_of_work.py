"""Saves and loads of gigabytes inside a training run: what a person sees of them, on a terminal and without one."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train import console as console_module
from dist_train import reporter as reporter_module
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.writer import SaveFailed, Writing
from dist_train.console import ByteMeter, Console, tell_long_work
from dist_train.reporter import Reporter
from tests.support.small_run import SmallRun
from tests.unit.test_console import Terminal

POLICY = CheckpointPolicy(every_steps=2)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The package's logger as the test found it; a run makes a handler for the stderr of its day."""
    package = logging.getLogger("dist_train")
    kept = list(package.handlers), package.level, package.propagate
    package.handlers[:], package.propagate = [], True
    yield
    package.handlers[:], package.level, package.propagate = kept


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    one = Terminal()
    yield one
    one.close()


def writing(done: float, total: float, *, seconds: float) -> Writing:
    return Writing(global_step=1200, done=int(done), total=int(total), started=time.monotonic() - seconds)


def reporter_on(tmp_path: Path, terminal: Terminal) -> Reporter:
    reporter = Reporter(Store(tmp_path), is_main=True, run_dir=str(tmp_path))
    reporter.console = Console(stream=terminal.stream)
    reporter.epochs = 20
    return reporter


def test_the_live_line_shows_the_save_in_flight(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    reporter = reporter_on(tmp_path, terminal)
    reporter.step(0, 1203, None, writing(3.1e9, 12.4e9, seconds=2.0))
    (line,) = terminal.screen()
    assert line.startswith("Epoch 1/20 - step 1203 - saving step 1200: 3.1 of 12.4 GB, 1.")
    assert line.endswith(" GB/s")


def test_the_live_line_shows_the_save_while_training_waits_for_it(tmp_path: Path, terminal: Terminal) -> None:
    reporter = reporter_on(tmp_path, terminal)
    reporter.waiting(None)
    reporter.waiting(writing(1, 2, seconds=0.01))
    assert terminal.screen() == [""]
    reporter.waiting(writing(12.4e9, 12.4e9, seconds=6.0))
    assert terminal.screen() == ["saving step 1200: 12.4 of 12.4 GB, committing"]
    reporter.report([SaveFailed(global_step=1200, message="no")])
    assert terminal.screen() == [""]


def test_the_writer_counts_what_it_hands_to_the_disk(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    small: list[SmallRun] = []

    def note(operation: Operation) -> None:
        if operation.kind in ("write", "fsync") and operation.path.endswith(".safetensors"):
            now = small[0].run._checkpointer.writing if small[0].run else None
            assert now is not None
            seen.append((now.global_step, now.done, now.total))

    small.append(
        SmallRun(
            run_dir=tmp_path / "run", policy=POLICY, max_steps=2, open_store=lambda root: Store(root, observer=note)
        )
    )
    run = small[0].train()
    steps, done, totals = zip(*seen, strict=True)
    assert set(steps) == {2}
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert (done[0] > 0, done[-1]) == (True, totals[0])
    assert run._checkpointer.writing is None


def test_waiting_for_a_slow_disk_is_shown(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    shown: list[str] = []
    waiting = Reporter.waiting
    monkeypatch.setattr(
        Reporter, "waiting", lambda self, now: (waiting(self, now), shown.append(terminal.screen()[-1]))
    )
    monkeypatch.setattr("dist_train.checkpoint.writer.WAIT_SLICE_SECONDS", 0.01)
    monkeypatch.setattr(reporter_module, "LIVE_SECONDS", 0.0)
    released = False

    def slow(operation: Operation) -> None:
        nonlocal released
        if operation.kind == "fsync" and operation.path.endswith(".safetensors") and not released:
            deadline = time.monotonic() + 10
            while not shown and time.monotonic() < deadline:
                time.sleep(0.005)
            released = True

    SmallRun(
        run_dir=tmp_path / "run",
        policy=CheckpointPolicy(),
        max_steps=2,
        open_store=lambda root: Store(root, observer=slow),
    ).train()
    assert shown
    assert shown[0].startswith("saving step 2: ")


def test_a_resume_shows_that_it_verifies_and_loads(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    SmallRun(run_dir=tmp_path / "run", policy=POLICY, max_steps=2).train()
    monkeypatch.setattr(console_module, "METER_SECONDS", 0.0)
    monkeypatch.setattr(console_module, "LONG_WORK_SECONDS", 0.0)
    lines: list[str] = []
    show = Console.show
    monkeypatch.setattr(Console, "show", lambda self, text: (lines.append(text), show(self, text)))
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    logging.getLogger("dist_train").addHandler(caplog.handler)  # a run lets nothing through to the root logger
    with caplog.at_level(logging.INFO):
        SmallRun(run_dir=tmp_path / "run", policy=POLICY, max_steps=4).train()
    kinds = [line.split(":")[0] for line in lines if "step-00000002" in line]
    assert list(dict.fromkeys(kinds)) == ["verifying step-00000002", "loading step-00000002"]
    assert any("(100%)" in line for line in lines)
    said = [record.getMessage().split(":")[0] for record in caplog.records if record.name == "dist_train.console"]
    assert said == ["Verified step-00000002", "Loaded step-00000002"]


def test_work_that_took_long_leaves_one_quiet_line(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 0.0, 2.0, 0.0, 0.0, 6.2])
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            meter = ByteMeter(0, clock=lambda: next(times))
            meter.add(12_400_000_000)
            tell_long_work("Verified step-00001200", meter)
    assert [record.getMessage() for record in caplog.records] == ["Verified step-00001200: 12.4 GB in 6.2 s (2.0 GB/s)"]


def test_a_save_that_took_long_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallRun(run_dir=tmp_path / "quick", policy=POLICY, max_steps=2).train()
    assert "durable after" not in capsys.readouterr().out
    monkeypatch.setattr(reporter_module, "LONG_WORK_SECONDS", 0.0)
    SmallRun(run_dir=tmp_path / "long", policy=POLICY, max_steps=2).train()
    assert "durable after 0 s (" in capsys.readouterr().out
