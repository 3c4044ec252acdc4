"""Ten minutes under `dist-train launch` with a kill every 20 s: nothing is lost, goodput is told, nothing leaks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.background import Background
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.soak import Soak, soak
from tests.support.soaked import useful_seconds
from tests.support.specimen import NUM_SAMPLES
from tests.support.twins import assert_same_run, consumed_samples

SPECIMEN = str(ROOT / "tests/support/specimen.py")
SOAKED = str(ROOT / "tests/support/soaked.py")
RANKS = 2
KILL_SECONDS = 20.0
EPOCHS = 500
"""Of 28 micro-steps: ten minutes with the pause, on a quiet machine."""
PAUSE_SECONDS = 0.03
HELD = ("resident", "descriptors", "processes", "shared_memory")
OPTIONS = ["--loop", "own", "--workers", "1", "--every-steps", "21"]


def soak_and_compare(folder: Path, epochs: int, deadline_seconds: float) -> tuple[Soak, dict[str, float]]:
    """Trains a twin without a kill, then under kills; what must be equal is, and the figures are returned."""
    twin, run_dir, account, samples = (folder / name for name in ("twin", "run", "account", "samples"))
    options = [*OPTIONS, "--epochs", str(epochs)]
    command = torchrun(RANKS, SPECIMEN, *options, "--run-dir", str(twin))
    run_command(command, deadline_seconds=deadline_seconds).require_success()
    script = [SOAKED, str(account), *options, "--run-dir", str(run_dir), "--samples", str(samples)]
    launcher = [sys.executable, "-m", "dist_train.cli", "launch", "--nproc-per-node", str(RANKS)]
    command = [*launcher, "--give-up-after", "8", "--max-restarts", "8", *script, "--pause", str(PAUSE_SECONDS)]
    with Background(command, folder / "log") as launch:
        soaked = soak(
            launch, account, ranks=RANKS, every_seconds=KILL_SECONDS, seed=4, deadline_seconds=deadline_seconds
        )
        launch.wait(60).require_success()
        assert soaked.survivors() == [], "no process outlives the launcher"
        summary = next(line for line in launch.output.splitlines() if "goodput" in line)
    assert_same_run(twin, run_dir)
    counts = consumed_samples(run_dir, samples)
    assert counts == {epoch: Counter(range(NUM_SAMPLES)) for epoch in range(epochs)}, "each sample once an epoch"
    return soaked, figures_of(run_dir, account, soaked, summary)


def figures_of(run_dir: Path, account: Path, soaked: Soak, summary: str) -> dict[str, float]:
    """What the report and the launcher say, and what this test has measured beside them."""
    told = run_command([sys.executable, "-m", "dist_train.cli", "report", str(run_dir), "--json"], deadline_seconds=60)
    report = json.loads(told.require_success().output)
    buckets, attempts = report["buckets"], report["attempts"]
    assert round(sum(buckets.values()) * 1e6) == round(report["seconds"] * 1e6), "the buckets add up"
    chain = {one["attempt"]: one for one in attempts if one["resumed_step"] is not None}
    kept, limit = {}, sys.maxsize
    for number in sorted(chain, reverse=True):
        kept[number] = limit
        limit = min(limit, chain[number]["resumed_step"])
    useful = useful_seconds(account, kept)
    overhead = sum(seconds for name, seconds in buckets.items() if name != "productive")
    return {
        "kills": len(soaked.kills),
        "attempts": len(attempts),
        "seconds": report["seconds"],
        "seconds_outside": soaked.worked_seconds,
        "goodput": report["goodput"],
        "goodput_of_buckets": 1 - overhead / report["seconds"],
        "goodput_by_the_script": useful / report["seconds"],
        "goodput_in_summary": float(summary.split("goodput ")[1].split("%")[0]) / 100,
        "lost_steps": report["lost_steps"],
        **{f"share_{name}": share for name, share in report["shares"].items()},
        **{f"{name}_{quarter}": soaked.quarter(quarter, name) for name in HELD for quarter in (1, 3)},
    }


def require_goodput(figures: dict[str, float]) -> None:
    """What is reported is within 2 % of what the buckets say, of the script's own clock and of the time outside."""
    expected = pytest.approx(figures["goodput"], rel=0.02)
    assert figures["goodput_of_buckets"] == expected, figures
    assert figures["goodput_in_summary"] == expected, figures
    assert figures["goodput_by_the_script"] == expected, figures
    assert figures["seconds"] == pytest.approx(figures["seconds_outside"], rel=0.02, abs=6.0), figures


def require_no_leak(figures: dict[str, float]) -> None:
    """What is held in the last quarter is what was held in the second one."""
    assert figures["resident_3"] <= figures["resident_1"] + (8 << 20), figures
    assert figures["descriptors_3"] <= figures["descriptors_1"] + 2, figures
    assert figures["processes_3"] <= figures["processes_1"] + 1, figures
    assert figures["shared_memory_3"] <= figures["shared_memory_1"] + 2, figures


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_ten_minutes_of_kills_lose_nothing_and_leak_nothing(tmp_path: Path) -> None:
    soaked, figures = soak_and_compare(tmp_path, EPOCHS, deadline_seconds=2400)
    assert len(soaked.kills) >= soaked.seconds / KILL_SECONDS / 2, soaked.kills
    require_goodput(figures)
    require_no_leak(figures)
