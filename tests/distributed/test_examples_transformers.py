"""The example with transformers: killed, it ends as the run that never died, and its folder is what others load."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dist_train.checkpoint.exchange import export_checkpoint
from dist_train.checkpoint.manifest import Manifest
from tests.support import hugging
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_ranks, run_script
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.twins import assert_same_run

SCRIPT = str(ROOT / "examples/transformers_finetune.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 240.0
SEED = 17
"""Kills one rank in the middle of a window of the last epoch."""

pytestmark = pytest.mark.distributed


def train_with_a_kill(folder: Path, *options: str) -> str:
    """On two ranks, beside a twin that is left alone; the run's directory."""
    told = ["--cpu", "--epochs", "3", "--kilobytes", "8", *options, "--run-dir"]
    twin, run_dir = str(folder / "twin"), str(folder / "run")
    run_script(2, SCRIPT, *told, twin, deadline_seconds=LIFE_SECONDS)
    plan = ChaosPlan(str(folder / "chaos"), seed=SEED, kills=1, most_micro_steps=12)
    killed = torchrun(2, CHAOS, SCRIPT, *told, run_dir, max_restarts=2)
    outcome = run_command(killed, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment()).require_success()
    assert len(plan.fired()) == 1
    assert "Resuming from" in outcome.output, f"{plan.fired()} came before the first checkpoint: take another seed"
    assert "Of the attached files" not in outcome.output, "the same script attaches the same bytes"
    assert "[transformers]" not in outcome.output, "nothing is left for transformers to guess and to warn of"
    assert_same_run(twin, run_dir)
    return run_dir


def test_killed_on_two_ranks_it_equals_the_run_that_never_died_and_its_folder_loads(tmp_path: Path) -> None:
    run_dir = train_with_a_kill(tmp_path)
    (text,) = run_ranks(hugging.load_example, 1, run_dir, f"{run_dir}/latest")
    assert text.startswith("import ")
    assert "'generated_text': 'import " in what_the_header_prints(f"{run_dir}/best")


def what_the_header_prints(folder: str) -> str:
    """The script's own line for a look at the model, as it stands there."""
    found = re.search(r'^    python -c "(.*?)"$', Path(SCRIPT).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    command = [sys.executable, "-c", found[1].replace("runs/gpt/best", folder)]
    return run_command(command, deadline_seconds=120).require_success().output


@pytest.mark.slow
def test_sharded_by_fsdp2_it_loads_after_an_export(tmp_path: Path) -> None:
    run_dir = train_with_a_kill(tmp_path, "--sharding", "fsdp", "--gradient-checkpointing")
    done = export_checkpoint(run_dir, "latest", str(tmp_path / "hf"), form="hf", max_shard_bytes=1_000_000)
    assert done.num_files > 2
    (text,) = run_ranks(hugging.load_example, 1, run_dir, done.path)
    assert text.startswith("import ")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_its_adapter_alone_loads_with_peft(sharding: str, tmp_path: Path) -> None:
    run_dir = train_with_a_kill(tmp_path, "--lora", "--sharding", sharding)
    done = export_checkpoint(run_dir, "latest", str(tmp_path / "adapter"), form="peft")
    assert done.num_bytes < 400_000
    saved = Manifest.from_json((Path(run_dir) / "latest/manifest.json").read_text())
    assert all("lora_" in name for name in saved.tensors if name.startswith("model/")), "the base is the script's"
    (text,) = run_ranks(hugging.load_example, 1, run_dir, done.path)
    assert text.startswith("import ")
