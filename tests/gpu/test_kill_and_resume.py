"""Law 4 on a GPU: killed at any moment and started again, a run ends bit for bit as the one that never died, with
deterministic algorithms on; and so it does in half precision, compiled, with kernels that keep their state on the
device, and after `fully_shard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tests.support.gpu import live, live_on, on_gpu
from tests.support.on_device import EPOCHS, NUM_SAMPLES, SCALE
from tests.support.twins import assert_same_run, consumed_samples, read_checkpoint

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    device: str
    loop: str
    precision: str = "no"
    optimizer: str = "adamw"
    compile: str = ""
    sharding: str = "none"
    kills: int = 1
    forks: bool = True

    @property
    def options(self) -> list[str]:
        found = ["--loop", self.loop, "--precision", self.precision, "--optimizer", self.optimizer]
        return [*found, "--compile", self.compile, "--sharding", self.sharding]

    def __str__(self) -> str:
        parts = [self.device, self.loop, self.precision, self.optimizer, self.compile, self.sharding]
        return "-".join(part for part in parts if part not in ("", "none"))


ON_CPU = [
    Case("cpu", "trainer"),
    Case("cpu", "trainer", "bf16", kills=2, forks=False),  # started as those on a GPU are
    Case("cpu", "accelerate", "bf16"),
    Case("cpu", "plain", "fp16"),
    Case("cpu", "plain", optimizer="fused"),
    Case("cpu", "plain", optimizer="foreach"),
    Case("cpu", "plain", compile="aot_eager"),
    Case("cpu", "sharded"),
]
ON_GPU = [
    Case("cuda", "trainer", kills=2),
    Case("cuda", "trainer", "bf16"),
    Case("cuda", "trainer", "fp16"),
    Case("cuda", "trainer", "bf16", sharding="fsdp"),
    Case("cuda", "accelerate", "bf16"),
    Case("cuda", "accelerate", "fp16", kills=2),
    Case("cuda", "plain", "fp16"),
    Case("cuda", "plain", optimizer="fused"),
    Case("cuda", "plain", optimizer="capturable"),
    Case("cuda", "plain", compile="inductor"),
    Case("cuda", "sharded"),
    Case("cuda", "sharded", "bf16", optimizer="fused"),
]
SLOW = [*ON_CPU[:3], *ON_CPU[4:]]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW), id=str(case)) for case in ON_CPU]
    + [on_gpu(case, id=str(case)) for case in ON_GPU],
)
def test_a_killed_run_equals_the_run_that_never_died(case: Case, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert live(case.device, [*case.options, "--run-dir", str(whole)])
    arguments = [*case.options, "--run-dir", str(killed), "--samples", str(tmp_path / "used")]
    live_on(case.device, arguments, tmp_path, kills=case.kills, seed=crc32(str(case).encode()), forks=case.forks)
    assert_same_run(whole, killed)
    each_once = {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}
    assert consumed_samples(killed, tmp_path / "used") == each_once
    manifest, _ = read_checkpoint(killed)
    require_of_device(case, manifest)


def require_of_device(case: Case, manifest: Any) -> None:
    """That the run was what the case says: on the device, with its generator, with loss scaling that had its say."""
    assert manifest.environment["deterministic"]
    assert (manifest.environment["device"] == "cpu") == (case.device == "cpu")
    assert all(("cuda" in row["rng"]) == (case.device == "cuda") for row in manifest.rank_state)
    if case.precision != "fp16":
        return
    scaler = manifest.state["scaler" if case.loop != "plain" else "user/scaler"]
    assert scaler["growth_interval"] == (SCALE["growth_interval"] if case.loop != "trainer" else 2000)
    if case.loop != "trainer":
        assert scaler["scale"] < SCALE["init_scale"], "no update was left out"
    if case.loop == "accelerate":
        assert manifest.progress.skipped_updates > 0
