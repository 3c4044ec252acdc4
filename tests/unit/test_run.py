"""Run: one attempt of any loop. Stops, resumes, saves, failures, misuse; one process, real files."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from dist_train import boundary
from dist_train import run as run_module
from dist_train.checkpoint.manifest import CHECKPOINTS
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.data import data_loader
from dist_train.errors import (
    ConfigError,
    RunInUseError,
    SaveFailedError,
    StateMismatchError,
    StopReason,
    UnsaveableStateError,
)
from dist_train.history import read_metrics
from dist_train.metrics import EarlyStopping
from dist_train.rng import capture_rng
from dist_train.run import Run
from tests.support.small_run import (
    AT_THE_END,
    EACH_EPOCH,
    UPDATES_PER_EPOCH,
    BrokenDisk,
    Numbered,
    SmallRun,
    StandIn,
    events_of,
    manifests_of,
    small_model,
    small_optimizer,
    smooth_model,
    squared_error,
    status_of,
)
from tests.support.twins import assert_same_run, read_checkpoint, same_bits


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state in singletons; each test begins and leaves without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(params=["plain", "accelerate"])
def make_accelerator(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return (lambda: None) if request.param == "plain" else (lambda: Accelerator(cpu=True))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def once_at(step: int, action: Callable[[Run], Any]) -> Callable[[Run], None]:
    """A hook that acts the first time `run.global_step` is `step`."""
    done = []

    def act(run: Run) -> None:
        if run.global_step == step and not done:
            done.append(step)
            action(run)

    return act


def fail_at(step: int, error: BaseException) -> Callable[[Run], None]:
    def fail(run: Run) -> None:
        if run.global_step == step:
            raise error

    return fail


# Stopping and going on


@pytest.mark.parametrize("step", [1, 7, 14])
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_same_end(
    step: int, tmp_path: Path, make_accelerator: Callable[[], Any]
) -> None:
    SmallRun(run_dir=tmp_path / "twin", accelerator=make_accelerator()).train()
    first = SmallRun(run_dir=tmp_path / "run", accelerator=make_accelerator(), max_steps=step)
    run = first.train()
    assert (run.reason, run.global_step, run.committed_step) == (StopReason.DONE, step, step)
    second = SmallRun(run_dir=tmp_path / "run", accelerator=make_accelerator())
    run = second.train()
    assert run.resumed_from == str(tmp_path / f"run/checkpoints/step-{step:08d}")
    assert (len(first.used), len(second.used)) == (step, 3 * UPDATES_PER_EPOCH - step)
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_plain_loop_and_accelerate_train_the_same_weights(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "plain").train()
    SmallRun(run_dir=tmp_path / "accelerate", accelerator=Accelerator(cpu=True)).train()
    assert_same_run(tmp_path / "plain", tmp_path / "accelerate")


def test_a_complete_run_says_so_and_trains_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SmallRun(run_dir=run_dir).train()
    before, _ = manifests_of(run_dir), capsys.readouterr()
    again = SmallRun(run_dir=run_dir)
    run = again.train()
    assert again.used == []
    assert again.evaluated == []
    assert (run.reason, run.exit_code, run.epochs_completed) == (StopReason.DONE, 0, 3)
    assert "Nothing is left to do; give more epochs to go on." in capsys.readouterr().out
    assert manifests_of(run_dir) == before


@pytest.mark.parametrize("steps", [7, UPDATES_PER_EPOCH])
def test_a_run_that_reached_max_steps_trains_nothing_more_however_often_it_is_started(
    steps: int, run_dir: Path
) -> None:
    SmallRun(run_dir=run_dir, max_steps=steps).train()
    before = manifests_of(run_dir)
    for _ in range(2):
        again = SmallRun(run_dir=run_dir, max_steps=steps)
        run = again.train()
        assert again.used == []
        assert (run.reason, run.global_step) == (StopReason.DONE, steps)
    assert manifests_of(run_dir) == before


def test_max_steps_at_an_epochs_last_update_still_evaluates(run_dir: Path) -> None:
    first = SmallRun(run_dir=run_dir, max_steps=UPDATES_PER_EPOCH)
    assert first.train().metrics == {"val": 1.0}
    assert first.evaluated == [0]
    (manifest,) = manifests_of(run_dir)
    assert manifest["progress"]["evaluation"] == "done"


def test_epochs_added_later_go_on_to_the_end_of_the_longer_run(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "twin", epochs=4).train()
    SmallRun(run_dir=tmp_path / "run", epochs=2).train()
    longer = SmallRun(run_dir=tmp_path / "run", epochs=4)
    longer.train()
    assert longer.evaluated == [2, 3]
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def preempt(run: Run) -> None:
    run.stop(StopReason.PREEMPTED)


def test_a_stop_is_obeyed_at_the_updates_end(run_dir: Path, make_accelerator: Callable[[], Any]) -> None:
    stopped = SmallRun(run_dir=run_dir, accelerator=make_accelerator(), at_batch=once_at(6, preempt))
    run = stopped.train()
    assert (run.reason, run.exit_code, run.should_stop) == (StopReason.PREEMPTED, 0, True)
    assert (run.global_step, run.committed_step, len(stopped.used)) == (7, 7, 7)
    assert stopped.evaluated == [0]


def test_a_stop_at_an_epochs_last_update_leaves_its_evaluation_to_the_resume(
    tmp_path: Path, make_accelerator: Callable[[], Any]
) -> None:
    last = UPDATES_PER_EPOCH - 1
    SmallRun(run_dir=tmp_path / "twin", accelerator=make_accelerator()).train()
    first = SmallRun(run_dir=tmp_path / "run", accelerator=make_accelerator(), at_batch=once_at(last, preempt))
    first.train()
    assert first.evaluated == []
    (manifest,) = manifests_of(tmp_path / "run")
    assert manifest["progress"]["evaluation"] == "pending"
    assert manifest["progress"]["epochs_completed"] == 0
    assert manifest["metrics"] == {}
    only = SmallRun(run_dir=tmp_path / "run", accelerator=make_accelerator(), epochs=1)
    run = only.train()
    assert only.used == []
    assert only.evaluated == [0]
    assert (run.epochs_completed, run.global_step, run.metrics) == (1, UPDATES_PER_EPOCH, {"val": 1.0})
    SmallRun(run_dir=tmp_path / "run", accelerator=make_accelerator()).train()
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_an_evaluation_pending_at_max_steps_is_run_before_the_run_is_done(run_dir: Path) -> None:
    last = UPDATES_PER_EPOCH - 1
    SmallRun(run_dir=run_dir, max_steps=UPDATES_PER_EPOCH, at_batch=once_at(last, preempt)).train()
    again = SmallRun(run_dir=run_dir, max_steps=UPDATES_PER_EPOCH)
    run = again.train()
    assert (again.used, again.evaluated) == ([], [0])
    assert (run.reason, run.epochs_completed) == (StopReason.DONE, 1)


def test_a_preempted_run_goes_on_by_the_same_command(run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, at_batch=once_at(2, preempt)).train()
    again = SmallRun(run_dir=run_dir)
    assert again.train().reason is StopReason.DONE
    assert len(again.used) == 3 * UPDATES_PER_EPOCH - 3


# Early stopping, and the best so far


def worsening(run: Run) -> dict[str, float]:
    return {"val": float(run.epoch)}


def test_the_patience_counter_survives_a_resume(run_dir: Path) -> None:
    patience = EarlyStopping(patience=2)
    options: dict[str, Any] = {"metrics": worsening, "early_stopping": patience, "epochs": 9}
    SmallRun(run_dir=run_dir, max_steps=2 * UPDATES_PER_EPOCH + 1, **options).train()
    second = SmallRun(run_dir=run_dir, **options)
    run = second.train()
    assert (run.reason, run.exit_code, run.epochs_completed) == (StopReason.EARLY_STOPPED, 0, 3)
    assert second.evaluated == [2]


def test_a_run_that_was_stopped_early_stays_stopped(run_dir: Path) -> None:
    options: dict[str, Any] = {"metrics": worsening, "early_stopping": EarlyStopping(patience=1), "epochs": 9}
    SmallRun(run_dir=run_dir, **options).train()
    again = SmallRun(run_dir=run_dir, **options)
    run = again.train()
    assert again.used == []
    assert (run.reason, run.epochs_completed) == (StopReason.EARLY_STOPPED, 2)
    assert status_of(run_dir)["status"] == "early_stopped"


def test_more_patience_lets_a_stopped_run_go_on(run_dir: Path) -> None:
    options: dict[str, Any] = {"metrics": worsening, "epochs": 4}
    SmallRun(run_dir=run_dir, early_stopping=EarlyStopping(patience=1), **options).train()
    more = SmallRun(run_dir=run_dir, early_stopping=EarlyStopping(patience=3), **options)
    assert more.train().epochs_completed == 4
    assert more.evaluated == [2, 3]


@pytest.mark.parametrize(("mode", "best", "link"), [("min", 2 / 7, 10), ("max", 1.0, 5)])
def test_the_best_value_is_remembered_over_resumes(mode: Any, best: float, link: int, run_dir: Path) -> None:
    policy = CheckpointPolicy(every_epochs=1, monitor="val", mode=mode, keep_last=1)
    for epochs in (1, 2, 3):
        run = SmallRun(run_dir=run_dir, epochs=epochs, policy=policy).train()
    assert run.best == best
    assert manifests_of(run_dir)[-1]["best"]["value"] == best
    assert (run_dir / "best").resolve().name == f"step-{link:08d}"


def test_a_nan_is_never_the_best(run_dir: Path) -> None:
    values = iter([math.nan, 3.0, math.nan])
    run = SmallRun(run_dir=run_dir, metrics=lambda run: {"val": next(values)}).train()
    assert run.best == 3.0
    assert (run_dir / "best").resolve().name == "step-00000010"
    recorded = [record["val"] for record in read_metrics(Store(run_dir)) if record["kind"] == "epoch"]
    assert [math.isnan(value) for value in recorded] == [True, False, True]


def test_a_monitor_that_was_never_measured_is_an_error_that_names_what_was(run_dir: Path) -> None:
    policy = CheckpointPolicy(every_epochs=1, monitor="val_smape")
    with pytest.raises(ConfigError, match=r"monitor='val_smape' is not among the metrics given to end_epoch \(val\)"):
        SmallRun(run_dir=run_dir, policy=policy).train()


# Saving


def test_a_save_inside_a_window_waits_for_its_end(run_dir: Path) -> None:
    seen: list[tuple[int, int]] = []

    def ask(run: Run) -> None:
        if len(loop.used) == 2:
            run.save()
        if len(loop.used) <= 4:
            run._checkpointer.wait()
            seen.append((run.global_step, len(list((run_dir / CHECKPOINTS).glob("step-*")))))

    loop = SmallRun(
        run_dir=run_dir,
        epochs=1,
        model=smooth_model(),
        accelerator=Accelerator(cpu=True),
        micro_batch_size=1,
        policy=AT_THE_END,
        at_step=ask,
    )
    loop.train()
    assert seen == [(0, 0), (0, 0), (0, 0), (1, 1)]
    assert [(one["progress"]["global_step"], one["reason"]) for one in manifests_of(run_dir)] == [
        (1, "requested"),
        (5, "end"),
    ]


def test_a_save_inside_a_window_that_is_waited_for_is_durable_when_the_window_ends(run_dir: Path) -> None:
    seen: list[tuple[int, int]] = []

    def ask(run: Run) -> None:
        seen.append((run.global_step, run.committed_step))
        if len(loop.used) == 2:
            run.save(wait=True)

    loop = SmallRun(
        run_dir=run_dir,
        epochs=1,
        model=smooth_model(),
        accelerator=Accelerator(cpu=True),
        micro_batch_size=1,
        policy=AT_THE_END,
        at_step=ask,
    )
    loop.train()
    assert seen[:4] == [(0, -1), (0, -1), (0, -1), (1, 1)]


def test_a_save_that_is_waited_for_is_durable_on_return(run_dir: Path, make_accelerator: Callable[[], Any]) -> None:
    seen: list[tuple[int, bool]] = []

    def save(run: Run) -> None:
        run.save(wait=True)
        seen.append((run.committed_step, (run_dir / "checkpoints/step-00000002/manifest.json").exists()))

    loop = SmallRun(run_dir=run_dir, accelerator=make_accelerator(), epochs=1, at_step=once_at(2, save))
    loop.train()
    assert seen == [(2, True)]


def test_a_save_due_at_an_epochs_last_update_waits_for_the_evaluation(run_dir: Path) -> None:
    steps = CheckpointPolicy(every_steps=UPDATES_PER_EPOCH, keep_last=9)
    SmallRun(run_dir=run_dir, policy=steps).train()
    saved = [(one["progress"]["global_step"], one["progress"]["evaluation"]) for one in manifests_of(run_dir)]
    assert saved == [(5, "done"), (10, "done"), (15, "done")]
    assert all(one["metrics"] for one in manifests_of(run_dir))


def test_a_request_at_an_epochs_last_update_is_obeyed_at_once(run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, epochs=1, at_step=once_at(5, lambda run: run.save())).train()
    assert [one["progress"]["evaluation"] for one in manifests_of(run_dir)] == ["pending", "done"]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_time_based_saves_follow_the_clock(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(boundary, "time", clock)

    def pass_time(run: Run) -> None:
        clock.now += 25.0

    policy = CheckpointPolicy(every="1min", keep_last=9)
    SmallRun(run_dir=run_dir, epochs=2, policy=policy, at_batch=pass_time).train()
    # Every third update; 6 is its own epoch's first and 9 follows, the end comes by itself.
    saved = [(one["progress"]["global_step"], one["reason"]) for one in manifests_of(run_dir)]
    assert saved == [(3, "every"), (6, "every"), (9, "every"), (10, "end")]


def test_time_based_saves_do_not_wait_for_an_evaluation_in_vain(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(boundary, "time", clock)

    def pass_time(run: Run) -> None:
        clock.now += 61.0 if run.global_step == UPDATES_PER_EPOCH - 1 else 0.0

    policy = CheckpointPolicy(every="1min", at_end=False)
    SmallRun(run_dir=run_dir, epochs=2, policy=policy, at_batch=pass_time).train()
    (manifest,) = manifests_of(run_dir)
    assert (manifest["progress"]["global_step"], manifest["progress"]["evaluation"]) == (5, "done")


def test_without_a_save_at_the_end_nothing_is_saved_there(run_dir: Path) -> None:
    run = SmallRun(run_dir=run_dir, policy=CheckpointPolicy(every_steps=4, at_end=False), max_steps=6).train()
    assert run.committed_step == 4


def test_a_save_leaves_every_global_generator_alone(run_dir: Path) -> None:
    drawn: list[Any] = []

    def save(run: Run) -> None:
        random.random(), np.random.rand(), torch.rand(())  # so that none of them is freshly seeded
        before = capture_rng()
        run.save(wait=True)
        drawn.append(capture_rng() == before)

    SmallRun(run_dir=run_dir, epochs=1, at_step=save).train()
    assert drawn == [True] * UPDATES_PER_EPOCH


def test_saving_at_every_step_trains_the_same_weights_as_saving_once(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "often", policy=CheckpointPolicy(every_steps=1)).train()
    SmallRun(run_dir=tmp_path / "once", policy=AT_THE_END).train()
    assert_same_run(tmp_path / "often", tmp_path / "once")


# Saves that fail


def test_training_goes_on_over_failed_saves_and_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = BrokenDisk()

    def break_for_a_while(run: Run) -> None:
        run._checkpointer.wait()
        disk.broken = 3 <= run.global_step < 7

    policy = CheckpointPolicy(every_steps=2)
    loop = SmallRun(run_dir=run_dir, policy=policy, at_batch=break_for_a_while, open_store=disk.open_store)
    run = loop.train()
    assert (run.reason, run.committed_step) == (StopReason.DONE, 15)
    assert disk.refused >= 2
    errors = capsys.readouterr().err
    assert "The checkpoint of step 4 was not saved" in errors
    assert "(failure 1 of at most 5 in a row)" in errors
    assert "the newest is step 2." in errors
    failed = events_of(run_dir, "failed")
    assert [(one["global_step"], one["out_of_space"]) for one in failed] == [(4, False), (6, False)]
    assert not list((run_dir / CHECKPOINTS).glob(".*"))


def test_a_full_disk_is_called_by_its_name(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = BrokenDisk(error=errno.ENOSPC)

    def fill_for_a_while(run: Run) -> None:
        run._checkpointer.wait()
        disk.broken = run.global_step == 1

    policy = CheckpointPolicy(every_steps=2)
    SmallRun(run_dir=run_dir, epochs=1, policy=policy, at_batch=fill_for_a_while, open_store=disk.open_store).train()
    assert re.search("no space: .*the device has no space left or a quota is exceeded", capsys.readouterr().err)
    assert [one["out_of_space"] for one in events_of(run_dir, "failed")] == [True]


def test_too_many_failed_saves_in_a_row_end_training(run_dir: Path) -> None:
    disk = BrokenDisk()

    def break_it(run: Run) -> None:
        run._checkpointer.wait()
        disk.broken = run.global_step >= 2

    policy = CheckpointPolicy(every_steps=1, max_failed_saves=2)
    loop = SmallRun(run_dir=run_dir, policy=policy, at_batch=break_it, open_store=disk.open_store)
    with pytest.raises(SaveFailedError, match=r"3 saves failed in a row.*max_failed_saves is 2.*newest checkpoint is"):
        loop.train()
    assert loop.run is not None
    assert loop.run.committed_step == 2
    assert len(events_of(run_dir, "failed")) == 3
    assert status_of(run_dir)["status"] == "error"
    assert SmallRun(run_dir=run_dir).train().committed_step == 15


def test_a_success_in_between_forgives_failed_saves(run_dir: Path) -> None:
    disk = BrokenDisk()

    def break_every_other(run: Run) -> None:
        run._checkpointer.wait()
        disk.broken = run.global_step % 2 == 1

    policy = CheckpointPolicy(every_steps=1, max_failed_saves=1)
    run = SmallRun(run_dir=run_dir, policy=policy, at_batch=break_every_other, open_store=disk.open_store).train()
    assert run.reason is StopReason.DONE
    assert len(events_of(run_dir, "failed")) == 7


def test_a_failed_last_save_is_tried_once_more(run_dir: Path) -> None:
    disk = BrokenDisk(broken=True)

    def repair(operation: Operation) -> None:
        try:
            disk(operation)
        finally:
            disk.broken = disk.refused < 1

    loop = SmallRun(run_dir=run_dir, policy=AT_THE_END, open_store=lambda root: Store(root, observer=repair))
    assert loop.train().committed_step == 15
    assert len(events_of(run_dir, "failed")) == 1


def test_a_last_save_that_fails_twice_is_an_error(run_dir: Path) -> None:
    disk = BrokenDisk(broken=True)
    with pytest.raises(SaveFailedError, match=r"The end of the run \(step 15\) could not be saved"):
        SmallRun(run_dir=run_dir, policy=AT_THE_END, open_store=disk.open_store).train()
    assert len(events_of(run_dir, "failed")) == 2
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"]) == ("error", 1)
    assert status["error"].startswith("SaveFailedError: The end of the run")


# Leaving by an exception, and being replaced


def test_an_exception_finishes_the_save_in_flight_and_frees_the_directory(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    policy = CheckpointPolicy(every_steps=6)
    run_dir = tmp_path / "run"
    loop = SmallRun(run_dir=run_dir, policy=policy, at_step=fail_at(6, RuntimeError("a bug\nof two lines")))
    with pytest.raises(RuntimeError, match="a bug"):
        loop.train()
    assert loop.run is not None
    assert (loop.run.reason, loop.run.exit_code, loop.run.committed_step) == (StopReason.ERROR, 1, 6)
    assert status_of(run_dir) == {
        "status": "error",
        "exit_code": 1,
        "global_step": 6,
        "attempt": 1,
        "epochs_completed": 1,
        "error": "RuntimeError: a bug",
    }
    assert json.loads((run_dir / "attempts/owner.json").read_text())["released"] is True
    assert SmallRun(run_dir=run_dir).train().resumed_from == str(run_dir / "checkpoints/step-00000006")
    assert_same_run(tmp_path / "twin", run_dir)


def test_ctrl_c_is_an_interruption(run_dir: Path) -> None:
    loop = SmallRun(run_dir=run_dir, at_step=fail_at(3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    assert loop.run is not None
    assert loop.run.exit_code == 130
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"], status["global_step"]) == ("interrupted", 130, 3)


@pytest.mark.parametrize("micro_steps", [2, 4, 6])
def test_a_cell_interrupted_inside_a_window_and_run_again_trains_as_if_it_had_not_been(
    micro_steps: int, tmp_path: Path
) -> None:
    """In a notebook the objects stay: half a window's gradients and Accelerate's own counter among them."""
    options: dict[str, Any] = {"epochs": 1, "micro_batch_size": 1, "policy": CheckpointPolicy(every_steps=1)}
    SmallRun(run_dir=tmp_path / "twin", accelerator=Accelerator(cpu=True), model=smooth_model(), **options).train()

    def interrupt(run: Run) -> None:
        if len(loop.used) == micro_steps:
            raise KeyboardInterrupt

    accelerator, model = Accelerator(cpu=True), smooth_model()
    options |= {"accelerator": accelerator, "model": model}
    loop = SmallRun(run_dir=tmp_path / "run", at_batch=interrupt, **options)
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    if not manifests_of(tmp_path / "run"):
        model.load_state_dict(smooth_model().state_dict())  # a fresh start takes the objects as they are given
        model.zero_grad()
    SmallRun(run_dir=tmp_path / "run", **options).train()
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def take_over(run_dir: Path) -> None:
    """As a newer attempt would."""
    (run_dir / "attempts/000099").touch()


def test_a_run_that_was_replaced_ends_and_writes_nothing_more(run_dir: Path) -> None:
    def lose(run: Run) -> None:
        run._checkpointer.wait()
        if run.global_step == 3:
            take_over(run_dir)
            (run_dir / "status.json").write_text("{}")

    loop = SmallRun(run_dir=run_dir, policy=CheckpointPolicy(every_steps=1), at_batch=lose)
    with pytest.raises(RunInUseError, match="Attempt 99 has taken over"):
        loop.train()
    assert [one["progress"]["global_step"] for one in manifests_of(run_dir)] == [1, 2, 3]
    assert status_of(run_dir) == {}
    assert events_of(run_dir, "stopped") == []


def test_a_run_that_was_replaced_just_before_its_end_says_so_too(run_dir: Path) -> None:
    def lose(run: Run) -> None:
        take_over(run_dir)
        (run_dir / "status.json").write_text("{}")

    loop = SmallRun(run_dir=run_dir, policy=AT_THE_END, at_step=once_at(15, lose))
    with pytest.raises(RunInUseError, match="Attempt 99 has taken over"):
        loop.train()
    assert status_of(run_dir) == {}
    assert manifests_of(run_dir) == []


# What the run writes about itself


def test_run_jsonl_tells_the_life_of_a_run(run_dir: Path) -> None:
    policy = CheckpointPolicy(every_epochs=1, keep_last=1, keep_best=0)
    SmallRun(run_dir=run_dir, policy=policy, max_steps=7).train()
    SmallRun(run_dir=run_dir, policy=policy, at_batch=once_at(12, preempt)).train()
    events = events_of(run_dir)
    assert {one["event"] for one in events} == {"started", "resumed", "committed", "pruned", "stopped", "time"}
    assert all(isinstance(one["time"], float) for one in events)
    assert [one["attempt"] for one in events] == sorted(one["attempt"] for one in events)
    assert [(one["attempt"], one["reason"]) for one in events_of(run_dir, "stopped")] == [(1, "done"), (2, "preempted")]
    (resumed,) = events_of(run_dir, "resumed")
    assert (resumed["attempt"], resumed["global_step"]) == (2, 7)
    committed = [(one["attempt"], one["global_step"], one["reason"]) for one in events_of(run_dir, "committed")]
    assert committed == [(1, 5, "every_epochs"), (1, 7, "end"), (2, 10, "every_epochs"), (2, 13, "end")]
    pruned = [one["path"] for one in events_of(run_dir, "pruned")]
    assert pruned == [f"checkpoints/step-{step:08d}" for step in (5, 7, 10)]


@pytest.mark.parametrize(
    ("reason", "exit_code"),
    [(reason, {"diverged": 93, "interrupted": 130, "error": 1}.get(reason, 0)) for reason in StopReason],
)
def test_every_end_is_told_by_status_json(reason: StopReason, exit_code: int, run_dir: Path) -> None:
    run = SmallRun(run_dir=run_dir, at_batch=once_at(1, lambda run: run.stop(reason))).train()
    status = status_of(run_dir)
    assert (status["status"], status["exit_code"], run.exit_code) == (reason, exit_code, exit_code)
    assert (status["global_step"], status["attempt"], status["error"]) == (2, 1, "")


def test_while_a_run_trains_its_status_is_running(run_dir: Path) -> None:
    seen: list[Any] = []
    SmallRun(run_dir=run_dir, epochs=1, at_step=once_at(2, lambda run: seen.append(status_of(run_dir)))).train()
    assert (seen[0]["status"], seen[0]["exit_code"]) == ("running", None)


def test_metrics_jsonl_holds_nothing_that_a_clock_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallRun(run_dir=tmp_path / "one").train()
    clock = Clock()
    clock.now = 1e6
    monkeypatch.setattr(boundary, "time", clock)
    SmallRun(run_dir=tmp_path / "other", at_batch=lambda run: setattr(clock, "now", clock.now + 7)).train()
    one, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "other"))
    assert one == other
    keys = {key for line in one.splitlines() for key in json.loads(line)}
    assert not {key for key in keys if re.search("time|seconds|stall|date|clock", key)}


def test_the_training_loss_is_recorded_every_so_many_updates(run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, epochs=1, log_every_steps=2).train()
    records = [one for one in read_metrics(Store(run_dir)) if one["kind"] == "step"]
    assert [one["global_step"] for one in records] == [2, 4]
    assert records[0]["lr"] == 0.05


# Registered objects


class Average:
    """A moving average: a tensor and a count."""

    def __init__(self) -> None:
        self.value = torch.zeros(3, dtype=torch.bfloat16)
        self.count = 0

    def update(self, run: Run) -> None:
        self.value = self.value * 0.5 + run.global_step
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value, self.count = state_dict["value"], state_dict["count"]


@pytest.mark.parametrize("where", ["registered", "registered_inside"])
def test_a_registered_object_goes_on_where_it_was(where: str, run_dir: Path) -> None:
    first, second, twin = Average(), Average(), Average()
    SmallRun(run_dir=run_dir.parent / "twin", at_batch=twin.update).train()
    SmallRun(run_dir=run_dir, max_steps=7, at_batch=first.update, **{where: {"average": first}}).train()
    loop = SmallRun(run_dir=run_dir, at_batch=second.update, **{where: {"average": second}})
    loop.train()
    assert second.count == twin.count == 15
    assert same_bits(second.value, twin.value)


@pytest.mark.parametrize("where", ["registered", "registered_inside"])
def test_an_object_that_the_checkpoint_does_not_hold_is_named(where: str, run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, max_steps=2).train()
    with pytest.raises(StateMismatchError, match="holds nothing for the registered 'ema'"):
        SmallRun(run_dir=run_dir, **{where: {"ema": Average()}}).train()


def test_what_has_no_state_dict_cannot_be_registered(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.register\('numbers', ...\)"):
        SmallRun(run_dir=run_dir, registered={"numbers": [1, 2]}).train()
    assert not run_dir.exists()


def test_a_name_is_registered_once(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="its own name"):
        SmallRun(run_dir=run_dir, registered={"a": Average()}, registered_inside={"a": Average()}).train()


@pytest.mark.parametrize("steps", [None, 2])
def test_an_object_registered_after_the_loop_began_is_refused(steps: int | None, run_dir: Path) -> None:
    if steps:
        SmallRun(run_dir=run_dir, max_steps=steps, registered={"late": Average()}).train()
    late = once_at(3, lambda run: run.register("late", Average()))
    with pytest.raises((ConfigError, StateMismatchError), match="'late'"):
        SmallRun(run_dir=run_dir, at_step=late).train()


# What cannot be saved


class WithLambda(Average):
    def state_dict(self) -> dict[str, Any]:
        return {"schedule": {"decay": lambda step: 0.5}}


def test_a_registered_object_that_holds_a_lambda_fails_before_the_first_step(run_dir: Path) -> None:
    loop = SmallRun(run_dir=run_dir, registered={"ema": WithLambda()})
    with pytest.raises(UnsaveableStateError, match=r"user/ema/schedule/decay holds a builtins.function"):
        loop.train()
    assert loop.used == []


class WithSparseBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.inner(inputs)
        return outputs


class WithSparseParameter(WithSparseBuffer):
    def __init__(self) -> None:
        super().__init__()
        del self.graph
        self.graph = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)


@pytest.mark.parametrize("kind", [WithSparseBuffer, WithSparseParameter])
def test_a_sparse_tensor_fails_before_the_first_step_by_its_name(kind: type[nn.Module], run_dir: Path) -> None:
    loop = SmallRun(run_dir=run_dir, model=kind())
    with pytest.raises(UnsaveableStateError, match="model/graph"):
        loop.train()
    assert loop.used == []


# Mixed precision


def test_a_grad_scaler_goes_on_with_its_scale_and_growth_counter(run_dir: Path) -> None:
    def scaler(scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)

    first = scaler(2.0**10)
    first.load_state_dict({**first.state_dict(), "scale": 384.0, "_growth_tracker": 5})
    SmallRun(run_dir=run_dir, accelerator=StandIn(scaler=first), max_steps=2).train()
    second = scaler(2.0**10)
    SmallRun(run_dir=run_dir, accelerator=StandIn(scaler=second), max_steps=3).train()
    state = second.state_dict()
    assert (state["scale"], state["_growth_tracker"], state["growth_interval"]) == (384.0, 5, 7)


def test_an_update_that_amp_skipped_moves_the_position_and_not_the_step(run_dir: Path) -> None:
    stand_in = StandIn(skip=lambda update: update in (0, 3))
    loop = SmallRun(run_dir=run_dir, accelerator=stand_in, epochs=1)
    run = loop.train()
    assert [indices for _, indices in loop.used] == [indices for _, indices in reference_order(1)]
    assert run.global_step == 3
    assert loop.updates == [(0, 2), (0, 3), (0, 5)]
    assert loop.scheduler.last_epoch == 3
    progress = manifests_of(run_dir)[-1]["progress"]
    assert (progress["global_step"], progress["skipped_updates"], progress["epochs_completed"]) == (3, 2, 1)


def test_a_skipped_update_is_not_recorded_as_a_step_of_its_own(run_dir: Path) -> None:
    stand_in = StandIn(skip=lambda update: update in (0, 3))
    SmallRun(run_dir=run_dir, accelerator=stand_in, epochs=1).train()
    records = [one for one in read_metrics(Store(run_dir)) if one["kind"] == "step"]
    assert [one["global_step"] for one in records] == [1, 2, 3]


def test_a_run_with_skipped_updates_resumes_exactly(tmp_path: Path) -> None:
    skipped = (1, 6, 7)
    SmallRun(run_dir=tmp_path / "twin", accelerator=StandIn(skip=lambda update: update in skipped)).train()
    first = SmallRun(
        run_dir=tmp_path / "run",
        accelerator=StandIn(skip=lambda update: update in skipped),
        at_batch=once_at(5, preempt),
    )
    first.train()
    begun = len(first.used)
    assert begun == 7  # the seventh was skipped: the stop came with it, after five updates
    SmallRun(run_dir=tmp_path / "run", accelerator=StandIn(skip=lambda update: update + begun in skipped)).train()
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def reference_order(epochs: int, **sizes: Any) -> list[tuple[int, list[int]]]:
    """(epoch, indices) of each micro-batch, by the loader alone."""
    loader: Any = data_loader(Numbered(), global_batch_size=4, seed=3, **sizes)
    order = []
    for epoch in range(epochs):
        loader.batch_sampler.set_position(epoch=epoch)
        order += [(epoch, batch[2].tolist()) for batch in loader]
    return order


# Gradient accumulation


def accumulating(run_dir: Path, **options: Any) -> SmallRun:
    """Ten micro-batches of one sample an epoch, four to a window; a short window of two at the end."""
    return SmallRun(
        run_dir=run_dir,
        accelerator=Accelerator(cpu=True),
        model=smooth_model(),
        num_samples=10,
        global_batch_size=4,
        micro_batch_size=1,
        **options,
    )


def test_updates_come_after_4_8_and_10_of_10_batches_in_every_epoch(run_dir: Path) -> None:
    loop = accumulating(run_dir)
    loop.train()
    assert loop.updates == [(epoch, batch) for epoch in range(3) for batch in (4, 8, 10)]


@pytest.mark.parametrize("steps", range(1, 7))
def test_windows_stay_where_they_are_after_a_resume(steps: int, tmp_path: Path) -> None:
    accumulating(tmp_path / "twin").train()
    first = accumulating(tmp_path / "run", max_steps=steps)
    first.train()
    offset = 4 * (steps % 3)  # micro-batches of the epoch that the first attempt used
    second = accumulating(tmp_path / "run")
    second.train()
    seen = first.updates + [(epoch, batch + offset * (epoch == steps // 3)) for epoch, batch in second.updates]
    assert seen == [(epoch, batch) for epoch in range(3) for batch in (4, 8, 10)]
    assert_same_run(tmp_path / "twin", tmp_path / "run")


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_short_windows_have_the_gradient_of_their_mean(micro_batch_size: int, tmp_path: Path) -> None:
    """As one big batch a window, to the rounding of float32; uneven shares (3 and 1 of 4) included."""
    options: dict[str, Any] = {"num_samples": 10, "model": smooth_model(), "policy": AT_THE_END}
    SmallRun(run_dir=tmp_path / "big", **options).train()
    options["model"] = smooth_model()
    small = SmallRun(
        run_dir=tmp_path / "small", accelerator=Accelerator(cpu=True), micro_batch_size=micro_batch_size, **options
    )
    small.train()
    (_, big), (_, found) = read_checkpoint(tmp_path / "big"), read_checkpoint(tmp_path / "small")
    moments = [name for name in big if name.endswith("exp_avg")]
    assert len(moments) == 4
    for name in moments:
        torch.testing.assert_close(found[name], big[name], rtol=1e-4, atol=1e-6)


# Randomness


def test_random_numbers_drawn_at_the_top_of_an_epoch_do_not_spoil_the_resume(tmp_path: Path) -> None:
    def draw(run: Run) -> None:
        random.random(), np.random.rand(), torch.rand(2)

    SmallRun(run_dir=tmp_path / "twin", at_epoch=draw).train()
    for step in (5, 7, 10):
        SmallRun(run_dir=tmp_path / "run", at_epoch=draw, max_steps=step).train()
    SmallRun(run_dir=tmp_path / "run", at_epoch=draw).train()
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_random_numbers_drawn_before_the_first_epoch_do_not_spoil_the_resume(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "twin").train()
    SmallRun(run_dir=tmp_path / "run", max_steps=6).train()
    torch.rand(5)  # as a script that was changed would
    model = small_model()
    torch.rand(7)
    SmallRun(run_dir=tmp_path / "run", model=model).train()
    assert_same_run(tmp_path / "twin", tmp_path / "run")


def test_evaluation_leaves_modes_buffers_and_generators_as_they_were(run_dir: Path) -> None:
    seen: list[bool] = []

    def evaluate(run: Run) -> dict[str, float]:
        loop.prepared[2].eval()  # a layer that its owner has frozen stays frozen
        modes = [module.training for module in loop.prepared.modules()]
        buffers = [buffer.clone() for buffer in loop.prepared.buffers()]
        rng = capture_rng()
        with run.evaluation() as model:
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            value = float(model(torch.ones(4, 3)).sum())
        seen.append([module.training for module in loop.prepared.modules()] == modes)
        seen.extend(torch.equal(*pair) for pair in zip(buffers, loop.prepared.buffers(), strict=True))
        seen.append(capture_rng() == rng)
        assert torch.is_grad_enabled()
        return {"val": value}

    loop = SmallRun(run_dir=run_dir, epochs=1, metrics=evaluate)
    loop.train()
    assert seen == [True] * 5


def test_evaluation_puts_modes_back_when_it_fails(run_dir: Path) -> None:
    def evaluate(run: Run) -> dict[str, float]:
        with run.evaluation():
            raise RuntimeError("evaluation failed")

    loop = SmallRun(run_dir=run_dir, epochs=1, metrics=evaluate)
    with pytest.raises(RuntimeError, match="evaluation failed"):
        loop.train()
    assert all(module.training for module in loop.prepared.modules())


def test_evaluation_of_several_models_asks_for_a_name(run_dir: Path) -> None:
    with (
        Run(str(run_dir), model={"a": smooth_model(), "b": smooth_model()}) as run,
        pytest.raises(ConfigError, match="tell which model; the names are 'a', 'b'"),
    ):
        run.evaluation()


# Settings


def test_another_learning_rate_at_construction_wins_and_is_shown(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=run_dir, max_steps=7, lr=0.05).train()
    capsys.readouterr()
    loop = SmallRun(run_dir=run_dir, lr=0.01, max_steps=8)
    loop.train()
    assert loop.rates == [0.01 * 0.5 * 0.5], "the sixth update has passed: StepLR has halved it twice"
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Settings changed since the checkpoint:")
    assert ["optimizer[0].lr", "0.05", "0.01"] in [line.split() for line in lines[start:]]
    (resumed,) = events_of(run_dir, "resumed")
    assert resumed["changes"] == {"optimizer[0].lr": [0.05, 0.01], "optimizer[0].current_lr": [0.0125, 0.0025]}


def test_a_learning_rate_that_the_scheduler_decayed_is_restored(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=run_dir, max_steps=7).train()
    loop = SmallRun(run_dir=run_dir, max_steps=10)
    loop.train()
    assert loop.rates == [0.0125, 0.0125, 0.00625]
    assert "Settings changed" not in capsys.readouterr().out
    assert events_of(run_dir, "resumed")[0]["changes"] == {}


def test_a_different_environment_is_a_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=run_dir, max_steps=2).train()
    describe = run_module.describe_environment
    monkeypatch.setattr(
        run_module, "describe_environment", lambda *given: {**describe(*given), "threads": 99, "torch": "1.0"}
    )
    assert SmallRun(run_dir=run_dir, max_steps=3).train().global_step == 3
    errors = capsys.readouterr().err
    assert re.search(r"may not be bit for bit exact: threads was \d+ and is 99; torch was '.*' and is '1.0'", errors)
    (event,) = events_of(run_dir, "environment_changed")
    assert len(event["differences"]) == 2


def test_an_equal_environment_is_not_mentioned(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SmallRun(run_dir=run_dir, max_steps=2).train()
    SmallRun(run_dir=run_dir, max_steps=3).train()
    assert "bit for bit" not in capsys.readouterr().err
    assert events_of(run_dir, "environment_changed") == []


def test_what_makes_a_resume_inexact_is_said_at_the_start(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dist_train.differences.inexact_reasons", lambda device: ["the moon is full"])
    SmallRun(run_dir=run_dir, max_steps=1).train()
    assert "will not be bit for bit exact: the moon is full." in capsys.readouterr().err


def test_the_settings_of_a_run_stand_in_every_manifest(run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, max_steps=1).train()
    config = manifests_of(run_dir)[0]["settings"]["config"]
    assert config["policy"] == EACH_EPOCH.to_json()
    assert config["data"] == {
        "num_samples": 20,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "shuffle": True,
        "seed": 3,
        "drop_last": False,
    }


# Misuse


def test_a_batch_without_run_step_is_an_error(run_dir: Path) -> None:
    loader = data_loader(Numbered(), global_batch_size=4)
    with (
        pytest.raises(ConfigError, match=r"run.step\(\) was not called after the last batch"),
        Run(str(run_dir), model=smooth_model(), loader=loader) as run,
    ):
        for _ in run.epochs(1):
            for _ in run.batches(loader):
                pass


def test_accumulation_without_accumulate_is_an_error(run_dir: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = data_loader(Numbered(), global_batch_size=4, micro_batch_size=1)
    plain = smooth_model()
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    accelerator.sync_gradients = False
    with (
        pytest.raises(ConfigError, match=r"with accelerator.accumulate\(model\):"),
        Run(str(run_dir), model=model, optimizer=optimizer, accelerator=accelerator, loader=loader) as run,
    ):
        for _ in run.epochs(1):
            for _ in run.batches(loader):
                run.step()


def test_an_epoch_that_trains_nothing_is_an_error_and_not_an_endless_loop(run_dir: Path) -> None:
    loader = data_loader(Numbered(), global_batch_size=4)
    with (
        pytest.raises(ConfigError, match=r"Epoch 1 trained nothing: iterate `run.batches\(loader\)`"),
        Run(str(run_dir), model=smooth_model(), loader=loader) as run,
    ):
        for _ in run.epochs(1):
            pass


def test_an_accelerator_that_believes_in_another_world_is_an_error(run_dir: Path) -> None:
    accelerator = StandIn()
    accelerator.num_processes = 4
    with pytest.raises(ConfigError, match=r"1 processes were launched, but the Accelerator believes in 4"):
        SmallRun(run_dir=run_dir, accelerator=accelerator).train()
    assert not run_dir.exists()


def test_objects_that_do_not_fit_the_checkpoint_change_nothing(run_dir: Path) -> None:
    SmallRun(run_dir=run_dir, max_steps=2).train()
    before = manifests_of(run_dir)
    loop = SmallRun(run_dir=run_dir, model=smooth_model())
    untouched = [parameter.clone() for parameter in loop.model.parameters()]  # type: ignore[union-attr]
    with pytest.raises(StateMismatchError, match=r"does not fit the objects of this script: .* Nothing was changed"):
        loop.train()
    assert all(torch.equal(*pair) for pair in zip(untouched, loop.model.parameters(), strict=True))  # type: ignore[union-attr]
    assert manifests_of(run_dir) == before
    assert json.loads((run_dir / "attempts/owner.json").read_text())["released"] is True


# Loops without a loader of ours


def test_a_loop_of_its_own_counts_one_update_a_step(run_dir: Path) -> None:
    model = smooth_model()
    optimizer, scheduler = small_optimizer(model)

    def train(epochs: int) -> tuple[Run, list[int]]:
        steps = []
        with Run(str(run_dir), model=model, optimizer=optimizer, scheduler=scheduler, policy=EACH_EPOCH) as run:
            for _ in run.epochs(epochs):
                for _ in range(3):
                    squared_error(model, (torch.ones(2, 3), torch.ones(2), None)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    run.step(loss=0.5)
                    steps.append(run.global_step)
                run.end_epoch(val=1.0)
        return run, steps

    assert train(2)[1] == [1, 2, 3, 4, 5, 6]
    run, steps = train(3)
    assert steps == [7, 8, 9]
    assert (run.epochs_completed, run.resumed_from) == (3, str(run_dir / "checkpoints/step-00000006"))


def test_an_epoch_ends_with_the_loops_body_when_end_epoch_is_not_called(run_dir: Path) -> None:
    with Run(str(run_dir), model=smooth_model(), policy=EACH_EPOCH) as run:
        for _ in run.epochs(2):
            run.step()
    assert run.epochs_completed == 2
    assert [one["progress"]["epochs_completed"] for one in manifests_of(run_dir)] == [1, 2]


def test_batches_of_another_loader_are_moved_and_not_counted(run_dir: Path) -> None:
    batches = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
    loop = SmallRun(run_dir=run_dir, epochs=1, metrics=lambda run: {"val": float(len(list(run.batches(batches))))})
    run = loop.train()
    assert run.metrics == {"val": 2.0}
    assert run.global_step == UPDATES_PER_EPOCH


def test_an_evaluation_is_cut_short_when_the_run_is_told_to_leave(run_dir: Path) -> None:
    seen: list[int] = []

    def stop_and_look(run: Run) -> None:
        run._boundary.stop = StopReason.PREEMPTED
        run._intake.epoch_is_complete = False
        seen.extend(run.batches([1, 2, 3]))

    SmallRun(run_dir=run_dir, epochs=1, at_step=once_at(2, stop_and_look)).train()
    assert seen == []


def test_several_models_and_optimizers_are_saved_by_name(run_dir: Path) -> None:
    def objects() -> dict[str, Any]:
        models = {"generator": small_model(), "critic": smooth_model()}
        return {
            "model": models,
            "optimizer": {name: torch.optim.SGD(one.parameters(), lr=0.1) for name, one in models.items()},
        }

    with Run(str(run_dir), **objects()) as run:
        for _ in run.epochs(1):
            run.step()
    _, tensors = read_checkpoint(run_dir)
    assert {name.split("/")[1].split(".")[0] for name in tensors if name.startswith("model/")} >= {
        "generator",
        "critic",
    }
    changed = objects()
    nn.init.zeros_(changed["model"]["critic"][0].weight)
    with Run(str(run_dir), **changed):
        pass
    assert torch.equal(changed["model"]["critic"][0].weight, objects()["model"]["critic"][0].weight)


def test_a_run_asks_for_its_clock_only_on_the_main_rank(run_dir: Path) -> None:
    """Law 4's clocks: with a world of its own where this process is not the main rank, time never decides."""
    policy = CheckpointPolicy(every=1e-9)
    with Run(str(run_dir), model=smooth_model(), policy=policy) as run:
        assert run._boundary._time_is_up()
        run._boundary._world = SimpleNamespace(is_main=False)  # type: ignore[assignment]
        assert not run._boundary._time_is_up()
        run._boundary._world = run.world


def test_properties_of_a_fresh_run(run_dir: Path) -> None:
    with Run(str(run_dir), model=smooth_model(), policy=CheckpointPolicy(at_end=False)) as run:
        assert (run.global_step, run.epoch, run.epochs_completed, run.attempt) == (0, 0, 0, 1)
        assert (run.committed_step, run.best, run.metrics, run.should_stop) == (-1, None, {}, False)
        assert (run.loss_weight, run.device, run.resumed_from) == (1.0, torch.device("cpu"), None)


def test_properties_before_entry_are_those_of_a_fresh_run_and_touch_no_file(run_dir: Path) -> None:
    run = Run(str(run_dir), model=smooth_model())
    assert (run.global_step, run.epoch, run.epochs_completed, run.attempt) == (0, 0, 0, 0)
    assert (run.committed_step, run.best, run.metrics, run.should_stop) == (-1, None, {}, False)
    assert not run_dir.exists()


def test_leaving_by_sys_exit_0_is_a_good_end(run_dir: Path) -> None:
    model = smooth_model()
    with pytest.raises(SystemExit), Run(str(run_dir), model=model) as run:
        for _ in run.epochs(1):
            run.step()
            raise SystemExit(0)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["exit_code"], status["global_step"]) == ("done", 0, 1)
    assert run.committed_step == 1


def test_the_package_logger_is_left_with_one_handler(run_dir: Path) -> None:
    for steps in itertools.islice(itertools.count(1), 3):
        SmallRun(run_dir=run_dir, max_steps=steps).train()
    ours = [one for one in logging.getLogger("dist_train").handlers if getattr(one, "of_dist_train", False)]
    assert len(ours) == 1
