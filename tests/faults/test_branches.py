"""Branches: begun from any checkpoint that a person can name, once; and nothing of the run before them is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.restorer import peek
from dist_train.checkpoint.store import Operation, Store
from dist_train.cli import main
from dist_train.errors import ConfigError, DistTrainError, NoCheckpointError
from dist_train.history import read_metrics
from tests.support.damage import checkpoint_names, contents, copy_run, events
from tests.support.faults import FaultPlan
from tests.support.solo import LeaveError, leave_at, train_quietly
from tests.support.twins import assert_same_run

KEEP_ALL = CheckpointPolicy(every_epochs=1, keep_last=10)
IMPATIENT = CheckpointPolicy(every_epochs=1, keep_last=10, max_failed_saves=1)
FIRST, SECOND, THIRD = "step-00000005", "step-00000010", "step-00000015"
"""The ends of the three epochs. What the loop measures grows, so the first is the best."""
LR = 3e-3


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("original") / "run"
    train_quietly(run_dir, policy=KEEP_ALL)
    assert checkpoint_names(run_dir) == [FIRST, SECOND, THIRD]
    return run_dir


@pytest.fixture(scope="module")
def branched(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the end of epoch 1 with another learning rate, never interrupted."""
    run_dir = copy_run(original, tmp_path_factory.mktemp("branched") / "run")
    train_quietly(run_dir, resume="epoch:1", lr=LR, policy=KEEP_ALL)
    return run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return copy_run(original, tmp_path / "run")


def branch(run_dir: Path, resume: str, **options: Any) -> str:
    """Trains; the folder, relative to checkpoints/, that was resumed from."""
    run = train_quietly(run_dir, resume=resume, policy=options.pop("policy", KEEP_ALL), **options).run
    return (run.resumed_from or "").partition("checkpoints/")[2]


def everywhere(run_dir: Path) -> dict[str, str]:
    """Digest of the manifest of every committed checkpoint -> that of all its bytes, wherever it lies now."""
    found = {}
    for manifest in sorted((run_dir / "checkpoints").rglob("manifest.json")):
        found[json.loads(manifest.read_text())["digest"]] = str(contents(manifest.parent))
    return found


def abandoned(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoints" / "abandoned"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("a*/*"))


@pytest.mark.parametrize(
    ("asked", "origin", "left"),
    [
        ("best", FIRST, [SECOND, THIRD]),
        ("epoch:2", SECOND, [THIRD]),
        ("step:5", FIRST, [SECOND, THIRD]),
        ("epoch:3", THIRD, []),
        (f"checkpoints/{SECOND}", SECOND, [THIRD]),
    ],
)
def test_each_name_starts_a_branch_once_and_auto_goes_on_with_it(
    asked: str, origin: str, left: list[str], run_dir: Path, original: Path
) -> None:
    before = everywhere(original)
    assert branch(run_dir, asked, lr=LR) == origin
    assert abandoned(run_dir) == [f"a000002/{name}" for name in left]
    after = everywhere(run_dir)
    assert {digest: after.get(digest) for digest in before} == before
    (event,) = events(run_dir, "branched")
    assert (event["attempt"], event["global_step"]) == (2, int(origin[5:]))
    ended = everywhere(run_dir)
    newest = checkpoint_names(run_dir)[-1]
    assert branch(run_dir, asked, lr=LR) == newest, "the same command goes on"
    assert branch(run_dir, "auto", lr=LR) == newest
    assert everywhere(run_dir) == ended, "nothing was left to do"
    assert len(events(run_dir, "branched")) == 1


def test_a_branch_that_was_never_left_equals_one_that_was_left_at_every_step(run_dir: Path, branched: Path) -> None:
    for step in range(6, 16):
        with contextlib.suppress(LeaveError):
            branch(run_dir, "epoch:1", lr=LR, policy=CheckpointPolicy(every_steps=1), on_step=leave_at(step))
    branch(run_dir, "epoch:1", lr=LR)
    assert_same_run(branched, run_dir)


def test_retention_leaves_what_the_run_had_before_the_branch(run_dir: Path, original: Path) -> None:
    """Five saves of the branch with room for two: those before it are not among them."""
    policy = CheckpointPolicy(every_steps=2, keep_last=2, keep_best=0)
    branch(run_dir, "epoch:2", lr=LR, policy=policy)
    assert checkpoint_names(run_dir) == [FIRST, SECOND, "step-00000014", THIRD]
    branch(run_dir, "auto", lr=LR, policy=policy)
    after = everywhere(run_dir)
    assert set(everywhere(original)) <= set(after)


def test_a_label_starts_the_same_branch_anew(run_dir: Path, branched: Path) -> None:
    assert branch(run_dir, "epoch:1", lr=LR) == FIRST
    assert branch(run_dir, "epoch:1#again", lr=LR) == FIRST
    assert abandoned(run_dir) == [f"a000002/{SECOND}", f"a000002/{THIRD}", f"a000003/{SECOND}", f"a000003/{THIRD}"]
    assert_same_run(branched, run_dir)
    assert branch(run_dir, "epoch:1#again", lr=LR) == THIRD


def test_a_branch_of_a_branch_knows_only_its_own_line(run_dir: Path) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    assert branch(run_dir, "epoch:2", lr=1e-3) == SECOND, "the first branch's, not the one that it has left behind"
    lines = [json.loads(line) for line in (run_dir / "run.jsonl").read_text().splitlines()]
    resumed = [line["changes"]["optimizer[0].lr"] for line in lines if line["event"] == "resumed"]
    assert resumed == [[0.01, LR], [LR, 1e-3]]
    assert abandoned(run_dir) == [f"a000002/{SECOND}", f"a000002/{THIRD}", f"a000003/{THIRD}"]
    assert [record["global_step"] for record in read_metrics(run_dir) if record["kind"] == "epoch"] == [5, 10, 15]


def test_what_a_branch_left_behind_is_resumed_by_its_path(run_dir: Path, original: Path) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    path = f"abandoned/a000002/{SECOND}"
    assert branch(run_dir, path) == path
    assert_same_run(original, run_dir)
    assert f"a000002/{SECOND}" in abandoned(run_dir), "the origin of a branch stays where it is"
    assert branch(run_dir, path) == THIRD


def test_auto_goes_on_with_a_branch_from_abandoned_that_has_committed_nothing(run_dir: Path, original: Path) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    path = f"abandoned/a000002/{SECOND}"
    with contextlib.suppress(LeaveError):
        branch(run_dir, path, on_step=leave_at(12))
    assert branch(run_dir, "auto") == path
    assert_same_run(original, run_dir)


def test_a_branch_from_what_another_run_left_behind_takes_its_history_over(run_dir: Path, tmp_path: Path) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    other = tmp_path / "other"
    before = contents(run_dir)
    path = f"{run_dir}/checkpoints/abandoned/a000002/{SECOND}"
    assert train_quietly(other, resume=path, policy=KEEP_ALL).run.resumed_from == path
    assert contents(run_dir) == before
    assert [record["global_step"] for record in read_metrics(other) if record["kind"] == "step"] == list(range(1, 16))


def test_a_folder_with_a_hash_in_its_name_is_no_label(original: Path, tmp_path: Path) -> None:
    copied = copy_run(original, tmp_path / "run#1")
    path = f"{copied}/checkpoints/{SECOND}"
    assert train_quietly(tmp_path / "other", resume=path).run.resumed_from == path
    assert train_quietly(tmp_path / "third", resume=f"{path}#b").run.resumed_from == path


@pytest.mark.parametrize("asked", ["epoch:7", "step:3", "epoch:7#label"])
def test_names_of_nothing_are_errors_that_change_nothing(asked: str, run_dir: Path) -> None:
    before = contents(run_dir / "checkpoints")
    with pytest.raises(NoCheckpointError, match=asked):
        branch(run_dir, asked)
    assert contents(run_dir / "checkpoints") == before
    assert not (run_dir / "branch.json").exists()


# Kills


def is_counted(operation: Operation) -> bool:
    """All changes but those of the heartbeat and the logs: when they come among the writer's, the clock decides."""
    return not any(name in operation.path for name in ("owner.json", "run.jsonl", "metrics.jsonl"))


def train_until_dead(run_dir: Path, resume: str, survive: int) -> FaultPlan:
    """After `survive` changes nothing more reaches the disk, as if the process had been killed there."""
    death = FaultPlan(nth=survive, errno=errno.EIO, lasting=True, matches=is_counted)
    with contextlib.suppress(DistTrainError, OSError):
        branch(run_dir, resume, lr=1e-3, policy=IMPATIENT, open_store=lambda root: Store(root, observer=death))
    return death


def changes(death: FaultPlan) -> list[str]:
    return [f"{one.kind} {one.path}" for one in death.log if is_counted(one)]


def check_killed(start: Path, twin: Path, folder: Path, resume: str, survive: int) -> None:
    run_dir = copy_run(start, folder)
    before = everywhere(run_dir)
    death = train_until_dead(run_dir, resume, survive)
    assert death.fired
    branch(run_dir, resume, lr=1e-3)
    where = f"killed before {changes(death)[survive]}"
    assert_same_run(twin, run_dir)
    after = everywhere(run_dir)
    assert {digest: after.get(digest) for digest in before} == before, where
    assert json.loads((run_dir / "branch.json").read_text())["requested"] == resume, where
    assert checkpoint_names(run_dir) == checkpoint_names(twin), where


@pytest.mark.parametrize("asked", ["epoch:2", f"abandoned/a000002/{SECOND}"])
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_branch_of_a_branch_killed_before_an_operation(
    asked: str, every: int, branched: Path, tmp_path: Path
) -> None:
    """Of the branch that is left and of the one that begins: nothing is lost, nothing is begun twice."""
    whole = copy_run(branched, tmp_path / "whole")
    count = len(changes(train_until_dead(whole, asked, 1_000_000)))
    for survive in range(0, count, every):
        check_killed(branched, whole, tmp_path / str(survive), asked, survive)


def test_a_new_branch_finishes_what_a_killed_one_had_not_moved(run_dir: Path) -> None:
    death = train_until_dead(copy_run(run_dir, run_dir.parent / "whole"), "epoch:1", 1_000_000)
    recorded = next(i for i, text in enumerate(changes(death)) if text.startswith("rename branch.json"))
    assert train_until_dead(run_dir, "epoch:1", recorded + 1).fired
    assert abandoned(run_dir) == []
    assert branch(run_dir, "epoch:1#b", lr=LR) == FIRST
    assert abandoned(run_dir) == [f"a000002/{SECOND}", f"a000002/{THIRD}"]


# Read-only parents


def test_a_search_resumes_without_copying_and_saves_into_its_own_directory(original: Path, tmp_path: Path) -> None:
    parent = copy_run(original, tmp_path / "input" / "version-1" / "run")
    for name in (SECOND, THIRD):
        (parent / "checkpoints" / name).rename(tmp_path / name)
    before = contents(parent)
    own = tmp_path / "working" / "run"
    search = [str(tmp_path / "input" / "*" / "*")]
    with contextlib.suppress(LeaveError):
        train_quietly(own, policy=KEEP_ALL, search=search, on_step=leave_at(7))
    run = train_quietly(own, policy=KEEP_ALL, search=search).run
    assert run.resumed_from == f"{parent}/checkpoints/{FIRST}", "nothing was committed before"
    assert checkpoint_names(own) == [SECOND, THIRD]
    assert contents(parent) == before
    assert_same_run(original, own)
    assert run.best == 5 / 7
    ids = {json.loads((one / "run.json").read_text())["run_id"] for one in (own, parent)}
    assert len(ids) == 1


def test_a_damaged_run_file_does_not_hand_the_run_to_a_namesake(original: Path, tmp_path: Path) -> None:
    """The run is known by its own newest checkpoint then, not by what `search` finds under the same name."""
    own = copy_run(original, tmp_path / "work" / "run")
    (own / "run.json").write_bytes(b"")
    train_quietly(tmp_path / "input" / "1" / "run", policy=KEEP_ALL)  # another run, as far on
    search = [str(tmp_path / "input" / "*" / "*")]
    resumed_from = train_quietly(own, policy=KEEP_ALL, search=search).run.resumed_from
    assert resumed_from == f"{own}/checkpoints/{THIRD}"


@pytest.mark.parametrize("epochs_there", [3, 5])
def test_another_session_s_line_does_not_replace_the_own_one(epochs_there: int, original: Path, tmp_path: Path) -> None:
    """Both went on from epoch 1, with other rates; the other line is as far on, or further."""
    one, other = (copy_run(original, tmp_path / name / "run") for name in ("a", "b"))
    for line in (one, other):
        for name in (SECOND, THIRD):
            shutil.rmtree(line / "checkpoints" / name)
    train_quietly(one, lr=LR, policy=KEEP_ALL)
    train_quietly(other, lr=2 * LR, policy=KEEP_ALL, epochs=epochs_there)
    ended = train_quietly(one, lr=LR, policy=KEEP_ALL, epochs=4, search=[str(tmp_path / "b")])
    assert ended.run.resumed_from == f"{one}/checkpoints/{THIRD}"
    assert ("does not follow from it" in ended.output) is (epochs_there > 3)


def test_a_later_session_s_output_is_continued_where_it_follows_from_the_own_newest(
    original: Path, tmp_path: Path
) -> None:
    own = copy_run(original, tmp_path / "own" / "run")
    later = copy_run(original, tmp_path / "later" / "run")
    train_quietly(later, policy=KEEP_ALL, epochs=4)
    ended = train_quietly(own, policy=KEEP_ALL, epochs=5, search=[str(tmp_path / "later")])
    assert ended.run.resumed_from == f"{later}/checkpoints/step-00000020"


def test_a_branch_from_a_parent_goes_on_in_the_next_session(original: Path, branched: Path, tmp_path: Path) -> None:
    first = copy_run(original, tmp_path / "input" / "1" / "run")
    search = [str(tmp_path / "input" / "*" / "*")]
    before = contents(first)
    second = tmp_path / "working" / "run"
    with contextlib.suppress(LeaveError):
        branch(second, "epoch:1", lr=LR, search=search, on_step=leave_at(12))
    assert checkpoint_names(second) == [SECOND]
    attached = copy_run(second, tmp_path / "input" / "2" / "run")
    third = tmp_path / "third" / "run"
    assert train_quietly(third, resume="epoch:1", lr=LR, policy=KEEP_ALL, search=search).run.resumed_from == (
        f"{attached}/checkpoints/{SECOND}"
    )
    assert_same_run(branched, third)
    assert contents(first) == before


def test_two_runs_below_a_pattern_are_told_apart_by_their_folder(original: Path, tmp_path: Path) -> None:
    copy_run(original, tmp_path / "input" / "a" / "run")
    train_quietly(tmp_path / "input" / "b" / "other", policy=KEEP_ALL, max_steps=5)
    search = [str(tmp_path / "input" / "*")]
    run = train_quietly(tmp_path / "w" / "other", policy=KEEP_ALL, search=search).run
    assert run.resumed_from == f"{tmp_path}/input/b/other/checkpoints/{FIRST}"
    with pytest.raises(ConfigError, match="search finds 2 different runs"):
        train_quietly(tmp_path / "w" / "third", search=search)


# Looking


def test_peeking_tells_what_would_be_resumed_and_changes_nothing(run_dir: Path) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    before = contents(run_dir)
    store = Store(run_dir)

    def step_of(resume: str) -> int:
        manifest = peek(store, resume)
        return manifest.progress.global_step if manifest else -1

    asked = ["auto", "epoch:1", "epoch:1#b", "best", f"abandoned/a000002/{SECOND}"]
    assert [step_of(resume) for resume in asked] == [15, 15, 5, 5, 10]
    with pytest.raises(NoCheckpointError, match="epoch:9"):
        peek(store, "epoch:9")
    assert peek(Store(run_dir.parent / "nowhere"), "auto") is None
    assert contents(run_dir) == before


def test_ls_lists_what_branches_left_behind(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    branch(run_dir, "epoch:1", lr=LR)
    assert main(["ls", str(run_dir)]) == 0
    assert "2 left behind by a branch in checkpoints/abandoned/" in capsys.readouterr().out
    assert main(["ls", str(run_dir), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    path = f"{run_dir}/checkpoints/abandoned/a000002/{SECOND}"
    assert any(line.split()[:3] == [path, "epochs", "2,"] for line in lines)
    assert main(["ls", str(run_dir), "--all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows if row.get("abandoned")] == [10, 15]
    assert all(math.isfinite(row["train_loss"]) for row in rows)
