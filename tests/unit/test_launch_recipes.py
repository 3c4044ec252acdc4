"""launch/: every file is one that its launcher accepts, and the README names them all."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from tests.support.launch import ROOT

LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
RECIPES = sorted((LAUNCH / "accelerate").glob("*.yaml"))
CLAIMED: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO", "num_processes": 1, "gpu_ids": "0"},
    "multi_gpu": {
        "distributed_type": "MULTI_GPU",
        "num_processes": 2,
        "main_process_port": 0,
        "rdzv_backend": "static",
    },
    "fsdp": {"distributed_type": "FSDP", "num_processes": 2, "main_process_port": 0, "mixed_precision": "bf16"},
    "cpu_2": {"distributed_type": "MULTI_GPU", "num_processes": 2, "main_process_port": 0, "use_cpu": False},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_accelerate_accepts_a_recipe_and_knows_each_of_its_keys(path: Path) -> None:
    loaded = load_config_from_file(str(path)).to_dict()
    for key, value in yaml.safe_load(path.read_text()).items():
        assert loaded[key] == value, f"{path.name}: {key}"
    for key, value in CLAIMED[path.stem].items():
        assert loaded[key] == value, f"{path.name}: {key}"


def test_the_sharded_recipe_is_fsdp2_with_keys_that_accelerate_reads() -> None:
    loaded = load_config_from_file(str(LAUNCH / "accelerate/fsdp.yaml")).fsdp_config
    assert loaded["fsdp_version"] == 2
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    assert set(loaded) <= known


def test_restarts_are_no_key_of_accelerates_files() -> None:
    """As the headers say; where this fails, say `max_restarts` in the files instead."""
    assert "max_restarts" not in {field.name for field in fields(ClusterConfig)}


def test_the_readme_names_every_file_and_no_other() -> None:
    files = {path.relative_to(LAUNCH).as_posix() for path in [*RECIPES, LAUNCH / "torchrun.sh"]}
    assert files <= set(re.findall(r"launch/((?:accelerate/)?\w+\.(?:yaml|sh))", README))
    for name in re.findall(r"`?((?:launch|tests|docs)/[\w/]+\.\w+)", README):
        assert (ROOT / name).exists(), name


def torchrun_sh(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "NNODES", "RDZV_ENDPOINT")}
    command = ["bash", str(LAUNCH / "torchrun.sh"), *arguments]
    return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, timeout=30)


def test_torchrun_sh_builds_the_command_that_it_shows() -> None:
    """`PYTHON=echo` prints the command in place of running it."""
    alone = torchrun_sh("train.py", "--name", "a b", NPROC="2", PYTHON="echo")
    run = "-m torch.distributed.run --standalone --nnodes 1 --nproc-per-node 2 --max-restarts 3 train.py --name a b"
    assert alone.stdout.splitlines()[-1] == run
    several = torchrun_sh(
        "train.py", NPROC="8", PYTHON="echo", NNODES="2:4", RDZV_ENDPOINT="node0:29400", MAX_RESTARTS="0", RDZV_ID="j"
    )
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint node0:29400 --rdzv-id j"
    flags = f"--nnodes 2:4 --nproc-per-node 8 --max-restarts 0 {rendezvous}"
    assert several.stdout.splitlines()[-1] == f"-m torch.distributed.run {flags} train.py"


def test_torchrun_sh_says_what_is_missing() -> None:
    assert "give the training script and its arguments" in torchrun_sh(PYTHON="echo").stderr
    lonely = torchrun_sh("train.py", NPROC="1", PYTHON="echo", NNODES="2")
    assert (lonely.returncode, "RDZV_ENDPOINT is not set" in lonely.stderr) == (2, True)
    without_torch = torchrun_sh("train.py", PYTHON="/bin/false")
    assert (without_torch.returncode, "cannot import torch" in without_torch.stderr) == (2, True)
