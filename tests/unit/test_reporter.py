"""What the main rank tells people, word for word, from made-up manifests."""

from __future__ import annotations

import errno
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.manifest import Best, FileEntry, Manifest, Progress
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.writer import Committed, Pruned, SaveFailed
from dist_train.differences import Differences
from dist_train.errors import RunInUseError
from dist_train.reporter import Reporter
from tests.support.manifests import manifest

BEST = Best(monitor="val_smape", mode="min", value=41.82, global_step=520, epochs_completed=13)
EPOCH_13 = Progress(global_step=520, epoch=13, epochs_completed=13, evaluation="done")
PATH = "checkpoints/step-00000520"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    package = logging.getLogger("dist_train")
    kept, package.propagate = package.propagate, True
    with caplog.at_level(logging.INFO, "dist_train"):
        yield
    package.propagate = kept


def reporter(tmp_path: Path, *, is_main: bool = True, store: Store | None = None) -> Reporter:
    one = Reporter(store or Store(tmp_path), is_main=is_main, run_dir="runs/ultra")
    one.epochs = 20
    one.events.attempt = 4
    return one


def saved(progress: Progress = EPOCH_13, **fields: Any) -> Committed:
    files = {"model.safetensors": FileEntry(size=48_000_000, digest=""), "o": FileEntry(size=200_000, digest="")}
    given: dict[str, Any] = {"files": files, "best": BEST, "metrics": {"val_smape": 41.82}, "reason": "every_epochs"}
    return Committed(path=PATH, manifest=replace(manifest(9), progress=progress, **{**given, **fields}), seconds=0.5)


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]


def test_a_resume_says_from_where_and_how_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress, best = Progress(global_step=480, epochs_completed=12, epoch=12), replace(BEST, value=42.15)
    reporter(tmp_path).where_from("runs/ultra/checkpoints/step-00000480", progress, best)
    assert capsys.readouterr().out == (
        "Resuming from runs/ultra/checkpoints/step-00000480 (epoch 12 of 20 done, best val_smape 42.15)\n"
    )


def test_a_resume_without_a_best_says_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter(tmp_path).where_from("there", Progress(epochs_completed=1), None)
    assert capsys.readouterr().out == "Resuming from there (epoch 1 of 20 done)\n"


def test_a_complete_run_says_that_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter(tmp_path).where_from("there", Progress(epochs_completed=20), None)
    assert capsys.readouterr().out.endswith("Nothing is left to do; give more epochs to go on.\n")


def test_an_epoch_is_one_line_with_loss_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = reporter(tmp_path)
    one.epoch(13, 0.34209, {"val_smape": 41.8203})
    one.epoch(14, None, {})
    assert capsys.readouterr().out == "Epoch 13/20 - Train Loss: 0.3421 - Val SMAPE: 41.82%\nEpoch 14/20\n"


def test_a_commit_tells_epoch_step_bytes_and_stall_and_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = reporter(tmp_path)
    one.note_stall(520, 0.003)
    one.report([saved()])
    assert capsys.readouterr().out == (
        "Checkpoint saved: epoch 13 (step 520, 48.2 MB, stall 3 ms)\nBest model so far: Val SMAPE 41.82%\n"
    )
    (event,) = events(tmp_path)
    assert event.pop("time") > 0
    assert event == {
        "attempt": 4,
        "event": "committed",
        "path": PATH,
        "global_step": 520,
        "bytes": 48_200_000,
        "reason": "every_epochs",
        "stall_seconds": 0.003,
        "seconds": 0.5,
    }


def test_a_commit_in_mid_epoch_says_in_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(global_step=530, epoch=13, epochs_completed=13, samples_into_epoch=80)
    reporter(tmp_path).report([saved(progress, metrics={})])
    assert capsys.readouterr().out == "Checkpoint saved: in epoch 14 (step 530, 48.2 MB, stall 0 ms)\n"


def test_an_older_best_is_not_announced_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = replace(EPOCH_13, epochs_completed=14, epoch=14)
    reporter(tmp_path).report([saved(progress, metrics={"val_smape": 50.0})])
    assert "Best model" not in capsys.readouterr().out


def test_each_stall_belongs_to_its_own_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = reporter(tmp_path)
    one.note_stall(520, 0.003)
    one.report([saved()])
    one.report([saved()])
    assert ["stall 3 ms" in line for line in capsys.readouterr().out.splitlines()[::2]] == [True, False]


def test_pruned_checkpoints_are_events_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter(tmp_path).report([Pruned(path="checkpoints/step-00000400")])
    assert capsys.readouterr().out == ""
    assert [(one["event"], one["path"]) for one in events(tmp_path)] == [("pruned", "checkpoints/step-00000400")]


def test_a_failed_save_says_what_why_where_and_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failure = SaveFailed(global_step=520, message="the disk is broken")
    reporter(tmp_path).report([failure], failures=2, most_failures=5, newest=480)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == (
        "The checkpoint of step 520 was not saved in runs/ultra: the disk is broken. Training goes on and tries again "
        "(failure 2 of at most 5 in a row); older checkpoints are whole, the newest is step 480."
    )
    (event,) = events(tmp_path)
    assert (event["event"], event["global_step"], event["message"]) == ("failed", 520, "the disk is broken")


def test_a_save_that_failed_for_want_of_space_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter(tmp_path).report([SaveFailed(global_step=5, message="quota", out_of_space=True)], newest=-1)
    assert "no space: quota" in caplog.text
    assert "there is none yet." in caplog.text


def test_a_directory_that_was_lost_is_an_event_and_left_to_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter(tmp_path).report([SaveFailed(global_step=5, message="lost", fatal=RunInUseError("lost"))])
    assert caplog.records == []
    assert events(tmp_path)[0]["event"] == "failed"


def test_changed_settings_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    betas = ({"$": "tuple", "items": [0.9, 0.99]}, {"$": "tuple", "items": [0.8, 0.99]})
    rates = {f"optimizer[{group}].lr": (0.001, 0.01) for group in (0, 1)}
    changes = {**rates, "optimizer[1].betas": betas, "scheduler.milestones": (list(range(40)), None)}
    told = Differences(changes, ["The scheduler is new."])
    reporter(tmp_path).resumed("there", manifest(3, step=480), told)
    milestones = str(list(range(40)))[:57] + "..."
    assert capsys.readouterr().out.splitlines() == [
        "Settings changed since the checkpoint:",
        "  setting               was" + " " * 59 + "now",
        "  optimizer[0, 1].lr    0.001" + " " * 57 + "0.01",
        "  optimizer[1].betas    [0.9, 0.99]" + " " * 51 + "[0.8, 0.99]",
        f"  scheduler.milestones  {milestones}  none",
        "The scheduler is new.",
    ]
    (event,) = events(tmp_path)
    assert (event["event"], event["path"], event["global_step"]) == ("resumed", "there", 480)
    assert event["changes"]["optimizer[0].lr"] == [0.001, 0.01]
    assert event["changes"]["optimizer[1].betas"] == [[0.9, 0.99], [0.8, 0.99]]
    assert event["notes"] == ["The scheduler is new."]


def test_without_changed_settings_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter(tmp_path).resumed("there", manifest(3), Differences())
    assert capsys.readouterr().out == ""


def test_checkpoints_that_cannot_be_used_are_warnings_and_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter(tmp_path).problems(["step 5 is torn.", "step 7 is corrupt."])
    assert [record.getMessage() for record in caplog.records] == ["step 5 is torn.", "step 7 is corrupt."]
    assert [one["problem"] for one in events(tmp_path)] == ["step 5 is torn.", "step 7 is corrupt."]


def test_status_json_is_the_newest_status(tmp_path: Path) -> None:
    one = reporter(tmp_path)
    one.status("running", None, Progress(), 4)
    one.status("error", 1, EPOCH_13, 4, "OSError: no")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": "error",
        "exit_code": 1,
        "global_step": 520,
        "epochs_completed": 13,
        "attempt": 4,
        "error": "OSError: no",
    }


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(operation: Operation) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    reporter(tmp_path, store=Store(tmp_path, observer=full)).status("done", 0, EPOCH_13, 4)
    assert "status.json was not written" in caplog.text
    assert not (tmp_path / "status.json").exists()


def test_other_ranks_say_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    one = reporter(tmp_path, is_main=False)
    found: Manifest = manifest(3)
    one.resumed("there", found, Differences({"a": (1, 2)}))
    one.problems(["a problem"])
    one.where_from("there", EPOCH_13, BEST)
    one.step(0, 1, 0.5)
    one.epoch(1, 0.5, {"val": 1.0})
    one.status("running", None, EPOCH_13, 1)
    one.report([Pruned(path="x")])
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "step", "says"),
    [
        ({"train_loss": math.nan, "val": math.inf}, -1, "train_loss, val are not finite at step 4. .* yet. Look at"),
        ({"loss": math.nan, "lr": 0.1}, 3, "loss is not finite at step 4. .* newest checkpoint is step 3. Keep a good"),
    ],
)
def test_what_is_not_finite_is_told_with_the_newest_checkpoint_or_that_there_is_none(
    values: dict[str, Any], step: int, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter(tmp_path).warn_of_not_finite(values, 4, step)
    assert re.search(says, caplog.text)
    assert ("there is no checkpoint yet" in caplog.text) == (step < 0)
