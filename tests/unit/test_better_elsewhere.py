"""The best of a run may lie in another directory, as after a session whose output is not attached: it is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dist_train.checkpoint.archive import pack
from dist_train.checkpoint.inference import load_model
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.cli import main
from dist_train.errors import StorageError
from tests.support.small_run import SmallRun, small_model

BEST = "The best model of this run (val 0.2857 at step 10) is not in"


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The metric is best after the second epoch, in the first directory."""
    folder = tmp_path_factory.mktemp("sessions")
    first, second = folder / "first/run", folder / "second/run"
    policy = CheckpointPolicy(every_epochs=1, monitor="val")
    SmallRun(run_dir=first, epochs=2, policy=policy).train()
    SmallRun(run_dir=second, epochs=5, policy=policy, search=(str(first),)).train()
    return first, second


def test_best_is_best_here_where_a_better_one_was_saved_elsewhere(
    sessions: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sessions
    for run, mark in ((first, "latest, best"), (second, "best here")):
        main(["ls", str(run)])
        (marked,) = (line for line in capsys.readouterr().out.splitlines() if "best" in line)
        assert marked.endswith(f"  {mark}")
    main(["show", str(second)])
    said = " ".join(capsys.readouterr().out.split())
    assert "best val 0.2857 at step 10, epoch 2 (lower is better); not in this directory" in said
    assert "best here step-00000015" in said


def test_whoever_loads_or_packs_the_best_is_told_that_it_is_not_here(
    sessions: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = sessions
    with caplog.at_level(logging.WARNING):
        load_model(str(first), "best", small_model())
        pack(str(first), str(tmp_path / "first.zip"), choice="best")
        load_model(str(second), "latest", small_model())
        assert not caplog.records
        load_model(str(second), "best", small_model())
        packed = pack(str(second), str(tmp_path / "second.zip"), choice="best")
    assert [record.message for record in caplog.records] == [
        f"{BEST} {second}; the best that is here, of step 15, has 0.4286."
    ] * 2
    assert [one.marks for one in packed.checkpoints] == [["best here"]]


def test_a_choice_of_one_has_no_mark_of_the_other(sessions: tuple[Path, Path], tmp_path: Path) -> None:
    """In the directory of an earlier session the latest is not the run's latest."""
    first, _ = sessions
    for choice, marks in (("best", ["best"]), ("latest", ["latest"]), ("both", ["best", "latest"])):
        packed = pack(str(first), str(tmp_path / f"{choice}.zip"), choice=choice)  # type: ignore[arg-type]
        assert [one.marks for one in packed.checkpoints] == [marks]


def test_a_zip_that_is_larger_than_the_room_for_it_is_not_written(
    sessions: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = str(sessions[0]), tmp_path / "run.zip"
    with pytest.raises(StorageError, match=r"takes .*, and 1\.0 kB are free for it\. Pack with --weights-only, or"):
        pack(run, str(target), max_bytes=1000)
    assert not list(tmp_path.iterdir())
    assert main(["pack", run, "--to", str(target), "--max-bytes", "10kB"]) == 1
    assert "was not written" in capsys.readouterr().err
    assert main(["pack", run, "--to", str(target), "--max-bytes", "10MB"]) == 0
    assert target.is_file()
