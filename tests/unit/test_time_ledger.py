"""Where a run's time went: every moment of an attempt in one bucket, and the attempts of a run added up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_train import phases
from dist_train.checkpoint.store import Operation, Store
from dist_train.console import EventLog
from dist_train.goodput import BUCKETS, MEASURED, MICRO, RunTime, fold_time
from dist_train.phases import Phase, Point
from dist_train.time_ledger import TimeLedger, process_age, read_events, read_pulses

FRESH = {"attempt": None, "global_step": 0, "branch": False}


class Clock:
    """Nanoseconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_place", phases._Place())
    monkeypatch.setattr(TimeLedger, "_process_is_counted", False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "run")
    store.make_directory("attempts")
    return store


def ledger_of(store: Store, clock: Clock, *, wall: float = 5000.0, age: float = 2.0) -> TimeLedger:
    boot = lambda: ("one", clock.now / 1e9)  # noqa: E731
    return TimeLedger(store, EventLog(store), clock=clock, wall=lambda: wall, age=lambda: age, boot=boot)


def spend(clock: Clock, phase: Phase, seconds: float) -> None:
    phases.switch(phase)
    clock.wait(seconds)


def train(clock: Clock, steps: int, *, data: float = 0.1, step: float = 1.0) -> None:
    for _ in range(steps):
        spend(clock, Phase.DATA, data)
        spend(clock, Phase.STEP, step)
        phases.switch(Phase.OTHER)
        phases.tell_step(phases.global_step() + 1)
        phases.reach(Point.STEP_DONE)


def save(clock: Clock, seconds: float = 0.2) -> None:
    with phases.within(Phase.CAPTURE):
        clock.wait(seconds)


def time_of(store: Store) -> RunTime:
    run = fold_time(read_events(store), read_pulses(store).values())
    assert run is not None
    assert sum(run.buckets.values()) == run.ended - run.began
    return run


def seconds_of(run: RunTime) -> dict[str, float]:
    return {name: count / MICRO for name, count in run.buckets.items() if count}


# One attempt


def test_every_moment_is_in_one_bucket(store: Store) -> None:
    clock = Clock()
    ledger = ledger_of(store, clock, age=2.0)
    ledger.enter()
    clock.wait(0.5)
    with phases.within(Phase.LOAD):
        clock.wait(0.25)
    phases.switch(Phase.OTHER)
    ledger.open(1, FRESH)
    clock.wait(0.125)  # what prepares the first batch is start-up, too
    train(clock, 4)
    spend(clock, Phase.OTHER, 0.5)
    save(clock, 0.2)
    spend(clock, Phase.EVALUATION, 3.0)
    with phases.within(Phase.SAVE_WAIT):
        clock.wait(0.3)
    spend(clock, Phase.END, 0.0625)
    ledger.close(1)
    run = time_of(store)
    assert seconds_of(run) == pytest.approx(
        {
            "start_up": 2.625,
            "restore": 0.25,
            "data_wait": 0.4,
            "productive": 7.0,
            "save_stall": 0.5,
            "other": 0.5625,
        }
    )
    assert run.goodput == pytest.approx(7.0 / 11.3375)
    (event,) = [one for one in read_events(store) if one["event"] == "time"]
    assert math.fsum(event["buckets"].values()) == pytest.approx(event["ended"] - event["began"], abs=1e-6)
    assert event["run"]["buckets"] == pytest.approx({name: run.buckets[name] / MICRO for name in BUCKETS})
    assert event["first_step"] == pytest.approx(2.875 + 1.1)
    assert store.list("attempts") == [], "a closed attempt leaves no pulse"


def test_a_pulse_adds_up_at_every_moment(store: Store) -> None:
    clock = Clock()
    ledger = ledger_of(store, clock)
    ledger.enter()
    ledger.open(1, FRESH)
    for phase in Phase:
        spend(clock, phase, 0.7)
        ledger.beat(1)
        pulse = read_pulses(store)[1]
        assert math.fsum(pulse["buckets"].values()) == pytest.approx((clock.now - 1e12) / 1e9 + 2.0, abs=1e-5)
    ledger.close(1)


def test_a_further_run_of_a_process_counts_from_where_it_was_made(store: Store) -> None:
    clock = Clock()
    for attempt in (1, 2):
        ledger = ledger_of(store, clock, wall=5000.0 + clock.now / 1e9, age=60.0)
        ledger.enter()
        ledger.open(attempt, FRESH)
        train(clock, 1)
        ledger.close(attempt)
        clock.wait(100)
    assert [one.buckets["start_up"] / MICRO for one in time_of(store).attempts] == [60.0, 0.0]


def test_a_notebook_s_kernel_is_no_start_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    ledger = ledger_of(store, Clock(), age=7200.0)
    ledger.enter()
    ledger.open(1, FRESH)
    ledger.close(1)
    assert time_of(store).buckets["start_up"] == 0


def test_a_replaced_attempt_tells_nothing_more(store: Store) -> None:
    clock, lost = Clock(), False
    ledger = TimeLedger(store, EventLog(store), is_lost=lambda: lost, clock=clock)
    ledger.enter()
    ledger.open(1, FRESH)
    pulse = read_pulses(store)
    lost = True
    save(clock)
    ledger.close(1)
    assert read_pulses(store) == pulse
    assert read_events(store) == []


def test_nothing_is_listened_to_after_the_end(store: Store) -> None:
    ledger = ledger_of(store, Clock())
    ledger.enter()
    assert phases._place.changes
    ledger.close(0)
    assert not phases._place.changes
    assert not phases._place.points
    assert read_events(store) == [], "it never had the directory"


def test_a_full_disk_costs_no_training_and_keeps_the_pulse(tmp_path: Path) -> None:
    clock, full = Clock(), False

    def observe(operation: Operation) -> None:
        if full and operation.path == "run.jsonl":
            raise OSError(28, "no space")

    store = Store(tmp_path / "run", observer=observe)
    store.make_directory("attempts")
    ledger = ledger_of(store, clock)
    ledger.enter()
    ledger.open(1, FRESH)
    train(clock, 2)
    ledger.beat(1)
    full = True
    ledger.close(1)
    assert list(read_pulses(store)) == [1]
    assert time_of(store).buckets["productive"] == 2 * MICRO


def test_the_age_of_this_process_is_known() -> None:
    assert 0 < process_age() < 24 * 3600


# Several


def killed(store: Store, clock: Clock, attempt: int, resumed: dict[str, Any], steps: int, saves: set[int]) -> None:
    """An attempt that ends without a word: what it knew is in its pulse."""
    ledger = ledger_of(store, clock, wall=5000.0 + (clock.now - 1e12) / 1e9 + 2.0, age=2.0)
    clock.wait(2.0)
    ledger._made = clock.now
    phases.switch(Phase.START)
    ledger.enter()
    phases.tell_step(resumed["global_step"])
    ledger.open(attempt, resumed)
    events = EventLog(store)
    events.attempt = attempt
    for _ in range(steps):
        train(clock, 1)
        step = phases.global_step()
        if step in saves:
            save(clock)
            buckets = ledger.committed(step)
            events.write(
                "committed",
                path=f"step-{step}",
                global_step=step,
                stall_seconds=0.2,
                seconds=0.1,
                bytes=1,
                buckets=buckets,
            )
    ledger.beat(attempt)
    for stop in ledger._stops:
        stop()
    TimeLedger._process_is_counted = False


def test_what_a_kill_cost_is_lost_and_down(store: Store) -> None:
    clock = Clock()
    killed(store, clock, 1, FRESH, steps=7, saves={5})
    clock.wait(30)
    killed(store, clock, 2, {"attempt": 1, "global_step": 5, "branch": False}, steps=4, saves=set())
    run = time_of(store)
    assert run.buckets["lost"] / MICRO == pytest.approx(2 * 1.1)
    assert run.buckets["down"] / MICRO == pytest.approx(30)
    assert [one.lost_steps for one in run.attempts] == [2, 0]
    assert [one.is_open for one in run.attempts] == [False, True]
    assert run.buckets["productive"] / MICRO == pytest.approx(9.0), "updates 1 to 9, each once"
    assert list(read_pulses(store)) == [2], "the next start has closed the dead one"


def test_a_commit_that_nobody_told_before_the_kill_loses_nothing(store: Store) -> None:
    clock = Clock()
    ledger = ledger_of(store, clock)
    ledger.enter()
    ledger.open(1, FRESH)
    train(clock, 5)
    save(clock)  # the pulse is renewed here, and the kill comes before the commit is told
    killed(store, clock, 2, {"attempt": 1, "global_step": 5, "branch": False}, steps=1, saves=set())
    assert time_of(store).buckets["lost"] == 0


def test_attempts_that_saved_nothing_are_lost_whole(store: Store) -> None:
    clock = Clock()
    killed(store, clock, 1, FRESH, steps=6, saves={3})
    killed(store, clock, 2, {"attempt": 1, "global_step": 3, "branch": False}, steps=2, saves=set())
    killed(store, clock, 3, {"attempt": 1, "global_step": 3, "branch": False}, steps=1, saves=set())
    assert [one.lost_steps for one in time_of(store).attempts] == [3, 2, 0]
    killed(store, clock, 4, FRESH, steps=1, saves=set())  # the checkpoint was damaged: all again
    run = time_of(store)
    assert [one.lost_steps for one in run.attempts] == [6, 2, 1, 0]
    assert run.buckets["productive"] == MICRO


def test_an_older_checkpoint_than_the_newest_loses_more(store: Store) -> None:
    clock = Clock()
    killed(store, clock, 1, FRESH, steps=10, saves={2, 4, 8})
    killed(store, clock, 2, {"attempt": 1, "global_step": 8, "branch": False}, steps=4, saves={11})
    killed(store, clock, 3, {"attempt": 1, "global_step": 4, "branch": False}, steps=1, saves=set())
    run = time_of(store)
    assert [one.lost_steps for one in run.attempts] == [6, 4, 0]
    assert run.buckets["productive"] / MICRO == pytest.approx(5.0)


def test_a_branch_loses_only_what_no_checkpoint_holds(store: Store) -> None:
    clock = Clock()
    killed(store, clock, 1, FRESH, steps=10, saves={2, 8})
    killed(store, clock, 2, {"attempt": 1, "global_step": 2, "branch": True}, steps=1, saves=set())
    assert [one.lost_steps for one in time_of(store).attempts] == [2, 0]


def test_an_attempt_killed_before_it_restored_cuts_nothing(store: Store) -> None:
    clock = Clock()
    killed(store, clock, 1, FRESH, steps=3, saves={2})
    ledger = ledger_of(store, clock)
    ledger.enter()
    ledger.beat(2)  # taken, and no further
    for stop in ledger._stops:
        stop()
    run = time_of(store)
    assert run.buckets["lost"] == 0
    assert run.attempts[1].resumed_step is None


# Clocks


def record(attempt: int, began: float, *, uptime: float | None = None, **buckets: float) -> dict[str, Any]:
    spent = {**dict.fromkeys(MEASURED, 0.0), **buckets}
    boot = {"boot": "one", "uptime": uptime} if uptime is not None else {"boot": f"machine {attempt}", "uptime": 0.0}
    resumed = {"attempt": attempt - 1 or None, "global_step": 0, "branch": False}
    return {
        "event": "time",
        "attempt": attempt,
        "began": began,
        "buckets": spent,
        "global_step": 0,
        "resumed": resumed,
        **boot,
    }


def folded(*records: dict[str, Any]) -> RunTime:
    run = fold_time([json.loads(json.dumps(one)) for one in records])
    assert run is not None
    assert sum(run.buckets.values()) == run.ended - run.began
    return run


def test_a_clock_that_is_set_between_attempts_of_one_machine_does_no_harm() -> None:
    run = folded(
        record(1, 1000.0, uptime=50.0, productive=10.0), record(2, 90000.0, uptime=65.0, start_up=1.0, productive=4.0)
    )
    assert run.buckets["down"] == 5 * MICRO
    assert run.ended - run.began == 20 * MICRO


def test_a_start_beside_the_former_attempt_is_no_start_up() -> None:
    run = folded(record(1, 1000.0, productive=10.0), record(2, 1008.0, start_up=3.0, productive=4.0))
    assert (run.buckets["down"], run.buckets["start_up"], run.overlap) == (0, MICRO, 0)
    assert run.ended == 1015 * MICRO


def test_clocks_that_contradict_each_other_are_told_and_nothing_is_counted_twice() -> None:
    run = folded(record(1, 1000.0, productive=10.0), record(2, 1002.0, start_up=3.0, productive=4.0))
    assert run.overlap == 5 * MICRO
    assert run.ended - run.began == 14 * MICRO


def test_an_attempt_that_told_of_itself_twice_counts_once() -> None:
    run = folded(
        record(1, 1000.0, productive=9.0), record(1, 1000.0, productive=10.0), record(2, 1020.0, productive=1.0)
    )
    assert [one.attempt for one in run.attempts] == [1, 2]
    assert run.buckets["down"] == 10 * MICRO


def test_attempts_without_a_record_are_named() -> None:
    assert folded(record(2, 1000.0, productive=1.0), record(4, 1010.0, productive=1.0)).untold == [1, 3]
    assert fold_time([{"event": "started", "attempt": 1}]) is None
