"""Law 9: an error at any single change of a save, commit or retention costs that save at most."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from dist_train.checkpoint import ownership
from dist_train.checkpoint.manifest import CHECKPOINTS, SAVING_PREFIX
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.errors import RunInUseError, SaveFailedError
from tests.support.faults import FaultPlan
from tests.support.saving_run import SoloRun, commits, failures, listed, pruned, solo_run, whole

ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO]


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat in between would shift the numbers of the operations."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600.0)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 1 and 2; the third save prunes the first."""
    root = tmp_path_factory.mktemp("origin") / "run"
    with solo_run(root) as run:
        run.note("history")
        run.save(1)
        run.save(2)
    return root


@pytest.fixture
def fresh(two_saves: Path, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    shutil.copytree(two_saves, root, symlinks=True)
    return root


def operations_of_a_save(root: Path) -> list[Operation]:
    """Every change of the save of step 3, retention included."""
    plan = FaultPlan(armed=False)
    run = SoloRun(Store(root, observer=plan)).open()
    plan.log.clear()
    events = run.save(3)
    run.checkpointer.wait()
    log = list(plan.log)
    run.close()
    assert len(commits(events)) == 1
    assert pruned(events), "retention must be part of it"
    return log


def problems_after(root: Path, plan: FaultPlan, *, same_step: bool) -> list[str]:
    """What is wrong after a save of step 3 under a fault; the law says nothing."""
    problems: list[str] = []

    def require(holds: object, what: str) -> None:
        if not holds:
            problems.append(what)

    plan.disarm()
    run = SoloRun(Store(root, observer=plan)).open()
    before = whole(root)
    plan.armed, plan.seen = True, 0
    plan.log.clear()
    events = run.save(3)
    plan.disarm()
    done, failed = commits(events), failures(events)
    require(plan.fired, "the fault did not fire")
    require(len(done) + len(failed) == 1, f"told {events}")
    require(all(one.global_step == 3 for one in failed), f"told {failed}")
    out_of_space = plan.errno in (errno.ENOSPC, errno.EDQUOT)
    require(all(one.out_of_space == out_of_space for one in failed), f"not told as out of space: {failed}")
    require(all("space" in one.message for one in failed) or not out_of_space, "space is not mentioned")
    require(not run.checkpointer.must_end, "training would end")
    verifying = whole(root)
    require(listed(root).keys() == verifying.keys(), f"listed and torn: {listed(root).keys() - verifying.keys()}")
    lost = before.keys() - verifying.keys() - (set() if failed else {min(before)})
    require(not lost, f"older checkpoints were lost: {lost}")
    require(all(one.path in verifying for one in done), "what was told committed does not verify")
    untold = [path for path in pruned(events) if (root / path).exists()]
    require(not untold, f"told as pruned, and still there: {untold}")
    step = 3 if same_step and failed else 4
    again = run.save(step)
    require(len(commits(again)) == 1 and not failures(again), f"the next save of step {step} failed: {failures(again)}")
    require(run.checkpointer.committed_step == step, "the newest is not the newest")
    run.close()
    require(all(path in whole(root) for path in (one.path for one in commits(again))), "the next does not verify")
    require(not [name for name in Store(root).list(CHECKPOINTS) if name.startswith(SAVING_PREFIX)], "staging is left")
    return problems


def faults_of(root: Path, code: int, stage: str, *, lasting: bool) -> list[str]:
    """What is wrong after a fault at each operation of one stage in turn."""
    stages = [stage_of(*one) for one in enumerate(operations_of_a_save(copy_of(root, "dry")))]
    assert len(stages) > 25
    assert set(stages) == set(STAGES)
    report = []
    for index in [index for index, name in enumerate(stages) if name == stage]:
        here = copy_of(root, "try")
        plan = FaultPlan(nth=index, errno=code, lasting=lasting)
        problems = problems_after(here, plan, same_step=True)
        where = plan.log[index] if index < len(plan.log) else "nothing"
        report += [f"operation {index} ({where}): {problem}" for problem in problems]
    return report


STAGES = ["begin", "write and publish", "links", "prune"]


def stage_of(index: int, operation: Operation) -> str:
    """The main thread makes the staging folder and syncs its name; all else is the writer's."""
    if index < 2:
        return "begin"
    if "latest" in operation.path:
        return "links"
    return "prune" if "step-00000001" in operation.path else "write and publish"


def copy_of(root: Path, name: str) -> Path:
    target = root.with_name(name)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root, target, symlinks=True)
    return target


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_an_error_at_any_operation_costs_one_save_at_most(fresh: Path, code: int, stage: str) -> None:
    report = faults_of(fresh, code, stage, lasting=False)
    assert not report, "\n".join(report)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", ERRORS, ids=lambda code: errno.errorcode[code])
def test_a_disk_that_fails_from_any_operation_on_costs_one_save_at_most(fresh: Path, code: int, stage: str) -> None:
    report = faults_of(fresh, code, stage, lasting=True)
    assert not report, "\n".join(report)


# The page cache after a failed fsync


@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_a_file_whose_fsync_failed_is_written_again_and_never_just_synced_again(fresh: Path, group: str) -> None:
    def is_shard(operation: Operation) -> bool:
        return f"/{group}-" in operation.path

    plan = FaultPlan(kind="fsync", errno=errno.EIO, matches=is_shard)
    with solo_run(fresh, store=lambda root: Store(root, observer=plan)) as run:
        events = run.save(3)
        assert plan.fired == 1
        assert commits(events)
    shard = [operation.kind for operation in plan.log if is_shard(operation) and SAVING_PREFIX in operation.path]
    writing = ["create", "write", "truncate", "fsync"]
    assert shard == [*writing, "unlink", *writing]
    assert set(whole(fresh)) == set(listed(fresh))


def test_no_file_is_ever_synced_twice_without_being_written_in_between(fresh: Path) -> None:
    for nth in range(6):
        plan = FaultPlan(kind="fsync", nth=nth, errno=errno.EIO, armed=False)
        with solo_run(copy_of(fresh, "try"), store=lambda root, plan=plan: Store(root, observer=plan)) as run:
            plan.armed = True
            run.save(3)
            run.save(4)
            assert plan.fired == 1
        last: dict[str, str] = {}
        for operation in plan.log:
            if operation.kind == "fsync" and not operation.path.endswith(".jsonl"):
                assert last.get(operation.path) != "fsync", f"{operation.path} after fault {nth}"
            if operation.kind in ("create", "write", "fsync"):
                last[operation.path] = operation.kind


def test_a_file_that_cannot_be_synced_twice_gives_the_save_up(fresh: Path) -> None:
    plan = FaultPlan(kind="fsync", errno=errno.EIO, lasting=True, matches=lambda operation: "/model-" in operation.path)
    with solo_run(fresh, store=lambda root: Store(root, observer=plan)) as run:
        (failed,) = failures(run.save(3))
        assert plan.fired == 2
        assert "Input/output error" in failed.message
        plan.disarm()
        assert commits(run.save(3))


# Failures in a row


def test_training_ends_only_after_the_allowed_failures_in_a_row(fresh: Path) -> None:
    plan = FaultPlan(kind="create", errno=errno.ENOSPC, lasting=True, armed=False)
    policy = CheckpointPolicy(keep_last=2, max_failed_saves=2)
    with solo_run(fresh, policy, lambda root: Store(root, observer=plan)) as run:
        for step, fails in enumerate([True, True, False, True, True], start=3):
            plan.armed = fails
            assert bool(failures(run.save(step))) is fails
            run.checkpointer.require_healthy()
            assert not run.checkpointer.must_end
        plan.armed = True
        run.save(9)
        assert run.checkpointer.must_end
        with pytest.raises(SaveFailedError, match=r"3 saves failed in a row.*newest checkpoint is step 5"):
            run.checkpointer.require_healthy()
        plan.disarm()


def test_a_full_disk_is_seen_before_anything_is_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = FaultPlan(armed=False)
    with solo_run(fresh, store=lambda root: Store(root, observer=plan)) as run:
        plan.log.clear()
        with monkeypatch.context() as patch:
            patch.setattr(run.store, "free_bytes", lambda: 1000)
            (failed,) = failures(run.save(3))
        assert failed.out_of_space
        assert "it needs" in failed.message
        assert plan.log == []
        assert commits(run.save(3))


def test_a_lost_store_does_not_end_training(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network mount that went away answers every call, statvfs included, with ESTALE."""
    with solo_run(fresh) as run:

        def gone() -> int:
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(run.store, "free_bytes", gone)
            assert failures(run.save(3))
        assert commits(run.save(3))


# Somebody else


def test_a_zombie_s_commit_fails_and_leaves_the_new_attempt_alone(fresh: Path) -> None:
    zombie = SoloRun(Store(fresh)).open()
    newer = SoloRun(Store(fresh)).open()
    assert commits(newer.save(3))
    (failed,) = failures(zombie.save(3))
    assert isinstance(failed.fatal, RunInUseError)
    assert zombie.checkpointer.must_end
    with pytest.raises(RunInUseError):
        zombie.checkpointer.require_healthy()
    assert commits(newer.save(4))
    zombie.close()
    newer.close()
    assert [one.attempt for one in whole(fresh).values()] == [newer.checkpointer.attempt] * 2


def test_a_zombie_whose_staging_folder_was_thrown_away_cannot_commit(fresh: Path) -> None:
    """The new attempt comes between the shards and the commit."""
    taken: list[SoloRun] = []

    def take_over(operation: Operation) -> None:
        if operation.kind == "create" and "/optimizer-" in operation.path and not taken:
            taken.append(SoloRun(Store(fresh)))
            taken[0].open()

    zombie = SoloRun(Store(fresh, observer=take_over)).open()
    events = zombie.save(3)
    assert taken
    assert failures(events)
    assert not commits(events)
    zombie.close()
    assert commits(taken[0].save(3))
    taken[0].close()
    assert set(whole(fresh)) == set(listed(fresh))


def test_what_a_killed_attempt_left_behind_is_never_resumed_and_is_cleared(fresh: Path) -> None:
    newest = max(whole(fresh))
    torn = fresh / CHECKPOINTS / f"{SAVING_PREFIX}step-00000009-a000001"
    shutil.copytree(fresh / newest, torn)
    half = fresh / CHECKPOINTS / "step-00000007"
    half.mkdir()
    (half / "model-00001-of-00001.safetensors").write_bytes(b"x")
    with solo_run(fresh) as run:
        assert run.resumed is not None
        assert run.resumed.progress.global_step == 2
        assert not torn.exists()
        assert any("step-00000009" in problem for problem in run.checkpointer.problems)
        assert any("step-00000007" in problem for problem in run.checkpointer.problems)
        assert commits(run.save(7))
    assert not [name for name in Store(fresh).list(CHECKPOINTS) if name.startswith((SAVING_PREFIX, ".trash"))]


def test_a_corrupt_newest_checkpoint_gives_way_to_the_older_one(fresh: Path) -> None:
    newest = max(whole(fresh))
    shard = next((fresh / newest).glob("model-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with solo_run(fresh) as run:
        assert run.resumed is not None
        assert run.resumed.progress.global_step == 1
        assert commits(run.save(2)), "the same step can be committed again"
    assert any(name.startswith(".corrupt-") for name in Store(fresh).list(CHECKPOINTS))
