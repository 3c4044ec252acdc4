"""Law 4: kill any process at any moment, run the same command, and get the run that never died, bit for bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from dist_train.data import data_loader
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.launch import ROOT, run_again_until_done, run_command, torchrun
from tests.support.specimen import ACCUMULATION, EPOCHS, GLOBAL_BATCH, NUM_SAMPLES, SEED, Augmented
from tests.support.twins import assert_same_as_bare, assert_same_run, consumed_samples

SPECIMEN = str(ROOT / "tests/support/specimen.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
BARE = str(ROOT / "tests/support/bare_loop.py")
LIFE_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One line of the matrix."""

    world_size: int
    loop: str
    precision: str
    workers: int
    elastic: bool
    """Restarted by torchrun; by hand otherwise."""
    kills: int

    @property
    def options(self) -> list[str]:
        return ["--loop", self.loop, "--mixed-precision", self.precision, "--workers", str(self.workers)]

    def __str__(self) -> str:
        how = "torchrun" if self.elastic else "by-hand"
        return f"{self.world_size}-ranks-{self.loop}-{self.precision}-{self.workers}-workers-{how}"


def matrix(world_size: int) -> list[Case]:
    """Both loops, both precisions, both numbers of workers, both ways to restart; 20 kills in all."""
    return [
        Case(world_size, "trainer", "no", 0, elastic=True, kills=5),
        Case(world_size, "own", "bf16", 0, elastic=False, kills=5),
        Case(world_size, "trainer", "bf16", 2, elastic=False, kills=5),
        Case(world_size, "own", "no", 2, elastic=True, kills=5),
    ]


QUICK = [
    Case(1, "trainer", "bf16", 0, elastic=False, kills=2),
    Case(2, "own", "no", 2, elastic=True, kills=3),
    Case(3, "trainer", "no", 0, elastic=True, kills=2),
]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs by (world size, loop, precision), each trained once, and proved equal to the bare loop."""
    known: dict[tuple[int, str, str], Path] = {}

    def find(case: Case) -> Path:
        key = (case.world_size, case.loop, case.precision)
        if key not in known:
            known[key] = train_uninterrupted(case, tmp_path_factory.mktemp("twin"))
        return known[key]

    return find


def train_uninterrupted(case: Case, folder: Path) -> Path:
    run_dir = folder / "run"
    options = ["--loop", case.loop, "--mixed-precision", case.precision, "--run-dir", str(run_dir)]
    run_script(case.world_size, SPECIMEN, *options, deadline_seconds=LIFE_SECONDS)
    assert_same_as_bare(run_dir, train_bare(case, folder))
    return run_dir


def train_bare(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Writes the micro-batches of every rank to files and trains on them without the library."""
    for rank in range(case.world_size):
        torch.save(list(epochs_of_rank(case.world_size, rank)), folder / f"rank-{rank}.pt")
    arguments = ["--batches", str(folder), "--out", str(folder / "bare"), "--mixed-precision", case.precision]
    run_command(torchrun(case.world_size, BARE, *arguments), deadline_seconds=LIFE_SECONDS).require_success()
    return [torch.load(folder / f"bare-{rank}.pt", weights_only=True) for rank in range(case.world_size)]


def epochs_of_rank(world_size: int, rank: int) -> Any:
    micro_batch_size = GLOBAL_BATCH // (ACCUMULATION * world_size)
    loader: Any = data_loader(
        Augmented(),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch_size,
        seed=SEED,
        rank=rank,
        world_size=world_size,
    )
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_position(epoch=epoch)
        plans = [loader.batch_sampler.layout.micro_batch(i, rank) for i in range(len(loader.batch_sampler))]
        yield [(batch, plan.weight, plan.ends_window) for batch, plan in zip(loader, plans, strict=True)]


def kill_and_resume(case: Case, folder: Path) -> tuple[Path, ChaosPlan]:
    run_dir, plan = folder / "run", ChaosPlan(str(folder / "chaos"), seed=crc32(str(case).encode()), kills=case.kills)
    arguments = [CHAOS, SPECIMEN, *case.options, "--run-dir", str(run_dir), "--samples", str(folder / "samples")]
    extra = plan.to_environment()
    deadline = LIFE_SECONDS * (case.kills + 1)
    if case.elastic:
        command = torchrun(case.world_size, *arguments, max_restarts=case.kills + 2)
        run_command(command, deadline_seconds=deadline, extra=extra).require_success()
    else:
        plain = [sys.executable, *arguments]
        command = plain if case.world_size == 1 else torchrun(case.world_size, *arguments)
        run_again_until_done(command, deadline_seconds=deadline, extra=extra)
    return run_dir, plan


def check(case: Case, folder: Path, twins: Any) -> ChaosPlan:
    run_dir, plan = kill_and_resume(case, folder)
    assert len(plan.fired()) == case.kills
    assert_same_run(twins(case), run_dir)
    consumed = consumed_samples(run_dir, folder / "samples")
    assert consumed == {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}
    return plan


@pytest.mark.distributed
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_killed_run_equals_the_run_that_never_died(case: Case, tmp_path: Path, twins: Any) -> None:
    check(case, tmp_path, twins)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_twenty_kills_of_which_five_are_inside_a_save(world_size: int, tmp_path: Path, twins: Any) -> None:
    fired = []
    for case in matrix(world_size):
        fired += check(case, tmp_path / str(case), twins).fired()
    assert len(fired) >= 20
    assert len([note for note in fired if note["inside_save"]]) >= 5
    assert {note["everyone"] for note in fired} == {True, False}
