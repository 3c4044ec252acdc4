"""A plan of faults: what it says, how it travels, what counts as fired."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from dist_train.drill import Fault, FaultPlan, FaultsMissedError
from dist_train.drill.fault_plan import FIRED_LOG, VARIABLE
from dist_train.errors import ConfigError
from dist_train.phases import Phase, Point


def claim(plan: FaultPlan, fault: Fault, rank: int = 0) -> bool:
    return plan.claim(fault, rank=rank, attempt=2, global_step=7, phase="capture")


def full_plan(folder: Path) -> FaultPlan:
    return (
        FaultPlan(folder, seed=3)
        .kill(1, at_step=12)
        .stop("all", at_phase=Phase.CAPTURE, nth=2)
        .terminate("random", at_phase=Point.WRITING)
        .hang("all", at_step=3, seconds=5.0)
        .raise_error(0, at_step=4, message="of the script")
        .exit(0, at_phase="load", code=7)
        .fail_io(errno.ENOSPC, kind="write", path="checkpoints/", nth=3, times=2)
        .kill_data_worker(0, at_step=2)
        .corrupt_newest(at_step=9)
    )


def test_a_plan_comes_out_of_the_environment_as_it_went_in(tmp_path: Path) -> None:
    plan = full_plan(tmp_path / "faults")
    found = FaultPlan.from_environment(plan.environment())
    assert found is not None
    assert (found.folder, found.seed, found.faults) == (plan.folder, plan.seed, plan.faults)
    assert json.loads(plan.environment()[VARIABLE])["faults"][1]["at_phase"] == "capture"
    assert FaultPlan.from_environment({}) is None


def test_a_fault_fires_once_over_all_ranks_and_lives(tmp_path: Path) -> None:
    plan = full_plan(tmp_path)
    assert claim(plan, plan.faults[1], rank=1)
    assert not claim(plan, plan.faults[1], rank=0)
    assert not claim(FaultPlan.from_environment(plan.environment()) or plan, plan.faults[1], rank=1)
    (fired,) = plan.fired()
    assert (fired.kind, fired.rank, fired.attempt, fired.global_step, fired.phase) == ("stop", 1, 2, 7, "capture")


def test_what_each_rank_does_to_itself_fires_once_on_each(tmp_path: Path) -> None:
    plan = full_plan(tmp_path)
    assert [claim(plan, plan.faults[3], rank=rank) for rank in (0, 1, 0)] == [True, True, False]


def test_in_order_a_fault_waits_for_those_before_it(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path, in_order=True).kill(0, at_step=1).kill(0, at_step=1)
    found = FaultPlan.from_environment(plan.environment()) or plan
    assert [found.may_come(fault) for fault in found.faults] == [True, False]
    claim(plan, plan.faults[0])
    assert [found.may_come(fault) for fault in found.faults] == [True, True]
    assert FaultPlan(tmp_path).may_come(plan.faults[1])


def test_faults_that_never_came_are_named(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path).kill(1, at_step=12).exit(0, at_phase="load", code=7)
    claim(plan, plan.faults[0], rank=1)
    with pytest.raises(
        FaultsMissedError, match=r"1 of 2 faults never came: exit of rank 0 at load\..*kill on rank 1 at step 7"
    ):
        plan.require_all_fired()
    claim(plan, plan.faults[1])
    assert plan.require_all_fired().missed() == []


def test_a_note_that_was_torn_does_not_count(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path).kill(0, at_step=1).kill(0, at_step=2)
    claim(plan, plan.faults[0])
    with (tmp_path / FIRED_LOG).open("a") as file:
        file.write('{"number": 1, "ki')
    assert [one.number for one in plan.fired()] == [0]


def test_random_faults_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    plans = [
        FaultPlan(tmp_path, seed=seed).at_random(["kill", "terminate", "fail_io"], count=7, within_steps=30)
        for seed in (1, 1, 2)
    ]
    assert plans[0].faults == plans[1].faults != plans[2].faults
    kinds = [fault.kind for fault in plans[0].faults]
    assert [kinds.count(kind) for kind in ("kill", "terminate", "fail_io")] == [3, 2, 2]
    assert all(1 <= fault.at_step < 30 for fault in plans[0].faults)


def test_a_random_rank_is_one_and_the_same_everywhere(tmp_path: Path) -> None:
    plan = FaultPlan(tmp_path, seed=5)
    for _ in range(20):
        plan.kill("random", at_step=1)
    hit = [[rank for rank in range(4) if fault.concerns(rank, 4, plan.seed)] for fault in plan.faults]
    assert all(len(ranks) == 1 for ranks in hit)
    assert {ranks[0] for ranks in hit} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.kill(0, at_phase="sometime"), "at_phase is 'sometime'; there are start, rendezvous"),
        (lambda plan: plan.kill("some", at_step=1), "rank is 'some'; give a rank, 'all' or 'random'"),
        (lambda plan: plan.kill(0, at_step=1, nth=0), "nth counts from 1"),
        (lambda plan: plan.at_random(["kil"], count=1, within_steps=5), "There is no fault kil; there are kill"),
    ],
)
def test_what_can_never_come_is_refused(tmp_path: Path, call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(FaultPlan(tmp_path))  # type: ignore[operator]
