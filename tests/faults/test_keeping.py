"""Law 6 under faults: whatever fails or dies while retention works, what stays is whole and verifies."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint import ownership, pruning
from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.holdings import carry_out, measure, survey
from dist_train.checkpoint.manifest import CHECKPOINTS, Manifest
from dist_train.checkpoint.ownership import newest_attempt
from dist_train.checkpoint.pins import add_pin, pin, read_pins, remove_pin
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.pruning import open_pruning
from dist_train.checkpoint.retention import Decision
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.stripping import strip, sweep, weights_only
from dist_train.checkpoint.writer import Pruned, Stripped
from dist_train.cli import main
from dist_train.errors import NoCheckpointError, RunInUseError
from tests.support.crash_states import Event as DiskEvent
from tests.support.crash_states import Recorder, RecordingStore, Synced, crash_states
from tests.support.faults import FaultPlan
from tests.support.saving_run import SoloRun, commits, failures, listed, solo_run, whole

POLICY = CheckpointPolicy(keep_last=4, keep_best=0, keep_optimizer=1)
"""The save of step 3 makes step 1 weights-only, and that of step 4 the rest."""
OPTIMIZER = "optimizer-00001-of-00001.safetensors"
FIRST = f"{CHECKPOINTS}/step-00000001"


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat in between would shift the numbers of the operations."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600.0)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with full checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("origin") / "run"
    with solo_run(root, CheckpointPolicy(keep_last=4)) as run:
        run.save(1)
        run.save(2)
    return root


@pytest.fixture
def fresh(two_saves: Path, tmp_path: Path) -> Path:
    return copy_to(two_saves, tmp_path / "run")


def copy_to(root: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(root, target, symlinks=True))


def manifest_of(root: Path, path: str) -> Manifest:
    manifest = read_checkpoint(Store(root), path).manifest
    assert manifest is not None
    return manifest


def stripped_paths(root: Path) -> list[str]:
    return [path for path, one in listed(root).items() if one.stripped_from]


def is_of_strip(operation: Operation) -> bool:
    """A change inside a committed folder: only stripping makes one."""
    return operation.path.startswith(f"{CHECKPOINTS}/step-")


class Killed(BaseException):
    """SIGKILL, as far as one thread can tell: nothing after it happens."""


def kill_at(nth: int) -> Callable[[Operation], None]:
    seen = iter(range(10_000))

    def observe(operation: Operation) -> None:
        if next(seen) >= nth:
            raise Killed

    return observe


def operations_of(act: Callable[[Store], object], root: Path) -> list[Operation]:
    plan = FaultPlan(armed=False)
    act(Store(root, observer=plan))
    return plan.log


def strip_first(store: Store) -> bool:
    return strip(store, FIRST, manifest_of(store.root, FIRST))


def delete_first(store: Store) -> bool:
    (one,) = (one for one in survey(store) if one.path == FIRST)
    return carry_out(store, Decision(holding=one, action="delete", reason="test"))


@pytest.mark.parametrize(("act", "least"), [(strip_first, 6), (delete_first, 5)], ids=["strip", "delete"])
def test_a_kill_at_any_operation_leaves_every_listed_checkpoint_whole(
    two_saves: Path, tmp_path: Path, act: Callable[[Store], bool], least: int
) -> None:
    operations = operations_of(act, copy_to(two_saves, tmp_path / "dry"))
    assert len(operations) >= least
    states = set()
    for nth in range(len(operations)):
        root = copy_to(two_saves, tmp_path / "run")
        with pytest.raises(Killed):
            act(Store(root, observer=kill_at(nth)))
        assert listed(root).keys() == whole(root).keys(), operations[nth]
        assert f"{CHECKPOINTS}/step-00000002" in whole(root)
        states.add((FIRST in listed(root), bool(stripped_paths(root))))
        with solo_run(root, POLICY) as run:  # the next attempt finishes it
            assert commits(run.save(3))
        assert listed(root).keys() == whole(root).keys()
        for path, one in listed(root).items():
            assert set(os.listdir(root / path)) == {*one.files, "manifest.json"}, "what the kill left was not swept"
    assert len(states) == 2, "a kill before and one after the point of no return"


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=lambda code: errno.errorcode[code])
def test_an_error_at_any_operation_of_a_stripping_costs_nothing_but_space(
    two_saves: Path, tmp_path: Path, code: int, lasting: bool
) -> None:
    def save_third(store: Store) -> list[Operation]:
        run = SoloRun(store, POLICY).open()
        run.save(3)
        run.close()
        return []

    log = operations_of(save_third, copy_to(two_saves, tmp_path / "dry"))
    count = sum(is_of_strip(one) for one in log)
    assert count >= 7, "one is stripped; the other one is what the attempt resumed from"
    for nth in range(count):
        root = copy_to(two_saves, tmp_path / "run")
        plan = FaultPlan(nth=nth, errno=code, lasting=lasting, matches=is_of_strip)
        run = SoloRun(Store(root, observer=plan), POLICY).open()
        events = run.save(3)
        plan.disarm()
        assert plan.fired, nth
        assert commits(events), "the save itself is done"
        assert not failures(events)
        assert listed(root).keys() == whole(root).keys()
        assert all(path in stripped_paths(root) for path in (one.path for one in events if isinstance(one, Stripped)))
        assert commits(run.save(4))
        run.close()
        assert len(stripped_paths(root)) == 3, "made good by the next commit"
        for path, one in listed(root).items():
            assert set(os.listdir(root / path)) == {*one.files, "manifest.json"}


# Power loss


@dataclass(frozen=True)
class Story:
    """Two saves, then the first becomes weights-only, as the disk saw it."""

    recorder: Recorder
    before: int
    """Events until then."""
    full: str
    weights: str
    """Digests of the first checkpoint's manifests."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    base = tmp_path_factory.mktemp("disk")
    recorder = Recorder(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ownership, "BEAT_SECONDS", 3600.0)
        run = SoloRun(RecordingStore(base / "run", recorder), CheckpointPolicy(keep_last=4)).open()
        (first, *_), _ = commits(run.save(1)), commits(run.save(2))
        run.close()
    recorder.settle()
    before = len(recorder.events)
    assert strip(RecordingStore(base / "run", recorder), FIRST, first.manifest)
    recorder.mark("stripped")
    return Story(recorder, before, first.manifest.digest, weights_only(first.manifest).digest)


def lost(story: Story, events: list[DiskEvent], folder: Path) -> Iterator[str]:
    """States of the disk in which the first checkpoint is neither what it was nor what it becomes."""
    for number, state in enumerate(crash_states(story.recorder, events)):
        if state.moment <= story.before:
            continue
        root = folder / str(number)
        state.materialise(root)
        verifying = whole(root / "run")
        expected = {story.weights} if state.moment == len(events) else {story.full, story.weights}
        if FIRST not in verifying or verifying[FIRST].digest not in expected:
            yield f"after event {state.moment} ({state.how})"
        shutil.rmtree(root)


def test_no_power_loss_takes_a_checkpoint_that_is_being_stripped(story: Story, tmp_path: Path) -> None:
    assert not list(lost(story, story.recorder.events, tmp_path))


@pytest.mark.parametrize("kind", ["fsync", "fsync_dir"])
def test_leaving_out_a_sync_of_a_stripping_is_found(story: Story, tmp_path: Path, kind: str) -> None:
    """The checker has teeth."""
    before, after = story.recorder.events[: story.before], story.recorder.events[story.before :]
    kept = [one for one in after if not (isinstance(one, Synced) and one.kind == kind)]
    assert len(kept) < len(after)
    assert any(True for _ in lost(story, [*before, *kept], tmp_path))


# Pins that come at the last moment


def at(kind: str, ending: str, act: Callable[[], object]) -> Callable[[Operation], None]:
    """Does something once, right before a change."""
    left = [act]

    def observe(operation: Operation) -> None:
        if left and operation.kind == kind and operation.path.endswith(ending):
            left.pop()()

    return observe


def test_a_pin_that_comes_while_the_checkpoint_is_being_deleted_brings_it_back(fresh: Path) -> None:
    digest = manifest_of(fresh, FIRST).digest
    store = Store(fresh, observer=at("rename", "step-00000001", lambda: add_pin(Store(fresh), FIRST, digest)))
    assert not delete_first(store)
    assert FIRST in whole(fresh)


def test_a_pin_that_comes_while_the_checkpoint_is_being_stripped_keeps_it_full(fresh: Path) -> None:
    full = manifest_of(fresh, FIRST)
    store = Store(fresh, observer=at("rename", ".tmp", lambda: add_pin(Store(fresh), FIRST, full.digest)))
    (one,) = (one for one in survey(store) if one.path == FIRST)
    assert not carry_out(store, Decision(holding=one, action="strip", reason="test"))
    assert manifest_of(fresh, FIRST).digest == full.digest
    assert FIRST in whole(fresh)


def test_pinning_what_is_deleted_at_that_moment_is_an_error_and_leaves_no_pin(fresh: Path) -> None:
    manifest = manifest_of(fresh, FIRST)
    store = Store(fresh, observer=at("mkdir", "pins", lambda: shutil.rmtree(fresh / FIRST)))
    with pytest.raises(NoCheckpointError, match="deleted by retention before it could be pinned"):
        pin(store, FIRST, manifest)
    assert read_pins(store) == frozenset()


def test_pinning_what_is_stripped_at_that_moment_pins_the_weights(fresh: Path) -> None:
    manifest = manifest_of(fresh, FIRST)
    store = Store(fresh, observer=at("mkdir", "pins", lambda: strip_first(Store(fresh))))
    now = pin(store, FIRST, manifest)
    assert now.stripped_from == manifest.digest
    assert read_pins(store) == {now.digest}


def test_a_pin_is_there_or_not_whatever_operation_fails(fresh: Path) -> None:
    manifest = manifest_of(fresh, FIRST)
    count = len(operations_of(lambda store: pin(store, FIRST, manifest), copy_to(fresh, fresh.with_name("dry"))))
    for nth in range(count):
        root = copy_to(fresh, fresh.with_name("try"))
        with pytest.raises(OSError, match="Input/output error"):
            pin(Store(root, observer=FaultPlan(nth=nth, errno=errno.EIO)), FIRST, manifest)
        assert read_pins(Store(root)) <= {manifest.digest}
        pin(Store(root), FIRST, manifest)
        assert read_pins(Store(root)) == {manifest.digest}
        remove_pin(Store(root), manifest.digest)
        assert read_pins(Store(root)) == frozenset()


# `dist-train prune` beside a run that trains


def test_prune_beside_a_training_run_leaves_its_newest_two_and_its_staging(fresh: Path) -> None:
    run = SoloRun(Store(fresh), CheckpointPolicy(keep_last=9)).open()
    for step in (3, 4, 5):
        assert commits(run.save(step))
    torn = fresh / CHECKPOINTS / ".saving-step-00000006-a000002"
    torn.mkdir()
    assert main(["prune", str(fresh), "--keep-last", "1", "--keep-best", "0", "--yes"]) == 0
    assert sorted(path[-1] for path in whole(fresh)) == ["4", "5"]
    assert torn.is_dir()
    torn.rmdir()
    assert commits(run.save(6)), "the run goes on"
    run.close()
    assert main(["prune", str(fresh), "--keep-last", "1", "--keep-best", "0", "--yes"]) == 0
    assert sorted(path[-1] for path in whole(fresh)) == ["6"]


def test_prune_leaves_what_a_living_attempt_resumed_from_until_it_has_committed(fresh: Path) -> None:
    with solo_run(fresh, CheckpointPolicy(keep_last=9)) as run:
        run.save(3)
        run.save(4)
    digest = manifest_of(fresh, FIRST).digest
    run = SoloRun(Store(fresh), CheckpointPolicy(keep_last=9)).open()
    arguments = ["prune", str(fresh), "--keep-last", "1", "--keep-best", "0", "--yes"]
    assert main(arguments) == 1, "nobody knows yet where it resumes from"
    assert len(whole(fresh)) == 4
    event = f'{{"attempt": {run.checkpointer.attempt}, "event": "resumed", "digest": "{digest}"}}'
    run.store.append("run.jsonl", event + "\n")
    assert main(arguments) == 0
    assert sorted(path[-1] for path in whole(fresh)) == ["1", "3", "4"]
    run.save(5)
    assert main(arguments) == 0
    assert sorted(path[-1] for path in whole(fresh)) == ["4", "5"]
    run.close()


def test_prune_stops_when_a_new_attempt_begins_meanwhile(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with solo_run(fresh, CheckpointPolicy(keep_last=9)) as run:
        for step in (3, 4, 5):
            run.save(step)
    opened = open_pruning(Store(fresh), {"keep_last": 2, "keep_best": 0}, ())
    done = opened.carry_out(opened.foresee()[0])
    next(done)
    (fresh / "attempts" / "000099").touch()
    with pytest.raises(Exception, match="A new attempt of the run began"):
        next(done)
    assert len(whole(fresh)) == 4


def begin_attempt(root: Path) -> None:
    """As an attempt does first of all; that it says who it is comes next."""
    (root / "attempts" / "000002").touch()


PRUNE_ALL_BUT_ONE = ("--keep-last", "1", "--keep-best", "0", "--yes")


@pytest.mark.parametrize("says_who_it_is", [False, True])
def test_prune_gives_nothing_up_when_an_attempt_begins_while_it_looks_around(
    says_who_it_is: bool, fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = whole(fresh)

    def measure_slowly(*arguments: Any) -> Any:
        if says_who_it_is:
            runs.append(SoloRun(Store(fresh)).open())
        else:
            begin_attempt(fresh)
        return measure(*arguments)

    runs: list[SoloRun] = []
    monkeypatch.setattr(pruning, "measure", measure_slowly)
    assert main(["prune", str(fresh), *PRUNE_ALL_BUT_ONE]) == 1
    assert "Attempt 2 is starting in" in capsys.readouterr().err
    assert whole(fresh) == before
    assert all(run.close() == [] for run in runs)


def test_prune_stops_before_an_attempt_that_has_not_said_yet_who_it_is(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_attempt(fresh)
    assert main(["prune", str(fresh), *PRUNE_ALL_BUT_ONE]) == 1
    told = capsys.readouterr().err
    assert "Attempt 2 is starting in" in told
    assert f"remove {fresh}/attempts/000002" in told
    assert len(whole(fresh)) == 2
    (fresh / "attempts" / "000002").unlink()  # as the message says, of one that died in that moment
    assert main(["prune", str(fresh), *PRUNE_ALL_BUT_ONE]) == 0
    assert len(whole(fresh)) == 1


def test_a_checkpoint_is_put_back_when_an_attempt_begins_while_it_is_being_deleted(fresh: Path) -> None:
    before = whole(fresh)
    store = Store(fresh, observer=at("rename", "step-00000001", lambda: begin_attempt(fresh)))
    opened = open_pruning(store, {"keep_last": 1, "keep_best": 0}, ())
    with pytest.raises(RunInUseError, match="A new attempt of the run began"):
        list(opened.carry_out(opened.foresee()[0]))
    assert newest_attempt(Store(fresh)) == 2, "it did begin"
    assert whole(fresh) == before


def test_a_run_that_was_unpacked_and_never_begun_is_pruned(fresh: Path) -> None:
    """Nobody has said who holds it, though it has the number of an attempt."""
    (fresh / "attempts" / "owner.json").unlink()
    assert main(["prune", str(fresh), *PRUNE_ALL_BUT_ONE]) == 0
    assert len(whole(fresh)) == 1


def test_what_is_unknown_in_a_stripped_folder_is_left_alone(fresh: Path) -> None:
    assert strip_first(Store(fresh))
    (fresh / FIRST / "notes.txt").write_text("mine")
    (fresh / FIRST / OPTIMIZER).write_text("left by a kill")
    sweep(Store(fresh), FIRST, manifest_of(fresh, FIRST))
    assert (fresh / FIRST / "notes.txt").exists()
    assert not (fresh / FIRST / OPTIMIZER).exists()


def test_an_attempt_that_was_killed_before_its_retention_makes_room_at_the_start(fresh: Path) -> None:
    with solo_run(fresh, CheckpointPolicy(keep_last=9)) as run:
        run.save(3)
        run.save(4)
    size = sum(path.stat().st_size for path in (fresh / CHECKPOINTS / "step-00000004").iterdir())
    policy = CheckpointPolicy(keep_last=9, keep_best=0, max_bytes=4 * size + size // 2)
    run = SoloRun(Store(fresh), policy).open()
    run.checkpointer.settle_branch()
    run.checkpointer.wait()
    events = run.checkpointer.poll()
    assert [one.path[-1] for one in events if isinstance(one, Pruned)] == ["1"]
    assert Store(fresh).tree_bytes() + size <= 4 * size + size // 2
    run.close()
