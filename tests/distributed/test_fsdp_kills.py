"""Law 4 for sharded models: kill any rank at any moment, run the same command, and get the run that never died, bit for
bit; and that one equals a loop with torch's `fully_shard` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from dist_train.data import data_loader
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_script
from tests.support.fsdp_specimen import ACCUMULATION, EPOCHS, GLOBAL_BATCH, NUM_SAMPLES, SEED
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.specimen import Augmented
from tests.support.twins import assert_same_as_bare, assert_same_run, consumed_samples

SPECIMEN = str(ROOT / "tests/support/fsdp_specimen.py")
BARE = str(ROOT / "tests/support/fsdp_bare.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    world_size: int
    loop: str
    kills: int
    sharding: str = "fsdp"
    precision: str = "no"
    epochs: int = EPOCHS
    """Long enough for all the kills to come."""

    @property
    def options(self) -> list[str]:
        hosts = ["--hosts", "2"] if self.sharding == "hsdp" else []
        precision = ["--mixed-precision", self.precision]
        return ["--loop", self.loop, "--sharding", self.sharding, *hosts, *precision, "--epochs", str(self.epochs)]

    def __str__(self) -> str:
        return f"{self.world_size}-ranks-{self.loop}-{self.sharding}-{self.precision}"


def train_uninterrupted(case: Case, folder: Path) -> Path:
    run_script(case.world_size, SPECIMEN, *case.options, "--run-dir", str(folder), deadline_seconds=LIFE_SECONDS)
    return folder


def kill_and_resume(case: Case, folder: Path) -> Path:
    plan = ChaosPlan(
        str(folder / "chaos"), crc32(str(case).encode()), case.kills, most_micro_steps=18, most_operations=50
    )
    arguments = [CHAOS, SPECIMEN, *case.options, "--run-dir", str(folder / "run"), "--samples", str(folder / "used")]
    command = torchrun(case.world_size, *arguments, max_restarts=case.kills + 2)
    deadline = LIFE_SECONDS * (case.kills + 1)
    run_command(command, deadline_seconds=deadline, extra=plan.to_environment()).require_success()
    assert len(plan.fired()) == case.kills
    return folder / "run"


def check(case: Case, folder: Path) -> None:
    twin = train_uninterrupted(case, folder / "twin")
    if case.sharding == "fsdp" and case.precision == "no":
        assert_same_as_bare(twin, train_bare(case, folder))
    run_dir = kill_and_resume(case, folder)
    assert_same_run(twin, run_dir)
    each_once = {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(case.epochs)}
    assert consumed_samples(run_dir, folder / "used") == each_once


@pytest.mark.parametrize("case", [Case(2, "trainer", kills=2), Case(2, "own", kills=1)], ids=str)
def test_a_killed_sharded_run_equals_the_run_that_never_died_and_the_bare_loop(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, "trainer", kills=6, epochs=12),
        Case(2, "own", kills=6, epochs=12),
        Case(2, "trainer", kills=3, precision="bf16", epochs=7),
        Case(2, "own", kills=3, precision="bf16", epochs=7),
        Case(3, "trainer", kills=3, epochs=7),
        Case(4, "trainer", kills=5, epochs=10),
        Case(4, "own", kills=5, epochs=10),
        Case(4, "trainer", kills=4, sharding="hsdp", epochs=8),
    ],
    ids=str,
)
def test_a_sharded_run_killed_again_and_again_equals_the_run_that_never_died(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def train_bare(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Writes the micro-batches of every rank to files and trains on them without the library."""
    for rank in range(case.world_size):
        torch.save(list(epochs_of_rank(case, rank)), folder / f"rank-{rank}.pt")
    arguments = ["--batches", str(folder), "--out", str(folder / "bare"), *["--sync-each"] * (case.loop == "trainer")]
    run_script(case.world_size, BARE, *arguments, deadline_seconds=LIFE_SECONDS)
    return [torch.load(folder / f"bare-{rank}.pt", weights_only=True) for rank in range(case.world_size)]


def epochs_of_rank(case: Case, rank: int) -> Any:
    loader: Any = data_loader(
        Augmented(NUM_SAMPLES),
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH // (ACCUMULATION * case.world_size),
        seed=SEED,
        rank=rank,
        world_size=case.world_size,
    )
    for epoch in range(case.epochs):
        loader.batch_sampler.set_position(epoch=epoch)
        plans = [loader.batch_sampler.layout.micro_batch(i, rank) for i in range(len(loader.batch_sampler))]
        yield [(batch, plan.weight, plan.ends_window) for batch, plan in zip(loader, plans, strict=True)]
