"""What people are told of a `resume=` that names no checkpoint, and how a branch is started once more."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.resume import ResumeRequest, Selector, not_found_message, relabelled
from dist_train.errors import ConfigError, NoCheckpointError
from tests.support.manifests import found
from tests.support.small_run import SmallRun

KEEP_ALL = CheckpointPolicy(every_epochs=1, keep_last=10)


@pytest.fixture(scope="module")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, then a branch from the first that has not gone further: steps 10 and 15 are in abandoned/."""
    run_dir = tmp_path_factory.mktemp("branched") / "run"
    SmallRun(run_dir=run_dir, policy=KEEP_ALL).train()
    SmallRun(run_dir=run_dir, policy=KEEP_ALL, resume="epoch:1", epochs=1).train()
    return run_dir


def refused(run_dir: Path, resume: str) -> str:
    with pytest.raises(NoCheckpointError) as caught:
        SmallRun(run_dir=run_dir, policy=KEEP_ALL, resume=resume).train()
    return str(caught.value)


@pytest.mark.parametrize(("resume", "step"), [("epoch:3", 15), ("step:10", 10), ("epoch:2#b", 10)])
def test_a_name_that_a_branch_left_behind_is_told_by_its_path(
    resume: str, step: int, branched: Path, tmp_path: Path
) -> None:
    said = refused(branched, resume)
    path = f"{branched}/checkpoints/abandoned/a000002/step-{step:08d}"
    assert f"A branch has left it behind as {path}: give that path." in said
    assert f"holds 1 more that a branch left behind: `dist-train ls {branched} --all` lists them." in said
    assert "policy" not in said
    assert SmallRun(run_dir=tmp_path, resume=path, epochs=3).train().resumed_from == path


def test_an_epoch_that_was_never_trained_is_no_matter_of_the_policy(branched: Path) -> None:
    said = refused(branched, "epoch:99")
    assert "it holds those after epoch 1. It has not been trained beyond the end of epoch 1." in said
    assert f"holds 2 checkpoints that a branch left behind: `dist-train ls {branched} --all` lists them." in said
    assert "policy" not in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epoch:2", "The policy decides which epochs stay"),
        ("epoch:7", "It has not been trained beyond the end of epoch 3."),
        ("step:40", "It has not been trained beyond step 30."),
        ("step:20", "those of step 10, 30."),
    ],
)
def test_what_is_missing_is_told_by_its_reason(text: str, says: str) -> None:
    those = [found(1, step=10, epochs=1), found(2, step=30, epochs=3)]
    said = not_found_message(text, Selector.parse(text), "runs/x", those)
    assert says in said
    assert ("policy" in said) == (text == "epoch:2")


@pytest.mark.parametrize("below", ["checkpoints/abandoned/a000002", "checkpoints", "."])
def test_a_folder_of_checkpoints_is_told_by_what_it_holds(below: str, branched: Path) -> None:
    folder = (branched / below).resolve()
    held = folder if below != "." else folder / "checkpoints"
    said = refused(branched.parent / "other", f"{branched}/{below}")
    holds = {"checkpoints/abandoned/a000002": "2 of them, from step-00000010 to step-00000015"}
    assert f"{held} is no checkpoint, but holds {holds.get(below, 'step-00000005')}. Give the path of one" in said


def test_a_path_of_nothing_was_not_a_checkpoint_that_was_never_committed(branched: Path) -> None:
    said = refused(branched, "checkpoints/step-0000005")
    assert "there is no such folder (" in said
    assert f"`dist-train ls {branched} --all` lists" in said
    assert "committed" not in said
    assert "that is a file, expected the folder of a checkpoint" in refused(branched, f"{branched}/run.json")


# Once more


def test_a_finished_branch_says_how_it_is_started_once_more(branched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(resume: str) -> str:
        capsys.readouterr()
        SmallRun(run_dir=branched, policy=KEEP_ALL, resume=resume, epochs=1).train()
        return capsys.readouterr().out

    nothing = "Nothing is left to do; give more epochs to go on."
    assert f"{nothing} To branch there again: resume='epoch:1#b'.\n" in said("epoch:1")
    assert f"{nothing}\n" in said("auto")


@pytest.mark.parametrize(
    ("text", "again"), [("epoch:2", "epoch:2#b"), ("epoch:2#b", "epoch:2#b2"), ("/runs#1/x", "/runs#1/x#b")]
)
def test_a_request_is_relabelled_into_another_of_the_same_checkpoint(text: str, again: str) -> None:
    assert relabelled(text) == again
    assert ResumeRequest.parse(again).selector == ResumeRequest.parse(text).selector


@pytest.mark.parametrize("text", ["epoch:2#", "best#", "runs/x/checkpoints/step-00000005#"])
def test_an_empty_label_is_refused_with_a_label(text: str) -> None:
    with pytest.raises(ConfigError, match=f"resume='{text}' has no label after the #; write for instance '{text}b'"):
        ResumeRequest.parse(text)
