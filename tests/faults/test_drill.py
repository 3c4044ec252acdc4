"""`dist-train drill` passes what resumes exactly, and says of what does not why."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.background import Background
from tests.support.launch import ROOT, Outcome, environment, run_command

SCRIPTS = ROOT / "tests/drill_scripts"
EXAMPLES = ROOT / "examples"
DRILL_SECONDS = 300.0
LONG_DRILL_SECONDS = 900.0


def drill(folder: Path, *arguments: str, deadline_seconds: float = DRILL_SECONDS) -> Outcome:
    """In a working directory of its own, as a user would."""
    program = (
        f"import os, sys; os.chdir({str(folder)!r}); from dist_train.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    scratch = folder.parent / f"{folder.name}-scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", program, "drill", "--scratch", str(scratch), *arguments]
    outcome = run_command(command, deadline_seconds=deadline_seconds, extra=environment())
    assert list(scratch.iterdir()) == [], "the scratch is left behind"
    return outcome


def facts(outcome: Outcome) -> dict[str, Any]:
    """With --json: what comes after the lines of progress, which go to stderr."""
    return dict(json.loads(outcome.output[outcome.output.index("\n{\n") :]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    return place


def test_a_sound_script_passes_and_its_directory_is_untouched(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "mine.txt").write_text("not of the drill")
    outcome = drill(folder, "--steps", "24", "--kills", "2", "--json", "--", str(SCRIPTS / "sound.py"))
    assert outcome.require_success()
    found = facts(outcome)
    assert (found["verdict"], found["steps"], found["differences"], found["faults_missed"]) == ("pass", 24, [], [])
    assert len(found["faults"]) == 2
    assert found["lives"] >= 2
    assert any(fault["restart_seconds"] and fault["resumed_at"] for fault in found["faults"])
    assert found["tensors_compared"] >= 12
    assert len(found["save_stall_seconds"]) >= 12
    assert found["run_directories"] == [str(folder / "runs" / "sound")]
    assert (found["run_directories_touched"], found["files_changed"]) == ([], [])
    assert [path.name for path in (folder / "runs").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("script", "cause", "words"),
    [
        ("unseeded_augmentation.py", "augmentation", "use the same samples, but other bytes of them at step 1"),
        ("outside_state.py", "state outside the checkpoint", "before it: running_mean was"),
        pytest.param(
            "plain_shuffle.py",
            "data order",
            "a DataLoader with a RandomSampler that the Run was not given",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_broken_script_fails_with_what_is_wrong_with_it(folder: Path, script: str, cause: str, words: str) -> None:
    outcome = drill(folder, "--steps", "20", "--kills", "1", "--", str(SCRIPTS / script))
    assert outcome.returncode == 1, outcome.output
    said = " ".join(outcome.output.split())
    assert f"Cause: {cause} " in said
    assert words in said
    assert "What to do:" in said
    assert "untouched." in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import dist_train\nraise ValueError('of the script')", "ended with exit code 1: Traceback"),
        ("import dist_train.errors\nprint('nothing')", "it never entered a Run There is nothing to resume."),
    ],
)
def test_what_cannot_be_drilled_is_told_why(folder: Path, text: str, words: str) -> None:
    (folder / "train.py").write_text(text)
    outcome = drill(folder, "--", "train.py")
    assert outcome.returncode == 2
    assert words in " ".join(outcome.output.split())


def test_a_script_that_writes_into_its_run_directory_is_run_once_and_told(folder: Path) -> None:
    text = (SCRIPTS / "sound.py").read_text().replace(
        "        for _ in run.epochs(args.epochs):",
        "        open('runs/sound/mine.log', 'a').write('begun')\n        for _ in run.epochs(args.epochs):",
    )  # fmt: skip
    (folder / "train.py").write_text(text)
    (folder / "runs" / "sound").mkdir(parents=True)
    outcome = drill(folder, "--steps", "4", "--kills", "1", "--", "train.py")
    assert outcome.returncode == 2
    said = " ".join(outcome.output.split())
    assert "CANNOT BE DRILLED SAFELY train.py" in said
    assert f"past the Run: mine.log in {folder}/runs/sound. " in said
    assert "PASS" not in said
    assert (folder / "runs" / "sound" / "mine.log").read_text() == "begun"


def test_a_script_that_makes_no_step_is_not_waited_for_without_end(folder: Path) -> None:
    (folder / "train.py").write_text("import dist_train.errors, time\ntime.sleep(600)")
    outcome = drill(folder, "--patience", "2", "--", "train.py")
    assert outcome.returncode == 2
    assert "made no step for 2 s" in outcome.output


def test_a_terminated_drill_leaves_neither_processes_nor_scratch(folder: Path) -> None:
    program = "import dist_train.errors, os, time\nprint(f'pid {os.getpid()} ', flush=True)\ntime.sleep(600)"
    (folder / "train.py").write_text(program)
    scratch = folder / "scratch"
    command = [sys.executable, "-m", "dist_train.cli", "drill", "--scratch", str(scratch), "--"]

    def pids() -> list[int]:
        said = [path.read_text() for path in scratch.glob("*/plain/output.log")]
        return [int(one) for text in said for one in re.findall(r"pid (\d+) ", text)]

    with Background([*command, str(folder / "train.py")], folder / "log") as drill_:
        drill_.wait_until(lambda: bool(pids()), "the script's start")
        (pid,) = pids()
        drill_.send(signal.SIGTERM)
        assert drill_.wait(60.0).returncode == 128 + signal.SIGTERM
    assert not psutil.pid_exists(pid)
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_a_script_that_cannot_start_again_fails_with_its_own_error(folder: Path) -> None:
    text = (SCRIPTS / "sound.py").read_text().replace(
        "        for _ in run.epochs(args.epochs):",
        "        assert run.resumed_from is None, 'fresh starts only'\n        for _ in run.epochs(args.epochs):",
    )  # fmt: skip
    (folder / "train.py").write_text(text)
    outcome = drill(folder, "--steps", "20", "--kills", "1", "--", "train.py")
    assert outcome.returncode == 1
    assert "train.py does not come through." in outcome.output
    assert "Life 2 ended with exit code 1, though no fault had come in it:" in outcome.output
    assert "AssertionError: fresh starts only" in outcome.output


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sound_script_passes_on_two_ranks(folder: Path) -> None:
    arguments = ["--steps", "24", "--kills", "6", "--nproc-per-node", "2", "--json", "--", str(SCRIPTS / "sound.py")]
    outcome = drill(folder, *arguments, deadline_seconds=LONG_DRILL_SECONDS).require_success()
    assert {fault["kind"] for fault in facts(outcome)["faults"]} >= {"kill", "terminate", "stop", "corrupt_newest"}


LANGUAGE_MODEL = (
    "language_model/train.py --cpu --steps 12 --epochs 2 --corpus-mb 0.3 --block 32 --global-batch-size 8 "
    "--micro-batch-size 4 --eval-windows 8"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "minimal.py",
        "plain_loop.py",
        "own_loop.py --cpu",
        "gan.py --cpu",
        "migration/own_loop.py",
        "migration/trainer.py",
        "price_prediction/train.py --cpu --samples 600 --accumulation 4",
        LANGUAGE_MODEL,
    ],
)
def test_every_example_passes(folder: Path, command: str) -> None:
    script, *arguments = command.split()
    outcome = drill(
        folder, "--steps", "40", "--", str(EXAMPLES / script), *arguments, deadline_seconds=LONG_DRILL_SECONDS
    )
    assert outcome.returncode == 0, outcome.output
    assert "PASS" in outcome.output
