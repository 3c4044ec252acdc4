"""Machines that die, come back, and lose their network, under the launchers that people use on several machines.

Each host is a network namespace (`tests/support/hosts.py`). A world that changes leaves the order of samples, the
global batch and the learning rates as they are: each sample is used once an epoch, whatever happened.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support.background import Background
from tests.support.hosts import Host, Network, why_not
from tests.support.launch import ROOT, run_command
from tests.support.specimen import NUM_SAMPLES
from tests.support.twins import consumed_samples

WHY_NOT = why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are hosts")]
SPECIMEN = str(ROOT / "tests/support/specimen.py")
EPOCHS = 8
# A host is taken for dead after 5 s without a word, and a round of fewer hosts than there could be begins after 3 s.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=3"
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PATIENCE = {"DIST_TRAIN_HOST_PATIENCE": "5", "DIST_TRAIN_OWNER_PATIENCE": "4"}


def torchrun(nodes: str, rendezvous: Host) -> list[str]:
    flags = ["--nnodes", nodes, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    flags += ["--rdzv-id", "job", "--rdzv-endpoint", f"{rendezvous.name}:29400", "--rdzv-conf", QUICK]
    return [sys.executable, "-m", "torch.distributed.run", *flags]


class Fleet:
    """One training run, started by the same command on every host of a network."""

    def __init__(self, folder: Path, stack: ExitStack, launcher: list[str], *options: str) -> None:
        self.run_dir = folder / "run"
        self.samples = folder / "samples"
        self._folder = folder
        self._stack = stack
        self._pace = folder / "pace"
        self.set_pace(0.05)
        script = [SPECIMEN, "--run-dir", str(self.run_dir), "--samples", str(self.samples), "--pace", str(self._pace)]
        self._command = [*launcher, *script, "--loop", "own", "--plain", "--epochs", str(EPOCHS), *options]
        self._launches = 0

    def set_pace(self, seconds: float) -> None:
        """How long each micro-step lasts from now on."""
        draft = self._pace.with_suffix(".new")
        draft.write_text(str(seconds))
        draft.replace(self._pace)

    def start(self, host: Host, extra: Mapping[str, str] | None = None) -> Background:
        self._launches += 1
        log = self._folder / f"{host.name}-{self._launches}.log"
        return self._stack.enter_context(host.start(self._command, log, {**OWN_STORE, **PATIENCE, **(extra or {})}))

    def events(self, *names: str) -> list[dict[str, Any]]:
        """In the order in which they were written down."""
        path = self.run_dir / "run.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [event for event in map(json.loads, filter(_is_whole, lines)) if not names or event["event"] in names]

    @property
    def attempt(self) -> int:
        return max((event["attempt"] for event in self.events()), default=0)

    def ranks(self, attempt: int) -> int:
        """How many ranks have trained in an attempt."""
        return len(list(self.samples.glob(f"a{attempt:06d}-r*.jsonl")))

    def trains_on(self, world_size: int, *, after: int = 0) -> Callable[[], bool]:
        """For `Background.wait_until`: a later attempt than `after` has made updates on so many ranks."""

        def happened() -> bool:
            attempt = self.attempt
            if attempt <= after or self.ranks(attempt) != world_size:
                return False
            recorded = (self.samples / f"a{attempt:06d}-r0.jsonl").read_text().splitlines(keepends=True)
            steps = {json.loads(line)["step"] for line in filter(_is_whole, recorded)}
            return len(steps) > 2

        return happened

    def require_each_sample_once(self) -> None:
        consumed = consumed_samples(self.run_dir, self.samples)
        assert consumed == {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}


def _is_whole(line: str) -> bool:
    return line.endswith("\n")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The history of a run on one rank that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    options = ["--loop", "own", "--plain", "--epochs", str(EPOCHS), "--run-dir", str(run_dir)]
    run_command([sys.executable, SPECIMEN, *options], deadline_seconds=120).require_success()
    return read_metrics(Store(run_dir))


def require_same_curves(run_dir: Path, twin: list[dict[str, Any]]) -> None:
    """Updates and learning rates equal, losses to the order of summation."""
    ours = read_metrics(Store(run_dir))
    assert [(record["global_step"], record.get("lr")) for record in ours] == [
        (record["global_step"], record.get("lr")) for record in twin
    ]
    for mine, other in zip(ours, twin, strict=True):
        key = "loss" if mine["kind"] == "step" else "train_loss"
        assert mine[key] == pytest.approx(other[key], rel=1e-5)


def test_a_killed_host_is_left_behind_and_is_taken_in_when_it_returns(
    tmp_path: Path, stack: ExitStack, twin: list[dict[str, Any]]
) -> None:
    network = stack.enter_context(Network(2, tmp_path))
    stays, leaves = network.hosts
    fleet = Fleet(tmp_path, stack, torchrun("1:2", stays))
    launch = fleet.start(stays)
    fleet.start(leaves)
    launch.wait_until(fleet.trains_on(2), "training on two hosts")
    both = fleet.attempt
    leaves.kill()
    fleet.set_pace(0.3)
    launch.wait_until(fleet.trains_on(1, after=both), "training on the host that is left")
    alone = fleet.attempt
    leaves.boot()
    returned = fleet.start(leaves)
    launch.wait_until(fleet.trains_on(2, after=alone), "training on two hosts again")
    fleet.set_pace(0.0)
    launch.wait(60).require_success()
    returned.wait(60).require_success()
    fleet.require_each_sample_once()
    require_same_curves(fleet.run_dir, twin)
