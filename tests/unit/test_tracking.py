"""Trackers as views of the history: what each kind of them is given over resumes, branches, failures and moves."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.manifest import Progress
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics, rows_by_step
from dist_train.options import RunOptions
from dist_train.run import Run
from dist_train.tracking import Line, WandbView, complete_step
from dist_train.wandb_file import last_step, steps_of
from tests.support.launch import ROOT
from tests.support.small_run import SmallRun, StandIn, smooth_model

POLICY = CheckpointPolicy(every_steps=2, every_epochs=1, keep_last=20)


class Recorder:
    """A tracker that writes down what it is told, and may fail."""

    def __init__(self, name: str = "recorder", *, fails_at: int | None = None, fails_to_start: bool = False) -> None:
        self.name = name
        self.projects: list[str] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self._fails_at = fails_at
        self._fails_to_start = fails_to_start

    def start(self, name: str, init_kwargs: Mapping[str, Any]) -> None:
        if self._fails_to_start:
            raise ConnectionError("no network\nhere")
        self.projects.append(name)

    def log(self, row: dict[str, float], step: int) -> None:
        if step == self._fails_at:
            raise ConnectionError("no network\nhere")
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished += 1


def train(run_dir: Path, *trackers: Any, **settings: Any) -> Run:
    accelerator = StandIn()
    accelerator.log_with = list(trackers)
    return SmallRun(run_dir=run_dir, accelerator=accelerator, **{"policy": POLICY, **settings}).train()


def history(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    return list(rows_by_step(read_metrics(Store(run_dir))).items())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "ultra"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs: a run lets nothing through to the root logger."""
    package = logging.getLogger("dist_train")
    kept, package.propagate = package.propagate, False
    package.addHandler(caplog.handler)
    yield caplog
    package.removeHandler(caplog.handler)
    package.propagate = kept


def test_a_tracker_holds_the_whole_history_at_the_end_and_is_finished(run_dir: Path) -> None:
    recorder = Recorder()
    train(run_dir, recorder)
    assert recorder.rows == history(run_dir)
    assert [step for step, _ in recorder.rows] == list(range(1, 16))
    assert sorted(recorder.rows[4][1]) == ["loss", "lr", "train_loss", "val"]
    assert (recorder.projects, recorder.finished) == (["ultra"], 1)


def test_a_row_waits_for_its_checkpoint(run_dir: Path) -> None:
    recorder = Recorder()
    seen: list[tuple[int, int]] = []

    def note(run: Run) -> None:
        if run.global_step == 3:
            run.save(wait=True)
        seen.append((run.global_step, len(recorder.rows)))

    train(run_dir, recorder, epochs=1, policy=CheckpointPolicy(), at_step=note)
    # The row of the step that was saved may yet be added to.
    assert seen == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    assert recorder.rows == history(run_dir)


@pytest.mark.parametrize("stop", [3, 4, 5, 8, 15])
def test_a_resume_gives_the_rest(run_dir: Path, stop: int) -> None:
    first, second = Recorder(), Recorder()
    train(run_dir, first, max_steps=stop)
    train(run_dir, second)
    assert first.rows + second.rows == history(run_dir)
    assert second.projects == ["ultra"]


def test_what_was_given_before_a_kill_is_not_given_again(run_dir: Path, tmp_path: Path) -> None:
    """The copy of the run directory is what a kill at that moment leaves behind."""
    recorder = Recorder()
    killed = tmp_path / "killed" / "ultra"
    before: list[Any] = []

    def kill(run: Run) -> None:
        if run.global_step == 8:
            run.save(wait=True)
            before.extend(recorder.rows)
            shutil.copytree(run_dir, killed, symlinks=True)

    train(run_dir, recorder, at_step=kill)
    after = Recorder()
    train(killed, after)
    assert [step for step, _ in before] == list(range(1, 8))
    assert before + after.rows == history(killed) == history(run_dir)


def test_a_branch_begins_another_tracker_run_with_the_whole_history(run_dir: Path) -> None:
    first, branch, later = Recorder(), Recorder(), Recorder()
    train(run_dir, first)
    train(run_dir, branch, resume="epoch:1", lr=0.01, max_steps=8)
    train(run_dir, later, resume="epoch:1", lr=0.01)
    assert [one.projects for one in (first, branch, later)] == [["ultra"], ["ultra-2"], ["ultra-2"]]
    assert branch.rows + later.rows == history(run_dir)
    assert first.rows[:5] == branch.rows[:5]
    assert first.rows[5:8] != branch.rows[5:8]


def test_a_resume_from_before_what_was_given_begins_another_tracker_run(run_dir: Path) -> None:
    """The newest checkpoints are damaged: an older one is used, whose rows would come again."""
    first, second = Recorder(), Recorder()
    train(run_dir, first, max_steps=8)
    for step in (6, 8):
        (run_dir / f"checkpoints/step-{step:08d}/model-00001-of-00001.safetensors").write_bytes(b"no")
    train(run_dir, second)
    assert second.projects == ["ultra-2"]
    assert second.rows == history(run_dir)


def test_a_tracker_that_fails_is_named_and_made_up_for_at_the_next_start(
    run_dir: Path, said: pytest.LogCaptureFixture
) -> None:
    failing, good, later = Recorder("failing", fails_at=4), Recorder("good"), Recorder("failing")
    train(run_dir, failing, good, max_steps=8)
    (message,) = [record.getMessage() for record in said.records if "tracker" in record.getMessage()]
    assert message.startswith("The tracker failing failed and is left alone from here on: ConnectionError: no network")
    train(run_dir, later, Recorder("good"))
    given = dict(failing.rows) | dict(later.rows)
    assert list(given.items()) == history(run_dir)


def test_a_tracker_that_does_not_start_leaves_training_and_the_others_alone(run_dir: Path) -> None:
    good = Recorder("good")
    run = train(run_dir, Recorder("bad", fails_to_start=True), good)
    assert run.exit_code == 0
    assert good.rows == history(run_dir)


def test_a_tracker_that_comes_later_is_given_the_whole_history(run_dir: Path) -> None:
    train(run_dir, max_steps=8)
    late = Recorder()
    train(run_dir, late)
    assert late.rows == history(run_dir)


def test_a_tracker_that_the_script_started_is_told_and_left_open(run_dir: Path, said: pytest.LogCaptureFixture) -> None:
    started = Recorder()
    accelerator = StandIn()
    accelerator.trackers = [started]
    SmallRun(run_dir=run_dir, accelerator=accelerator, policy=POLICY, epochs=1).train()
    assert "init_trackers() was called before the run was entered" in said.text
    assert [step for step, _ in started.rows] == [1, 2, 3, 4, 5, 5]
    assert (started.finished, accelerator.trackers) == (0, [started])


def test_an_error_in_the_loop_finishes_the_trackers(run_dir: Path) -> None:
    recorder = Recorder()

    def fail(run: Run) -> None:
        if run.global_step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(run_dir, recorder, at_step=fail)
    assert recorder.finished == 1
    assert [step for step, _ in recorder.rows] == [1]


def test_a_missing_loss_is_not_given(run_dir: Path) -> None:
    recorder, accelerator = Recorder(), StandIn()
    accelerator.log_with = [recorder]
    with Run(str(run_dir), model=smooth_model(), accelerator=accelerator, options=RunOptions(log_every_steps=1)) as run:
        for _ in run.epochs(1):
            run.step()
    assert recorder.rows == []


def test_how_far_trackers_are_stands_in_the_run_directory(run_dir: Path) -> None:
    train(run_dir, Recorder())
    written = json.loads((run_dir / "tracking.json").read_text())
    assert written == {"line": 1, "branch": 0, "given": {"recorder": 15}}
    document = (ROOT / "docs/checkpoint-format.md").read_text()
    assert all(f"`{key}`" in document for key in ("tracking.json", *written))


@pytest.mark.parametrize(
    ("evaluation", "at_end", "complete"),
    [("none", False, 4), ("pending", False, 4), ("done", False, 5), ("none", True, 5), ("pending", True, 4)],
)
def test_a_step_is_complete_once_nothing_can_be_added(evaluation: Any, at_end: bool, complete: int) -> None:
    assert complete_step(Progress(global_step=5, evaluation=evaluation), at_end=at_end) == complete


# TensorBoard, with its real files


class TensorBoard(StandIn):
    """As Accelerate's `log_with="tensorboard"`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)
        self.log_with = [self]
        self.value = "tensorboard"

    def init_trackers(self, name: str, init_kwargs: Mapping[str, Any]) -> None:
        tracking = pytest.importorskip("accelerate.tracking")
        tracker = tracking.TensorBoardTracker(name, self.logging_dir, **init_kwargs["tensorboard"])
        tracker.start()
        self.trackers.append(tracker)


def shown(folder: Path) -> dict[str, list[int]]:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = accumulators.EventAccumulator(str(folder))
    loaded.Reload()
    return {tag: [event.step for event in loaded.Scalars(tag)] for tag in loaded.Tags()["scalars"]}


EACH = {"loss": list(range(1, 16)), "lr": list(range(1, 16)), "train_loss": [5, 10, 15], "val": [5, 10, 15]}


def test_tensorboard_shows_each_step_once_after_a_moved_or_lost_folder(run_dir: Path, tmp_path: Path) -> None:
    SmallRun(run_dir=run_dir, accelerator=TensorBoard(tmp_path / "a"), policy=POLICY, max_steps=8).train()
    shutil.copytree(run_dir, tmp_path / "twin" / "ultra", symlinks=True)
    SmallRun(run_dir=run_dir, accelerator=TensorBoard(tmp_path / "a"), policy=POLICY).train()
    SmallRun(run_dir=tmp_path / "twin" / "ultra", accelerator=TensorBoard(tmp_path / "b"), policy=POLICY).train()
    assert shown(tmp_path / "a" / "ultra") == EACH
    assert shown(tmp_path / "b" / "ultra") == EACH


def test_tensorboard_keeps_what_a_branch_left_behind_beside_it(run_dir: Path, tmp_path: Path) -> None:
    SmallRun(run_dir=run_dir, accelerator=TensorBoard(tmp_path / "a"), policy=POLICY).train()
    SmallRun(run_dir=run_dir, accelerator=TensorBoard(tmp_path / "a"), policy=POLICY, resume="step:6").train()
    assert shown(tmp_path / "a" / "ultra") == EACH
    assert shown(tmp_path / "a" / "ultra-2") == EACH


# wandb's files


def test_a_wandb_file_ends_where_a_kill_tore_it(tmp_path: Path) -> None:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    folder = tmp_path / "offline-run-20260101_000000-abc"
    folder.mkdir()
    file = folder / "run-abc.wandb"
    data = b":W&B\xe1\xbe\x00"
    for step in range(2000):
        record = pb.Record()
        for key, value in (("_step", step), ("loss", 0.25)):
            item = record.history.item.add()
            item.key, item.value_json = key, json.dumps(value)
        data += log_record(record.SerializeToString(), len(data))
    file.write_bytes(data)
    assert steps_of(str(file)) == list(range(2000))
    for cut in (1, 10, 40_000):
        file.write_bytes(data[:-cut])
        steps = steps_of(str(file))
        assert steps == list(range(len(steps)))
        assert len(steps) < 2000
    assert last_step([str(tmp_path), str(tmp_path / "nowhere")], "abc") == steps[-1]
    assert last_step([str(tmp_path)], "ab") == -1
    file.write_bytes(data[:7])
    assert last_step([str(tmp_path)], "abc") == -1


def log_record(data: bytes, position: int, block: int = 32768) -> bytes:
    """One record in LevelDB's log format, cut at the ends of blocks."""
    written = b""
    first = True
    while True:
        left = block - (position + len(written)) % block
        if left < 7:
            written += b"\0" * left
            continue
        part, data = data[: left - 7], data[left - 7 :]
        kind = (1 if not data else 2) if first else (4 if not data else 3)
        written += b"\0\0\0\0" + len(part).to_bytes(2, "little") + bytes([kind]) + part
        if not data:
            return written
        first = False


# A session that goes on from another's read-only output


def test_the_next_session_goes_on_where_the_last_ones_trackers_stand(run_dir: Path, tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    train(run_dir, first, max_steps=8)
    train(tmp_path / "next" / "ultra", second, search=(str(run_dir),))
    assert first.rows + second.rows == history(tmp_path / "next" / "ultra")
    assert second.projects == ["ultra"]


def test_what_wandb_wrote_down_in_the_last_session_is_not_given_again(tmp_path: Path) -> None:
    line = Line(
        number=1, run_id="abc", run_name="ultra", folder="", places=[str(tmp_path / "new"), str(tmp_path)], config={}
    )
    file = tmp_path / "wandb" / "offline-run-20260101_000000-abc" / "run-abc.wandb"
    file.parent.mkdir(parents=True)
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    record = pb.Record()
    item = record.history.item.add()
    item.key, item.value_json = "_step", "8"
    file.write_bytes(b":W&B\xe1\xbe\x00" + log_record(record.SerializeToString(), 7))
    assert WandbView(StandIn(), "wandb", line).find_given(-1) == 8
    file.write_bytes(b":W&B\xe1\xbe\x00" + log_record(b"\xff\xff\xff", 7))
    assert WandbView(StandIn(), "wandb", line).find_given(5) == 5
