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

from dist_train.cli import _parser
from dist_train.errors import ExitCode
from dist_train.units import parse_seconds
from tests.support.launch import ROOT

LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()
SLURM = LAUNCH / "slurm/train.sh"
PODS = sorted((LAUNCH / "kubernetes").glob("*.yaml"))
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
    files = {path.relative_to(LAUNCH).as_posix() for path in [*RECIPES, *PODS, LAUNCH / "torchrun.sh", SLURM]}
    assert files <= set(re.findall(r"launch/((?:\w+/)?\w+\.(?:yaml|sh))", README))
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
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint node0:29400 --rdzv-id j --rdzv-conf last_call_timeout=10"
    flags = f"--nnodes 2:4 --nproc-per-node 8 --max-restarts 0 {rendezvous}"
    assert several.stdout.splitlines()[-1] == f"-m torch.distributed.run {flags} train.py"


STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
if [ "$(basename "$0") $1" = "scontrol show" ]; then printf '%s\\n' node3 node4; fi
if [ "$(basename "$0")" = srun ]; then echo "grace $DIST_TRAIN_GRACE" >> "$CALLS"; exit "$CODE"; fi
"""


@pytest.mark.parametrize(("code", "requeues"), [(0, 0), (75, 1), (93, 0), (1, 0)])
def test_the_slurm_job_goes_back_into_the_queue_only_when_the_run_says_so(
    code: int, requeues: int, tmp_path: Path
) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2"}
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "CALLS": str(tmp_path / "calls"), **job}
    command = ["bash", str(SLURM), "train.py", "--name", "a b"]
    ended = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, timeout=30)
    assert ended.returncode == code, ended.stderr
    shown, launched, grace, *after = (tmp_path / "calls").read_text().splitlines()
    assert shown == "scontrol show hostnames node[3-4]"
    meet = "--nnodes 2 --rdzv-endpoint node3:24711 --rdzv-id 4711"
    assert launched == f"srun dist-train launch {meet} train.py --name a b"
    assert after == ["scontrol requeue 4711"] * requeues
    (ahead,) = re.findall(r"#SBATCH --signal=USR1@(\d+)", SLURM.read_text())
    assert 0 < parse_seconds(grace.split()[1]) < int(ahead)


def test_the_slurm_job_without_a_script_says_so() -> None:
    ended = subprocess.run(["bash", str(SLURM)], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, "give the training script" in ended.stderr) == (2, True)


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_a_pod_has_time_to_save_and_its_command_is_one_that_launch_takes(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    spec = documents[-1]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (grace,) = (one["value"] for one in container["env"] if one["name"] == "DIST_TRAIN_GRACE")
    assert 0 < parse_seconds(grace) < pod["terminationGracePeriodSeconds"]
    program, *arguments = container["command"]
    assert program == "dist-train"  # a shell in between would keep TERM to itself
    asked = _parser().parse_args(arguments)
    assert (asked.script, asked.arguments) == ("train.py", ["--run-dir", "/runs/ultra"])
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules)
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules}
    assert codes == {"FailJob": [ExitCode.USAGE, ExitCode.DO_NOT_REQUEUE], "Ignore": [ExitCode.REQUEUE]}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    if len(documents) == 2:
        service, pods = documents[0], spec["completions"]
        assert pods == spec["parallelism"] == int(asked.nnodes.split(":")[1])
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"] == {"job-name": documents[1]["metadata"]["name"]}
        assert asked.rdzv_endpoint.startswith(f"{documents[1]['metadata']['name']}-0.{pod['subdomain']}:")


def test_torchrun_sh_says_what_is_missing() -> None:
    assert "give the training script and its arguments" in torchrun_sh(PYTHON="echo").stderr
    lonely = torchrun_sh("train.py", NPROC="1", PYTHON="echo", NNODES="2")
    assert (lonely.returncode, "RDZV_ENDPOINT is not set" in lonely.stderr) == (2, True)
    without_torch = torchrun_sh("train.py", PYTHON="/bin/false")
    assert (without_torch.returncode, "cannot import torch" in without_torch.stderr) == (2, True)
