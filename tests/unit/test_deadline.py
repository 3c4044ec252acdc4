"""The deadline: what it measures, when it says stop, and what a run does then. The clock is the test's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dist_train import environment, trainer
from dist_train import run as run_module
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.errors import ConfigError, StopReason
from dist_train.health.deadline import SESSION_START, Deadline, session_start
from dist_train.metrics import EarlyStopping
from dist_train.options import RunOptions
from dist_train.run import Run
from dist_train.trainer import TrainConfig
from dist_train.world import SoloWorld
from tests.support.small_run import UPDATES_PER_EPOCH, SmallRun, events_of, manifests_of, metric_of_step, status_of
from tests.support.twins import assert_same_run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, deadline: Deadline, *seconds: float) -> None:
        for one in seconds:
            self.now += one
            deadline.step_done()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(clock: Clock, max_seconds: float = 100.0, *, reserve: float = 0.0, save: float = 0.0) -> Deadline:
    deadline = Deadline(max_seconds, reserve_seconds=reserve, clock=clock)
    deadline.save_ended(save)
    return deadline


def seconds_left_when_it_stops(clock: Clock, deadline: Deadline, end: float = 100.0, **next_up: Any) -> float:
    while not deadline.is_over(**next_up):
        clock.now += 0.5
        assert clock.now <= end
    return end - clock.now


# What has to fit


def test_without_a_limit_it_never_stops(clock: Clock) -> None:
    deadline = Deadline(clock=clock)
    clock.step(deadline, 1e9)
    assert not deadline.is_over(steps=64, evaluation=True)
    assert deadline.why == ""


def test_the_longest_step_seen_has_to_fit(clock: Clock) -> None:
    deadline = make(clock)
    clock.step(deadline, 2.0, 7.0, 1.0)
    assert seconds_left_when_it_stops(clock, deadline) == 7.0


def test_ranks_that_agree_every_kth_step_need_time_for_k_steps(clock: Clock) -> None:
    """One of them as slow as the slowest seen, the others as usual."""
    deadline = make(clock)
    clock.step(deadline, 4.0, 1.0, 1.0, 2.0)
    assert seconds_left_when_it_stops(clock, deadline, steps=9) == 4.0 + 8 * 2.0


def test_a_save_has_to_fit_and_one_in_flight_is_waited_for_first(clock: Clock) -> None:
    deadline = make(clock, save=6.0)
    deadline.save_begun()
    in_flight = seconds_left_when_it_stops(clock, deadline)
    deadline.save_ended(6.0)
    assert (in_flight, seconds_left_when_it_stops(clock, deadline)) == (12.0, 6.0)


def test_the_longest_save_counts_and_a_failed_one_measures_nothing(clock: Clock) -> None:
    deadline = make(clock, save=6.0)
    deadline.save_ended(9.0)
    deadline.save_ended(1.0)
    deadline.save_begun()
    deadline.save_ended(None)
    assert seconds_left_when_it_stops(clock, deadline) == 9.0


def test_a_save_that_was_never_measured_is_allowed_for() -> None:
    clock = Clock()
    assert seconds_left_when_it_stops(clock, Deadline(100.0, reserve_seconds=0.0, clock=clock)) == 2.0
    clock = Clock()
    twelve_hours = 12 * 3600.0
    deadline = Deadline(twelve_hours, reserve_seconds=0.0, clock=clock)
    clock.now = twelve_hours - 130.0
    assert seconds_left_when_it_stops(clock, deadline, twelve_hours) == 120.0


def test_the_reserve_is_two_percent_and_at_most_five_minutes_unless_it_is_given(clock: Clock) -> None:
    short, long = Deadline(100.0, clock=clock), Deadline(43200.0, clock=clock)
    short.save_ended(0.0)
    long.save_ended(0.0)
    assert seconds_left_when_it_stops(clock, short) == 2.0
    clock.now = 43200.0 - 310.0
    assert seconds_left_when_it_stops(clock, long, 43200.0) == 300.0
    clock.now = 0.0
    assert seconds_left_when_it_stops(clock, make(clock, reserve=30.0)) == 30.0


def test_the_longest_evaluation_has_to_fit_where_one_comes_next(clock: Clock) -> None:
    deadline = make(clock)
    for seconds in (3.0, 11.0, 5.0):
        clock.step(deadline, 1.0)
        clock.now += seconds
        deadline.evaluation_done()
    assert not deadline.is_over(steps=1)
    assert seconds_left_when_it_stops(clock, deadline, steps=0, evaluation=True) == 11.0


def test_an_evaluation_that_was_never_measured_is_believed_to_take_a_quarter_of_the_epoch(clock: Clock) -> None:
    deadline = make(clock)
    deadline.begin()
    clock.step(deadline, *[8.0] * 9)  # 72 s: a quarter of it is 18 s
    assert not deadline.is_over(steps=0, evaluation=True)
    clock.step(deadline, 8.0)  # 80 s: a quarter of it is what is left
    assert deadline.is_over(steps=0, evaluation=True)


def test_a_session_is_as_old_as_it_is_when_the_run_begins(clock: Clock) -> None:
    clock.now = 1e6
    deadline = Deadline(100.0, age_seconds=90.0, reserve_seconds=0.0, clock=clock)
    deadline.save_ended(0.0)
    assert not deadline.is_over()
    clock.now += 10.0
    assert deadline.is_over()
    assert deadline.why == "the session has run 1 min 40 s of at most 1 min 40 s"


def test_the_reason_names_what_does_not_fit(clock: Clock) -> None:
    deadline = make(clock, 43200.0, reserve=300.0, save=12.0)
    clock.now = 42894.0
    deadline.begin()
    clock.step(deadline, 4.0, 4.0)
    assert deadline.is_over(steps=3, evaluation=False)
    assert deadline.why == (
        "the session has run 11 h 55 min of at most 12 h 00 min; the next 3 steps (12 s), a save (12 s) and the "
        "reserve for what follows (5 min 00 s) would not fit any more"
    )


# When the session began


def test_the_environment_says_when_the_session_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SESSION_START, "1700000000.5")
    assert session_start() == 1700000000.5


def test_a_session_start_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SESSION_START, "noon")
    with pytest.raises(ConfigError, match=r"DIST_TRAIN_SESSION_START is 'noon'; it must be a Unix time.*unset it"):
        session_start()


def test_without_it_the_launcher_or_this_process_began_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SESSION_START, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = psutil.Process()
    assert session_start() == own.create_time()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # of torchrun: it outlives the workers that it restarts
    assert session_start() == psutil.Process(os.getppid()).create_time()


@pytest.mark.parametrize("max_time", ["0s", "-5", "soon"])
def test_a_limit_that_is_no_time_is_refused(max_time: str, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"write for instance|longer than nothing"):
        SmallRun(run_dir=run_dir, max_time=max_time).train()
    assert not run_dir.exists()


# What a run does


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Clock]:
    """Begins a session of so many seconds; its clock stands still unless the test moves it."""

    def begin(max_seconds: float) -> Clock:
        clock = Clock()

        def make_deadline(max_time: Any, time_reserve: Any, *, is_main: bool) -> Deadline:
            return make(clock, max_seconds) if max_time else Deadline()

        monkeypatch.setattr(run_module, "make_deadline", make_deadline)
        # A save takes no time in these tests: what it measures depends on the machine.
        monkeypatch.setattr(Deadline, "save_ended", lambda self, seconds=None: setattr(self, "_save", 0.0))
        return clock

    return begin


def passing(clock: Clock, seconds: float) -> Callable[[Run], None]:
    def pass_time(run: Run) -> None:
        clock.now += seconds

    return pass_time


Session = Callable[[float], Clock]


def test_a_run_stops_by_itself_saves_and_is_continued(
    run_dir: Path, tmp_path: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = session(7.5)
    run = SmallRun(run_dir=run_dir, max_time="1s", at_batch=passing(clock, 1.0)).train()
    assert (run.reason, run.exit_code, run.global_step) == (StopReason.TIME_LIMIT, 0, 7)
    assert manifests_of(run_dir)[-1]["progress"]["global_step"] == 7
    assert events_of(run_dir, "stopped")[-1]["reason"] == "time_limit"
    assert status_of(run_dir)["status"] == "time_limit"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        f"Time limit: the session has run 7 s of at most 8 s; the next step (1 s) would not fit any more. In {run_dir} "
        f"the newest checkpoint is step 7. Run the same command (or notebook) again to go on from there."
    )
    SmallRun(run_dir=run_dir).train()
    SmallRun(run_dir=tmp_path / "twin").train()
    assert_same_run(run_dir, tmp_path / "twin")


def test_an_evaluation_that_does_not_fit_is_left_to_the_next_session(
    run_dir: Path, tmp_path: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = session(18.0)
    small = SmallRun(run_dir=run_dir, max_time="1s", at_batch=passing(clock, 1.0))

    def evaluate(run: Run) -> dict[str, float]:
        clock.now += 6.0
        return metric_of_step(run)

    small.metrics = evaluate
    run = small.train()
    assert (run.reason, run.global_step, run.epochs_completed) == (StopReason.TIME_LIMIT, 2 * UPDATES_PER_EPOCH, 1)
    assert small.evaluated == [0]
    assert manifests_of(run_dir)[-1]["progress"]["evaluation"] == "pending"
    assert "which begins with the evaluation that is pending." in capsys.readouterr().out
    after = SmallRun(run_dir=run_dir)
    after.train()
    assert after.evaluated == [1, 2]
    assert len(after.updates) == UPDATES_PER_EPOCH
    SmallRun(run_dir=tmp_path / "twin").train()
    assert_same_run(run_dir, tmp_path / "twin")


def test_a_run_that_is_done_when_its_time_is_over_is_done(run_dir: Path, session: Session) -> None:
    clock = session(15.5)

    def tick(run: Run) -> None:
        clock.now += 5.0 if run.global_step == 3 * UPDATES_PER_EPOCH - 1 else 0.1

    run = SmallRun(run_dir=run_dir, max_time="1s", at_batch=tick).train()
    clock.now = 1e9
    assert run.reason is StopReason.DONE
    again = SmallRun(run_dir=run_dir, max_time="1s").train()
    assert (again.reason, again.global_step) == (StopReason.DONE, 3 * UPDATES_PER_EPOCH)


@pytest.mark.parametrize("max_steps", [7, UPDATES_PER_EPOCH])
def test_the_last_step_of_a_run_is_not_a_time_limit(max_steps: int, run_dir: Path, session: Session) -> None:
    clock = session(1000.0)

    def tick(run: Run) -> None:
        clock.now += 995.0 if run.global_step == max_steps - 1 else 0.1

    run = SmallRun(run_dir=run_dir, max_time="1s", max_steps=max_steps, at_batch=tick)
    run.metrics = lambda run: {"val": 1.0}
    ended = run.train()
    # At an epoch's end the evaluation is still to come, and has to fit.
    expected = StopReason.DONE if max_steps == 7 else StopReason.TIME_LIMIT
    assert (ended.reason, ended.global_step) == (expected, max_steps)
    if expected is StopReason.TIME_LIMIT:
        after = SmallRun(run_dir=run_dir, max_steps=max_steps)
        assert after.train().reason is StopReason.DONE
        assert after.evaluated == [0]


def test_patience_that_ends_with_the_time_is_early_stopping(run_dir: Path, session: Session) -> None:
    clock = session(100.0)
    small = SmallRun(run_dir=run_dir, max_time="1s", early_stopping=EarlyStopping(patience=1), epochs=9)

    def worse(run: Run) -> dict[str, float]:
        clock.now += 49.9
        return {"val": float(run.epoch)}

    small.metrics = worse
    assert small.train().reason is StopReason.EARLY_STOPPED


def test_a_session_without_time_for_a_single_step_says_so_and_ends_well(
    run_dir: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=run_dir, max_steps=3).train()
    session(0.0)
    small = SmallRun(run_dir=run_dir, max_time="1s")
    run = small.train()
    assert (run.reason, run.exit_code, run.global_step, small.updates) == (StopReason.TIME_LIMIT, 0, 3, [])
    assert [one["progress"]["global_step"] for one in manifests_of(run_dir)] == [3]
    assert "There was no time for a single step: give max_time more of it." in capsys.readouterr().out


def test_a_loop_whose_loader_is_not_ours_leaves_time_for_the_evaluation_at_every_step(
    run_dir: Path, session: Session
) -> None:
    """Nobody knows when its epoch ends."""
    clock = session(20.0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = RunOptions(max_time="1s")
    with Run(str(run_dir), model=model, optimizer=optimizer, policy=CheckpointPolicy(), options=options) as run:
        for _ in run.epochs(5):
            for _ in range(4):
                if run.should_stop:
                    break
                clock.now += 1.0
                run.step()
            else:
                clock.now += 5.0
                run.end_epoch()
    # 9 s an epoch; after the second one's evaluation (18 s), a step and an evaluation (6 s) are more than is left.
    assert (run.reason, run.global_step, run.epochs_completed) == (StopReason.TIME_LIMIT, 8, 2)


def test_what_a_save_takes_is_measured_by_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float | None] = []
    monkeypatch.setattr(Deadline, "save_ended", lambda self, seconds=None: measured.append(seconds))
    SmallRun(run_dir=run_dir, max_time="1h").train()
    saved = events_of(run_dir, "committed")
    assert measured == [event["stall_seconds"] + event["seconds"] for event in saved]
    assert all(measured)


def test_only_the_main_rank_reads_the_clock() -> None:
    class OtherRank(SoloWorld):
        rank = 1

    deadline = run_module.make_deadline("1s", None, is_main=False)
    assert deadline._max == float("inf")


def test_the_session_before_the_run_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SESSION_START, str(time.time() - 3600))
    run = SmallRun(run_dir=run_dir, max_time="1h").train()
    assert (run.reason, run.global_step, run.committed_step) == (StopReason.TIME_LIMIT, 0, 0)
    monkeypatch.setenv(SESSION_START, str(time.time() - 3000))
    assert SmallRun(run_dir=run_dir, max_time="1h").train().reason is StopReason.DONE


# Mixed precision where bf16 is missing


@pytest.mark.parametrize(
    ("gpu", "bf16", "cpu", "expected"),
    [(True, True, False, "bf16"), (True, False, False, "fp16"), (False, True, False, "no"), (True, True, True, "no")],
)
def test_auto_is_what_the_device_computes_natively(
    gpu: bool, bf16: bool, cpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(*, including_emulation: bool) -> bool:
        assert not including_emulation  # a T4 emulates it, at a fraction of the speed
        return bf16

    fake = SimpleNamespace(is_available=lambda: gpu, is_bf16_supported=is_bf16_supported)
    monkeypatch.setattr(trainer.torch, "cuda", fake)
    config = TrainConfig(run_dir="r", epochs=1, global_batch_size=1, mixed_precision="auto", cpu=cpu)
    assert trainer._choose_precision(config) == expected


def test_another_precision_is_a_difference() -> None:
    then, now = (environment.describe_environment(1, torch.device("cpu"), one) for one in ("bf16", "fp16"))
    assert environment.compare_environments(then, now) == ["mixed_precision was 'bf16' and is 'fp16'"]
