"""What `resume` asks for: must, never, a path (a branch, begun once); and directories that cannot serve."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.errors import ConfigError, DistTrainError, NoCheckpointError, StateMismatchError, StorageError
from tests.support.damage import Damage, checkpoint_names, contents, copy_run
from tests.support.faults import FaultPlan
from tests.support.solo import LeaveError, leave_at, train_quietly
from tests.support.specimen import build_model
from tests.support.twins import assert_same_run

ORIGIN, NEWER = "step-00000012", ["step-00000014", "step-00000015"]
LAST = NEWER[-1]
IMPATIENT = CheckpointPolicy(every_steps=2, every_epochs=1, max_failed_saves=1)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever happened to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train_quietly(run_dir)
    assert checkpoint_names(run_dir)[-3:] == [ORIGIN, *NEWER]
    return run_dir


@pytest.fixture
def run_dir(twin: Path, tmp_path: Path) -> Path:
    return copy_run(twin, tmp_path / "run")


def test_must_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=f"resume='must'.*{tmp_path}/run"):
        train_quietly(tmp_path / "run", resume="must")


def test_never_with_checkpoints_is_an_error_and_changes_none(run_dir: Path) -> None:
    before = contents(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match=f"resume='never'.*{LAST}"):
        train_quietly(run_dir, resume="never")
    assert contents(run_dir / "checkpoints") == before


def test_never_without_checkpoints_starts(tmp_path: Path) -> None:
    assert train_quietly(tmp_path / "run", resume="never", max_steps=2).run.committed_step == 2


def abandoned(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints" / "abandoned").glob("a*/*"))


@pytest.mark.parametrize("named", ["absolute", "relative", "name"])
def test_a_path_starts_a_branch_once(named: str, run_dir: Path, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"absolute": f"{run_dir}/checkpoints/{ORIGIN}", "relative": f"run/checkpoints/{ORIGIN}", "name": ORIGIN}
    monkeypatch.chdir(run_dir.parent)
    kept = contents(run_dir / "checkpoints" / ORIGIN)
    left = [contents(run_dir / "checkpoints" / name) for name in NEWER]
    first = train_quietly(run_dir, resume=path[named]).run
    assert first.resumed_from == f"{run_dir}/checkpoints/{ORIGIN}"
    assert abandoned(run_dir) == NEWER
    assert [contents(run_dir / "checkpoints/abandoned/a000002" / name) for name in NEWER] == left
    assert contents(run_dir / "checkpoints" / ORIGIN) == kept
    assert json.loads((run_dir / "branch.json").read_text())["requested"] == path[named]
    assert_same_run(twin, run_dir)
    again = train_quietly(run_dir, resume=path[named]).run
    assert again.resumed_from == f"{run_dir}/checkpoints/{LAST}"
    assert abandoned(run_dir) == NEWER
    assert_same_run(twin, run_dir)


def is_counted(operation: Operation) -> bool:
    """All changes but those of the heartbeat and the logs: when they come among the writer's, the clock decides."""
    return not any(name in operation.path for name in ("owner.json", "run.jsonl", "metrics.jsonl"))


def train_until_dead(run_dir: Path, resume: str, survive: int) -> FaultPlan:
    """After `survive` changes nothing more reaches the disk, as if the process had been killed there."""
    death = FaultPlan(nth=survive, errno=errno.EIO, lasting=True, matches=is_counted)
    with contextlib.suppress(DistTrainError, OSError):
        train_quietly(run_dir, resume=resume, policy=IMPATIENT, open_store=lambda root: Store(root, observer=death))
    return death


def changes(death: FaultPlan) -> list[str]:
    return [f"{one.kind} {one.path}" for one in death.log if is_counted(one)]


def position(texts: list[str], beginning: str) -> int:
    return next(index for index, text in enumerate(texts) if text.startswith(beginning))


def committed_by(run_dir: Path, attempt: int) -> list[str]:
    manifests = sorted((run_dir / "checkpoints").glob("step-*/manifest.json"))
    return [path.parent.name for path in manifests if json.loads(path.read_text())["attempt"] == attempt]


def check_killed_branch(run_dir: Path, twin: Path, survive: int) -> None:
    """The same command goes on with the branch and comes to the twin's end."""
    death = train_until_dead(run_dir, ORIGIN, survive)
    assert death.fired
    where = f"killed before {changes(death)[survive]}"
    own = committed_by(run_dir, attempt=2)
    run = train_quietly(run_dir, resume=ORIGIN).run
    assert run.resumed_from == f"{run_dir}/checkpoints/{own[-1] if own else ORIGIN}", where
    begun = {path.parent.name for path in (run_dir / "checkpoints" / "abandoned").glob("a*/*")}
    assert len(begun) == 1, f"started {len(begun)} times, {where}"
    assert abandoned(run_dir) == NEWER, where
    assert_same_run(twin, run_dir)


def changes_of_a_branch(run_dir: Path) -> list[str]:
    return changes(train_until_dead(run_dir, ORIGIN, 1_000_000))


def test_a_branch_killed_right_after_it_was_recorded_is_not_started_twice(twin: Path, tmp_path: Path) -> None:
    seen = changes_of_a_branch(copy_run(twin, tmp_path / "whole"))
    recorded = position(seen, "rename branch.json")
    committed = position(seen, "rename checkpoints/.saving-")
    for survive in (recorded, recorded + 1, recorded + 4, committed, committed + 1):
        check_killed_branch(copy_run(twin, tmp_path / str(survive)), twin, survive)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_branch_killed_before_any_operation_is_not_started_twice(twin: Path, tmp_path: Path) -> None:
    for survive in range(len(changes_of_a_branch(copy_run(twin, tmp_path / "whole")))):
        check_killed_branch(copy_run(twin, tmp_path / str(survive)), twin, survive)


def test_a_branch_from_another_run_leaves_that_run_as_it_is(twin: Path, tmp_path: Path) -> None:
    before = contents(twin)
    path = f"{twin}/checkpoints/{ORIGIN}"
    run = train_quietly(tmp_path / "run", resume=path).run
    assert run.resumed_from == path
    assert contents(twin) == before
    assert_same_run(twin, tmp_path / "run")
    assert train_quietly(tmp_path / "run", resume=path).run.resumed_from == f"{tmp_path}/run/checkpoints/{LAST}"
    assert contents(twin) == before


def test_a_foreign_branch_killed_before_its_first_commit_starts_there_again(twin: Path, tmp_path: Path) -> None:
    path = f"{twin}/checkpoints/{ORIGIN}"
    seen = changes(train_until_dead(tmp_path / "whole", path, 1_000_000))
    assert train_until_dead(tmp_path / "run", path, position(seen, "rename checkpoints/.saving-")).fired
    assert checkpoint_names(tmp_path / "run") == []
    assert train_quietly(tmp_path / "run", resume=path).run.resumed_from == path
    assert_same_run(twin, tmp_path / "run")


@pytest.mark.parametrize("bad", ["step-00000099", "/nowhere/checkpoints/step-00000001"])
def test_a_path_without_a_checkpoint_is_an_error_and_changes_nothing(bad: str, run_dir: Path) -> None:
    before = contents(run_dir / "checkpoints")
    with pytest.raises(NoCheckpointError, match=f"resume='{bad}'"):
        train_quietly(run_dir, resume=bad)
    assert contents(run_dir / "checkpoints") == before
    assert not (run_dir / "branch.json").exists()


def test_a_path_to_a_damaged_checkpoint_is_an_error_and_moves_no_other(run_dir: Path) -> None:
    Damage("flip").apply(run_dir / "checkpoints" / ORIGIN / "model-00001-of-00001.safetensors")
    others = [name for name in checkpoint_names(run_dir) if name != ORIGIN]
    before = [contents(run_dir / "checkpoints" / name) for name in others]
    with pytest.raises(NoCheckpointError, match=r"model-00001-of-00001\.safetensors"):
        train_quietly(run_dir, resume=ORIGIN)
    assert [contents(run_dir / "checkpoints" / name) for name in others] == before
    assert train_quietly(run_dir).run.resumed_from == f"{run_dir}/checkpoints/{LAST}"


def test_a_branch_that_does_not_fit_the_model_moves_nothing(run_dir: Path) -> None:
    before = contents(run_dir / "checkpoints")
    with pytest.raises(StateMismatchError, match="Nothing was changed"):
        train_quietly(run_dir, resume=ORIGIN, model=build_model(plain=True))
    assert contents(run_dir / "checkpoints") == before
    assert not (run_dir / "branch.json").exists()


def test_auto_goes_on_with_a_branch_that_was_recorded(run_dir: Path, twin: Path) -> None:
    """Killed before the branch's first commit, then run without the path, then with it: nothing is moved twice."""
    seen = changes_of_a_branch(copy_run(twin, run_dir.parent / "whole"))
    assert train_until_dead(run_dir, ORIGIN, position(seen, "rename checkpoints/.saving-")).fired
    with pytest.raises(LeaveError):
        train_quietly(run_dir, on_step=leave_at(14))
    assert checkpoint_names(run_dir)[-2:] == [ORIGIN, NEWER[0]]
    assert train_quietly(run_dir, resume=ORIGIN).run.resumed_from == f"{run_dir}/checkpoints/{NEWER[0]}"
    assert abandoned(run_dir) == NEWER
    assert_same_run(twin, run_dir)


# Directories that cannot serve


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(StorageError, match=f"{run_dir} cannot be written: .*(exists|ot a directory)") as caught:
            train_quietly(run_dir)
        assert "Choose another run_dir" in str(caught.value)
    assert (tmp_path / "file").read_text() == ""


@pytest.fixture
def read_only(run_dir: Path) -> Iterator[Path]:
    """The run directory, mounted read-only over itself."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a directory read-only")
    commands = (["mount", "--bind", str(run_dir), str(run_dir)], ["mount", "-o", "remount,ro,bind", str(run_dir)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield run_dir
    subprocess.run(["umount", str(run_dir)], timeout=20, check=True)


def test_a_read_only_run_directory_is_refused(read_only: Path) -> None:
    before = contents(read_only)
    with pytest.raises(StorageError, match=f"{read_only} cannot be written: Read-only file system"):
        train_quietly(read_only)
    assert contents(read_only) == before
