"""Accelerator() before init_distributed(), with real workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch import ROOT, run_command, torchrun

pytestmark = pytest.mark.distributed


def output_of(how: str, run_dir: Path, restarts: int) -> str:
    script = str(ROOT / "tests/support/late_group.py")
    command = torchrun(2, script, how, str(run_dir), str(restarts))
    return run_command(command, deadline_seconds=90, extra={"ACCELERATE_USE_CPU": "true"}).require_success().output


@pytest.mark.parametrize("how", ["init", "run"])
def test_a_group_that_would_not_survive_a_restart_is_refused_on_every_rank(how: str, tmp_path: Path) -> None:
    output = output_of(how, tmp_path, restarts=3)
    for rank in range(2):
        assert f"ConfigError: Rank {rank}: the process group was made before dist_train.init_distributed()" in output
    assert "nothing was said" not in output


def test_without_restarts_it_is_nobody_s_business(tmp_path: Path) -> None:
    assert output_of("init", tmp_path, restarts=0).count("nothing was said") == 2
