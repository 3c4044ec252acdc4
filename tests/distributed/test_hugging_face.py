"""Checkpoints that transformers and PEFT load: in place, while the run goes on, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from dist_train.errors import ConfigError
from dist_train.run import Run
from dist_train.world import current_world
from tests.support.forked import run_ranks

pytestmark = pytest.mark.distributed


def test_what_the_main_rank_cannot_attach_is_an_error_on_every_rank_and_its_own_files_count(tmp_path: Path) -> None:
    texts = run_ranks(attach_what_is_not_there, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "no such file" in texts[0]


def attach_what_is_not_there(folder: str) -> str:
    rank = current_world().rank
    Path(folder, f"rank-{rank}").write_text("mine")
    with Run(f"{folder}/run", model=nn.parallel.DistributedDataParallel(nn.Linear(2, 1))) as run:
        with pytest.raises(ConfigError) as caught:
            run.attach(f"{folder}/nothing")
        run.attach(f"{folder}/rank-{rank}")
        for _ in run.epochs(1):
            run.step()
    assert Path(folder, "run/latest/rank-0").read_text() == "mine"
    assert not Path(folder, "run/latest/rank-1").exists()
    return str(caught.value)
