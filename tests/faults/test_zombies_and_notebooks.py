"""An old attempt that wakes up after a new one has taken over harms nothing; a notebook cell may be run again."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.manifest import EVENTS_LOG, METRICS_LOG
from dist_train.checkpoint.ownership import Owner, Ownership, read_owner
from dist_train.checkpoint.store import Operation, Store
from dist_train.errors import DistTrainError, RunInUseError
from dist_train.run import Run
from tests.support.damage import contents
from tests.support.solo import UPDATES, LeaveError, leave_at, train_quietly
from tests.support.specimen import build_model, build_optimizer
from tests.support.twins import assert_same_run

APPENDED = (EVENTS_LOG, METRICS_LOG)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever happened to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train_quietly(run_dir)
    return run_dir


def wait_for_save(run: Run) -> None:
    """Keeps the loop still while its writer works, so that two runs in one process do not share random numbers."""
    run._checkpointer.wait()


@dataclass
class Sleep:
    """Stops before the `nth` change and lets a new attempt train to the end there: a stopped process, continued."""

    run_dir: Path
    nth: int
    resume_at: Callable[[Path], Any]
    seen: list[str] = field(default_factory=list)
    asleep: bool = False
    left: dict[str, str] = field(default_factory=dict)
    """What the new attempt left behind."""

    def __call__(self, operation: Operation) -> None:
        if "owner.json" in operation.path or self.asleep:
            return
        self.seen.append(f"{operation.kind} {operation.path}")
        if len(self.seen) == self.nth + 1:
            self.asleep = True
            self.resume_at(self.run_dir)
            self.left = contents(self.run_dir)


def sleep_and_wake(run_dir: Path, nth: int) -> tuple[Sleep, BaseException | None]:
    sleep = Sleep(run_dir, nth, train_quietly)
    try:
        train_quietly(run_dir, on_step=wait_for_save, open_store=lambda root: Store(root, observer=sleep))
    except DistTrainError as error:
        return sleep, error
    return sleep, None


def changes_of_a_run(run_dir: Path) -> list[str]:
    sleep = Sleep(run_dir, 1_000_000, train_quietly)
    train_quietly(run_dir, on_step=wait_for_save, open_store=lambda root: Store(root, observer=sleep))
    return sleep.seen


def check_zombie(run_dir: Path, twin: Path, nth: int) -> None:
    sleep, error = sleep_and_wake(run_dir, nth)
    after = contents(run_dir)
    changed = {name for name in sleep.left.keys() | after.keys() if sleep.left.get(name) != after.get(name)}
    harmed = {name for name in changed if name not in APPENDED and not is_spared(name, sleep.seen[nth])}
    assert not harmed, f"stopped before {sleep.seen[nth]}: {sorted(harmed)}"
    assert error is None or isinstance(error, RunInUseError), f"stopped before {sleep.seen[nth]}"
    assert_same_run(twin, run_dir)


def is_spared(name: str, stopped_before: str) -> bool:
    """The one change that it was about to make cannot be called back: a file replaced, an old checkpoint pruned."""
    kind, path = stopped_before.split(" ", 1)
    names = ("status.json", "run.json", "latest", "best", "attempts/pulse-000001.json")
    replaced = name in names and path.startswith(name)
    pruned = kind == "rename" and path.startswith("checkpoints/step-") and name.startswith(path)
    return replaced or pruned or name.endswith(".tmp")


def first_life(changes: list[str]) -> range:
    """From the first change after the attempt was taken and told to the last one."""
    taken = changes.index("create attempts/000001")
    return range(changes.index("fsync_dir attempts", taken) + 1, len(changes))


def test_a_zombie_stopped_in_a_save_and_continued_harms_nothing(twin: Path, tmp_path: Path) -> None:
    changes = changes_of_a_run(tmp_path / "whole")
    saving = [index for index in first_life(changes) if "checkpoints/.saving-step-00000006-" in changes[index]]
    commit = next(index for index in saving if changes[index].startswith("rename"))
    for nth in (saving[0], saving[3], commit - 2, commit - 1, commit, commit + 1):
        check_zombie(tmp_path / str(nth), twin, nth)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_zombie_stopped_anywhere_and_continued_harms_nothing(twin: Path, tmp_path: Path) -> None:
    changes = changes_of_a_run(tmp_path / "whole")
    life = first_life(changes)
    for nth in [*life[:130], *life[-60:]]:  # the first saves and the last one; those in between are like them
        check_zombie(tmp_path / str(nth), twin, nth)


@pytest.mark.parametrize("stopped_at", [7, UPDATES - 1, UPDATES])
def test_a_zombie_stopped_in_training_says_who_took_over_and_leaves_its_status_alone(
    stopped_at: int, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the very end, where its last save is the one that is refused."""
    monkeypatch.setattr("dist_train.misuse.require_newest", lambda place, run: None)  # a zombie is another process
    left: dict[str, str] = {}

    def sleep(run: Run) -> None:
        wait_for_save(run)
        if run.global_step == stopped_at and not left:
            train_quietly(tmp_path / "run")
            left.update(contents(tmp_path / "run"))

    with pytest.raises(RunInUseError, match=r"Attempt 2 has taken over .* from this one"):
        train_quietly(tmp_path / "run", on_step=sleep)
    after = contents(tmp_path / "run")
    assert {name for name in after.keys() | left.keys() if after.get(name) != left.get(name)} <= set(APPENDED)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"
    assert_same_run(twin, tmp_path / "run")


def test_a_zombie_that_fails_by_itself_does_not_overwrite_the_status(tmp_path: Path) -> None:
    """For instance because its peers are dead: that is no news of the run."""

    def sleep(run: Run) -> None:
        if run.global_step == 7 and run.attempt == 1:
            train_quietly(tmp_path / "run")
            raise LeaveError("the other ranks are dead")

    with pytest.raises(LeaveError):
        train_quietly(tmp_path / "run", on_step=sleep)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"


# Launches


def test_a_restart_by_the_same_launcher_takes_over_without_waiting() -> None:
    """torchrun restarts its workers as processes of its own: equal launch, other process ids."""
    environment = {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
    first = Owner.of_this_process(environment)
    assert first.may_be_replaced_by(Owner.of_this_process(environment))
    other = Owner.of_this_process({**environment, "TORCHELASTIC_RUN_ID": "another"})
    assert first.launch != other.launch


def test_what_an_old_attempt_wrote_last_does_not_hide_the_newest_that_lives(tmp_path: Path) -> None:
    """An attempt that was stopped between its check and its write puts its own name over the new owner's."""
    store = Store(tmp_path)
    zombie = Owner(host="h", hostname="old", pid=1, pid_started="1", launch="a", attempt=1, released=True)
    newest = Owner(host="h2", hostname="new", pid=2, pid_started="2", launch="b", attempt=2, beats=7)
    for name in ("attempts/000001", "attempts/000002"):
        store.make_directory("attempts")
        store.create_exclusive(name)
    write_owner(store, zombie)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        write_owner(store, newest)  # its next beat

    with pytest.raises(RunInUseError, match="process 2 on new"):
        Ownership(store, patience_seconds=15, clock=lambda: now[0], sleep=sleep).acquire()


def write_owner(store: Store, owner: Owner) -> None:
    store.replace("attempts/owner.json", json.dumps(asdict(owner)).encode())


def test_a_cell_left_by_an_error_is_run_again(tmp_path: Path, twin: Path) -> None:
    with pytest.raises(LeaveError):
        train_quietly(tmp_path / "run", on_step=leave_at(9))
    started = time.monotonic()
    ended = train_quietly(tmp_path / "run")
    assert time.monotonic() - started < 5  # not the patience that another launch would need
    assert ended.run.resumed_from is not None
    assert_same_run(twin, tmp_path / "run")


def never_left(run_dir: Path) -> Run:
    """A run whose `with` block never ended, as when a kernel interrupts a cell hard; its threads are alive."""
    model = build_model()
    optimizer, scheduler = build_optimizer(model)
    run = Run(str(run_dir), model=model, optimizer=optimizer, scheduler=scheduler)
    return run.__enter__()


def test_a_cell_that_was_never_left_is_taken_over_by_the_next_run(tmp_path: Path, twin: Path) -> None:
    with contextlib.suppress(LeaveError):
        train_quietly(tmp_path / "run", on_step=leave_at(9))
    left = never_left(tmp_path / "run")
    assert read_owner(Store(tmp_path / "run")).released is False  # type: ignore[union-attr]
    started = time.monotonic()
    train_quietly(tmp_path / "run")
    assert time.monotonic() - started < 5
    assert_same_run(twin, tmp_path / "run")
    before = contents(tmp_path / "run")
    left.__exit__(None, None, None)  # late, as when the object is cleaned up: no news of the run
    after = contents(tmp_path / "run")
    assert {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} <= set(APPENDED)


def test_a_run_that_was_left_keeps_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    train_quietly(tmp_path / "run", max_steps=2)
    with pytest.raises(LeaveError):
        train_quietly(tmp_path / "run", on_step=leave_at(3))
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
