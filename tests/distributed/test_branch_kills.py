"""A branch with another learning rate, killed again and again, equals the branch that was never killed, bit for bit;
and the run that it left is all still there.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_train.history import read_metrics
from tests.support.chaos import ChaosPlan
from tests.support.damage import contents, copy_run, events
from tests.support.launch import ROOT, run_again_until_done, run_command, torchrun
from tests.support.twins import assert_same_run

SPECIMEN = str(ROOT / "tests/support/specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0
KILLS = 5


@dataclass(frozen=True)
class Case:
    world_size: int
    loop: str
    epochs: int
    branch_epoch: int
    seed: int

    def command(self, run_dir: Path, *options: str, script: tuple[str, ...] = (SPECIMEN,)) -> list[str]:
        told = ["--loop", self.loop, "--epochs", str(self.epochs), "--run-dir", str(run_dir), "--keep-last", "60"]
        told += options
        arguments = [*script, *told]
        return [sys.executable, *arguments] if self.world_size == 1 else torchrun(self.world_size, *arguments)


def manifests(run_dir: Path) -> dict[str, str]:
    """Digest of each committed manifest -> digest of all bytes of its folder, wherever the folder lies now."""
    found = {}
    for path in sorted((run_dir / "checkpoints").rglob("manifest.json")):
        found[json.loads(path.read_text())["digest"]] = str(contents(path.parent))
    return found


def check(case: Case, folder: Path) -> ChaosPlan:
    original, whole, killed = folder / "original", folder / "whole", folder / "killed"
    run_command(case.command(original), deadline_seconds=LIFE_SECONDS).require_success()
    before = manifests(original)
    assert len(before) >= 3
    copy_run(original, whole)
    copy_run(original, killed)
    asked = ["--resume", f"epoch:{case.branch_epoch}", "--lr", "0.003"]
    run_command(case.command(whole, *asked), deadline_seconds=LIFE_SECONDS).require_success()
    plan = ChaosPlan(str(folder / "chaos"), seed=case.seed, kills=KILLS, most_micro_steps=20, most_operations=30)
    command = case.command(killed, *asked, script=(CHAOS, SPECIMEN))
    deadline = LIFE_SECONDS * (KILLS + 1)
    run_again_until_done(command, deadline_seconds=deadline, extra=plan.to_environment())
    assert len(plan.fired()) == KILLS
    assert_same_run(whole, killed)
    for run_dir in (whole, killed):
        after = manifests(run_dir)
        assert {digest: after.get(digest) for digest in before} == before, "the original run's checkpoints"
        assert any((run_dir / "checkpoints" / "abandoned").glob("a*/step-*")), "none was newer than the branch"
    (started,) = events(killed, "branched")
    assert started["global_step"] == case.branch_epoch * 7
    changes = [event["changes"] for event in events(killed, "resumed")]
    assert changes[0]["optimizer[0].lr"] == [0.01, 0.003]
    assert all(one in ({}, changes[0]) for one in changes), "the branch's own checkpoints have the new rate"
    rates = [record["lr"] for record in read_metrics(killed) if record["kind"] == "step"]
    assert len(rates) == case.epochs * 7
    assert rates[case.branch_epoch * 7 :] == [
        0.003 * min(1.0, update / 20) for update in range(case.branch_epoch * 7 + 1, case.epochs * 7 + 1)
    ]
    return plan


@pytest.mark.distributed
def test_a_branch_killed_five_times_equals_the_unkilled_one_and_loses_nothing(tmp_path: Path) -> None:
    plan = check(Case(world_size=1, loop="own", epochs=4, branch_epoch=2, seed=3), tmp_path)
    assert any(note["inside_save"] for note in plan.fired())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loop", ["trainer", "own"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_branch_of_several_ranks_killed_five_times_equals_the_unkilled_one(
    world_size: int, loop: str, tmp_path: Path
) -> None:
    check(Case(world_size=world_size, loop=loop, epochs=14, branch_epoch=10, seed=world_size), tmp_path)
