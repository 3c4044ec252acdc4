"""Signals: what they mean to a run, at each moment of it, in one process."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import dist_train as dt
from dist_train import evaluation, launched
from dist_train.callbacks import Happening
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.data import evaluation_loader, shield_workers
from dist_train.errors import StopReason
from dist_train.health import vigil
from dist_train.health.preemption import Preemption
from dist_train.health.vigil import Told
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.small_run import (
    UPDATES_PER_EPOCH,
    Numbered,
    SmallRun,
    events_of,
    manifests_of,
    smooth_model,
    status_of,
)
from tests.unit.test_run import assert_same_run, once_at

ALL = [Signals.SIGTERM, Signals.SIGINT, Signals.SIGUSR1, Signals.SIGHUP]


def send(number: Signals = Signals.SIGTERM) -> Callable[[Run], None]:
    return lambda run: signal.raise_signal(number)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Whatever a run does with signals, it puts back."""
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert [one.name for one in threading.enumerate() if "vigil" in one.name] == []


@pytest.fixture
def own_handler() -> Iterator[Callable[[Signals, Any], None]]:
    """Sets a handler for the length of a test."""
    former: dict[Signals, Any] = {}

    def take(number: Signals, handler: Any) -> None:
        former[number] = signal.signal(number, handler)

    yield take
    for number, handler in former.items():
        signal.signal(number, handler)


# At a step


@pytest.mark.parametrize("number", ALL)
def test_a_signal_ends_the_run_at_the_next_boundary_saved_and_the_next_start_goes_on_exactly(
    number: Signals, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    run = SmallRun(run_dir=run_dir, at_batch=once_at(6, send(number))).train()
    reason, code = (StopReason.INTERRUPTED, 130) if number is Signals.SIGINT else (StopReason.PREEMPTED, 0)
    assert (run.reason, run.exit_code, run.global_step) == (reason, code, 7)
    assert manifests_of(run_dir)[-1]["progress"]["global_step"] == 7
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"]) == (reason, code)
    (event,) = events_of(run_dir, "preempted")
    assert (event["signal"], event["global_step"]) == (number.name, 7)
    said = capsys.readouterr().out
    assert said.count(f"{number.name}: saving at the next step boundary and stopping.") == 1
    assert f"Stopped by {number.name} after step 7. In {run_dir} the newest checkpoint is step 7. Run the same" in said
    SmallRun(run_dir=run_dir).train()
    assert_same_run(tmp_path / "twin", run_dir)


def test_a_signal_inside_a_window_is_acted_on_at_its_end(run_dir: Path) -> None:
    loop = SmallRun(run_dir=run_dir, accelerator=Accelerator(cpu=True), model=smooth_model(), micro_batch_size=1)
    loop.at_batch = lambda run: signal.raise_signal(Signals.SIGTERM) if len(loop.used) == 6 else None
    run = loop.train()
    assert (run.reason, run.global_step, len(loop.used)) == (StopReason.PREEMPTED, 2, 8)


def test_the_last_boundary_has_nothing_left_to_preempt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A requeue would only start a run that is done."""

    def last_evaluation(run: Run) -> dict[str, float]:
        if run.epoch == 2:
            signal.raise_signal(Signals.SIGTERM)
        return {"val": 1.0}

    run = SmallRun(run_dir=run_dir, metrics=last_evaluation).train()
    assert (run.reason, run.epochs_completed) == (StopReason.DONE, 3)
    assert events_of(run_dir, "preempted") == []
    assert "SIGTERM" not in capsys.readouterr().out


def test_a_signal_while_the_end_is_saved_changes_nothing(run_dir: Path) -> None:
    class Late(SmallRun):
        def options(self) -> RunOptions:
            return replace(super().options(), max_steps=7)

    late: list[Signals] = []

    def at_stop(happening: Happening) -> None:
        late.append(Signals.SIGTERM)
        signal.raise_signal(Signals.SIGTERM)

    loop = Late(run_dir=run_dir, at_epoch=once_at(0, lambda run: run.on("stopping", at_stop)))
    run = loop.train()
    assert (run.reason, run.committed_step, len(late)) == (StopReason.DONE, 7, 1)


def test_the_stopping_callback_is_told_that_it_is_a_preemption(run_dir: Path) -> None:
    told: list[str] = []
    loop = SmallRun(run_dir=run_dir, at_batch=once_at(2, send()))
    loop.at_epoch = once_at(0, lambda run: run.on("stopping", lambda happening: told.append(happening.reason)))
    loop.train()
    assert told == ["preempted"]


def test_a_divergence_that_a_signal_meets_stays_one(run_dir: Path) -> None:
    """93 says: do not start again. A preemption would."""

    def both(run: Run) -> None:
        signal.raise_signal(Signals.SIGTERM)
        run.stop(StopReason.DIVERGED)

    assert SmallRun(run_dir=run_dir, at_batch=once_at(3, both)).train().exit_code == 93


# Between steps


def test_alone_a_run_that_waits_for_data_does_not_train_on_what_it_waited_for(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    get, count = Numbered.__getitem__, 0

    def slow_get(self: Numbered, index: int) -> Any:
        nonlocal count
        count += 1
        if count == 4 * 7 + 2:  # in the middle of the eighth batch
            signal.raise_signal(Signals.SIGTERM)
        return get(self, index)

    monkeypatch.setattr(Numbered, "__getitem__", slow_get)
    loop = SmallRun(run_dir=run_dir)
    run = loop.train()
    assert (run.reason, run.global_step, len(loop.used)) == (StopReason.PREEMPTED, 7, 7)
    assert run.committed_step == 7
    SmallRun(run_dir=run_dir).train()
    assert_same_run(tmp_path / "twin", run_dir)


@pytest.mark.parametrize("step", [0, 5])
def test_alone_a_run_stops_at_an_epoch_s_beginning(step: int, run_dir: Path, tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    loop = SmallRun(run_dir=run_dir, at_epoch=once_at(step, send()))
    run = loop.train()
    assert (run.reason, run.global_step, len(loop.used)) == (StopReason.PREEMPTED, step, step)
    SmallRun(run_dir=run_dir).train()
    assert_same_run(tmp_path / "twin", run_dir)


# In an evaluation


class Evaluating(SmallRun):
    """Its evaluation draws random numbers and moves the schedule, as one with ReduceLROnPlateau does."""

    seen: int = 0
    signal_at: int = 0
    """Batches of evaluations until the signal; 0 sends none."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.metrics = self._evaluate

    def _evaluate(self, run: Run) -> dict[str, float]:
        total = dt.Mean()
        with run.evaluation() as model:
            for batch in run.batches(evaluation_loader(Numbered(6), batch_size=2)):
                self.seen += 1
                if self.seen == self.signal_at:
                    signal.raise_signal(Signals.SIGTERM)
                total.update(model(batch[0]).sum() + torch.rand(()) + random.random())
        self.scheduler.step()
        return {"val": total.compute(run.world)}


@pytest.mark.parametrize("policy", [CheckpointPolicy(every_epochs=1), CheckpointPolicy(every_steps=5)])
def test_an_evaluation_that_a_signal_cuts_counts_for_nothing_and_is_made_again(
    policy: CheckpointPolicy, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Evaluating(run_dir=tmp_path / "twin", policy=policy).train()
    loop = Evaluating(run_dir=run_dir, policy=policy)
    loop.signal_at = 3 + 2
    run = loop.train()
    assert loop.seen == 5
    assert (run.reason, run.global_step, run.epochs_completed) == (StopReason.PREEMPTED, 10, 1)
    progress = manifests_of(run_dir)[-1]["progress"]
    assert (progress["evaluation"], progress["global_step"]) == ("pending", 10)
    assert "which begins with the evaluation that is pending" in capsys.readouterr().out
    again = Evaluating(run_dir=run_dir, policy=policy)
    again.train()
    assert again.evaluated == [1, 2]
    assert_same_run(tmp_path / "twin", run_dir)


def test_the_last_evaluation_of_a_run_that_max_steps_ends_is_made_again_too(run_dir: Path) -> None:
    loop = Evaluating(run_dir=run_dir, max_steps=UPDATES_PER_EPOCH)
    loop.signal_at = 1
    assert (loop.train().reason, loop.seen) == (StopReason.PREEMPTED, 1)
    again = Evaluating(run_dir=run_dir, max_steps=UPDATES_PER_EPOCH)
    assert (again.train().reason, again.seen, again.evaluated) == (StopReason.DONE, 3, [0])


def test_an_evaluation_whose_ranks_wait_for_each_other_is_not_cut(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that left it would leave the others hanging in `accelerator.gather`."""
    counts = iter(range(1000))
    monkeypatch.setattr(evaluation, "count_collectives", lambda: next(counts))
    loop = Evaluating(run_dir=run_dir)
    loop.signal_at = 2
    run = loop.train()
    assert (run.reason, loop.seen, run.epochs_completed) == (StopReason.PREEMPTED, 3, 1)
    assert manifests_of(run_dir)[-1]["progress"]["evaluation"] == "done"


def test_an_evaluation_in_the_middle_of_an_epoch_is_not_cut(run_dir: Path) -> None:
    """What a loop does with its result is not undone."""
    counts: list[int] = []

    def evaluate(run: Run) -> None:
        signal.raise_signal(Signals.SIGTERM)
        counts.append(len(list(run.batches(evaluation_loader(Numbered(6), batch_size=2)))))

    run = SmallRun(run_dir=run_dir, at_batch=once_at(2, evaluate)).train()
    assert (run.global_step, counts) == (3, [3])


# The handlers


def test_a_second_ctrl_c_means_now(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "AGAIN_SECONDS", 0.0)

    def twice(run: Run) -> None:
        signal.raise_signal(Signals.SIGINT)
        signal.raise_signal(Signals.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        SmallRun(run_dir=run_dir, at_batch=once_at(3, twice)).train()
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"]) == ("interrupted", 130)


def test_one_ctrl_c_that_arrives_twice_is_one() -> None:
    """From the terminal and from a launcher."""
    told = Told()
    assert [told.hear(Signals.SIGINT, at) for at in (5.0, 5.9, 6.1)] == [False, False, True]


def test_sigterm_after_a_warning_still_saves() -> None:
    """SLURM: USR1 five minutes ahead, TERM at the limit. Only a second TERM is one too many."""
    told = Told()
    warnings_first = (Signals.SIGUSR1, Signals.SIGUSR1, Signals.SIGHUP, Signals.SIGTERM)
    assert not any(told.hear(number, at) for at, number in enumerate(warnings_first))
    assert (told.signal, told.at) == (Signals.SIGTERM, 3)
    assert told.hear(Signals.SIGINT, 5.0)


KILLED_BY_THE_SECOND = """
import signal, time
from dist_train.health import vigil
from dist_train.health.preemption import Preemption
from dist_train.health.vigil import Told
one = Preemption()
one.open()
signal.raise_signal(signal.SIGTERM)
end = time.monotonic() + 20
print("alive", flush=True)
while time.monotonic() < end:
    time.sleep(0.05)
    signal.raise_signal(signal.SIGTERM)
"""


def test_a_second_sigterm_is_the_end() -> None:
    command = [sys.executable, "-c", KILLED_BY_THE_SECOND]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "alive\n"), ended.stderr


def test_an_ignored_signal_stays_ignored(run_dir: Path, own_handler: Callable[[Signals, Any], None]) -> None:
    """nohup."""
    own_handler(Signals.SIGHUP, signal.SIG_IGN)
    assert SmallRun(run_dir=run_dir, at_batch=once_at(3, send(Signals.SIGHUP))).train().reason is StopReason.DONE


def test_a_handler_of_the_script_s_own_stays_and_is_told_once(
    run_dir: Path, own_handler: Callable[[Signals, Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []
    own_handler(Signals.SIGUSR1, lambda number, frame: heard.append(number))
    logging.getLogger("dist_train").addHandler(caplog.handler)
    loop = SmallRun(run_dir=run_dir, at_batch=once_at(3, send(Signals.SIGUSR1)))
    assert loop.train().reason is StopReason.DONE
    logging.getLogger("dist_train").removeHandler(caplog.handler)
    assert heard == [signal.SIGUSR1]
    assert sum("SIGUSR1 has a handler of this script's" in record.getMessage() for record in caplog.records) == 1


def test_handlers_are_put_back_after_an_error(run_dir: Path) -> None:
    def fail(run: Run) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        SmallRun(run_dir=run_dir, at_batch=once_at(2, fail)).train()


def test_a_run_within_a_run_takes_the_signal_and_passes_it_on(tmp_path: Path) -> None:
    inner: list[Run] = []

    def nest(run: Run) -> None:
        one = SmallRun(run_dir=tmp_path / "inner", at_batch=once_at(1, send()))
        inner.append(one.train())

    outer = SmallRun(run_dir=tmp_path / "outer", at_batch=once_at(3, nest)).train()
    assert (inner[0].reason, inner[0].global_step) == (StopReason.PREEMPTED, 2)
    assert (outer.reason, outer.global_step) == (StopReason.PREEMPTED, 4)


def test_off_the_main_thread_a_run_trains_on_with_one_notice(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("dist_train").addHandler(caplog.handler)
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(SmallRun(run_dir=run_dir).train()))
    thread.start()
    thread.join(timeout=60)
    logging.getLogger("dist_train").removeHandler(caplog.handler)
    assert runs[0].reason is StopReason.DONE
    assert sum("not on the main thread" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("missing", ["SIGUSR1", "SIGHUP"])
def test_a_platform_without_a_signal_does_without(missing: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, missing)
    assert SmallRun(run_dir=run_dir, at_batch=once_at(3, send())).train().reason is StopReason.PREEMPTED


def test_where_handlers_may_not_be_set_the_run_trains_on_with_one_notice(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int, handler: Any) -> None:
        raise OSError(1, "Operation not permitted")

    logging.getLogger("dist_train").addHandler(caplog.handler)
    monkeypatch.setattr(signal, "signal", refuse)
    assert SmallRun(run_dir=run_dir).train().reason is StopReason.DONE
    logging.getLogger("dist_train").removeHandler(caplog.handler)
    assert sum("Signals cannot be handled here" in record.getMessage() for record in caplog.records) == 1


def test_a_forked_child_tells_its_parent_nothing(run_dir: Path) -> None:
    """A DataLoader's worker inherits the descriptor on which the parent hears of signals."""
    one = Preemption()
    one.open()
    child = os.fork()
    if child == 0:
        os._exit(0 if signal.set_wakeup_fd(-1) == -1 else 3)
    assert os.waitpid(child, 0)[1] == 0
    one.close()


def test_workers_of_a_loader_of_the_user_s_outlive_every_signal_to_the_job() -> None:
    loader = DataLoader(Numbered(60), batch_size=2, num_workers=1, worker_init_fn=lambda worker: os.nice(1))
    shield_workers(loader)
    shield_workers(loader)
    batches: Any = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for number in ALL:  # from another process, as a launcher or scheduler sends it
        command = ["kill", f"-{number.name.removeprefix('SIG')}", str(worker.pid)]
        subprocess.run(command, check=True, timeout=10)
    assert len(list(batches)) == 29


# Exit codes

DIRECT: dict[str, str] = {}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
LAUNCH = {**TORCHRUN, launched.LAUNCH_DIR: "/nowhere"}
CODES = [
    # reason, requeue_exit, directly, dist-train launch, plain torchrun
    (StopReason.DONE, False, 0, 0, 0),
    (StopReason.EARLY_STOPPED, True, 0, 0, 0),
    (StopReason.PREEMPTED, False, 0, 0, 0),
    (StopReason.PREEMPTED, True, 75, 75, 0),
    (StopReason.TIME_LIMIT, False, 0, 0, 0),
    (StopReason.TIME_LIMIT, True, 75, 75, 0),
    (StopReason.INTERRUPTED, True, 130, 130, 130),
    (StopReason.DIVERGED, True, 93, 93, 0),
    (StopReason.ERROR, True, 1, 1, 1),
]


@pytest.mark.parametrize(("reason", "requeue", "direct", "launch", "torchrun"), CODES)
def test_the_exit_code_depends_on_who_reads_it(
    reason: StopReason, requeue: bool, direct: int, launch: int, torchrun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for environment, expected in ((DIRECT, direct), (LAUNCH, launch), (TORCHRUN, torchrun)):
        with monkeypatch.context() as one:
            for name in LAUNCH:
                one.delenv(name, raising=False)
            for name, value in environment.items():
                one.setenv(name, value)
            assert launched.exit_code(reason, requeue=requeue) == expected


def test_a_run_that_asks_to_be_requeued_ends_with_75_in_status_json_too(run_dir: Path) -> None:
    class Requeued(SmallRun):
        def options(self) -> RunOptions:
            return replace(super().options(), requeue_exit=True)

    run = Requeued(run_dir=run_dir, at_batch=once_at(2, send())).train()
    assert (run.exit_code, status_of(run_dir)["exit_code"]) == (75, 75)
    assert Requeued(run_dir=run_dir).train().exit_code == 0


def test_fit_returns_to_a_cell_that_was_interrupted(run_dir: Path) -> None:
    """No traceback: the cell goes on, with a result that says why."""
    model = torch.nn.Linear(3, 1)
    trainer = dt.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=Numbered(),
        loss=lambda one, batch: one(batch[0]).square().mean(),
        callbacks={"step": lambda happening: signal.raise_signal(Signals.SIGINT)},
        config=dt.TrainConfig(run_dir=str(run_dir), epochs=3, global_batch_size=4, cpu=True, requeue_exit=True),
    )
    result = trainer.fit()
    assert (result.status, result.exit_code, result.global_step) == (StopReason.INTERRUPTED, 130, 1)
