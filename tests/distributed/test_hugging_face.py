"""Checkpoints that transformers and PEFT load: in place, while the run goes on, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dist_train.checkpoint.weight_files import BLOCK_BYTES
from dist_train.errors import ConfigError
from dist_train.run import Run
from dist_train.world import current_world
from tests.support import hugging
from tests.support.forked import run_ranks
from tests.support.launch import ROOT

pytestmark = pytest.mark.distributed
OWN_KB = 16_000
"""What an export needs besides its buffer: the manifest, the verification's chunks, the interpreter's own."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_from_pretrained_on_a_live_folder_gives_the_same_logits(world_size: int, tmp_path: Path) -> None:
    said = run_ranks(hugging.load_live_folders, world_size, str(tmp_path), deadline_seconds=120)[0]
    weights = [f"model-{rank:05d}-of-{world_size:05d}.safetensors" for rank in range(1, world_size + 1)]
    optimizers = [name.replace("model", "optimizer") for name in weights]
    assert {1, 2, 3} <= said["live"].keys()
    assert said["live"][1] in (weights, weights + optimizers)
    assert said["stripped"] == weights


def test_what_was_sharded_is_exported_and_loads_with_the_same_logits(tmp_path: Path) -> None:
    names = run_ranks(hugging.export_what_was_sharded, 2, str(tmp_path), deadline_seconds=120)[0]
    shards = [name for name in names if name.startswith("model-")]
    assert len(shards) > 2
    assert set(names) - set(shards) == {"config.json", "generation_config.json", "model.safetensors.index.json"}


def test_an_adapter_alone_is_exported_and_peft_loads_it_with_the_same_logits(tmp_path: Path) -> None:
    names = run_ranks(hugging.export_an_adapter, 2, str(tmp_path), deadline_seconds=120)[0]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_export_takes_a_bounded_buffer_however_large_a_tensor_is(tmp_path: Path) -> None:
    run_ranks(hugging.save_one_large_tensor, 2, str(tmp_path))
    (said,) = run_ranks(hugging.export_under_watch, 1, str(tmp_path))
    assert said["peak"] - said["before"] < BLOCK_BYTES // 1000 + OWN_KB, said
    with safe_open(tmp_path / "hf/model.safetensors", framework="pt") as file:
        large = file.get_slice("large")
        for low in range(0, hugging.ROWS, 1000):
            block = large[low : low + 1000]
            first = low * hugging.COLUMNS
            assert torch.equal(block.flatten(), torch.arange(first, first + block.numel(), dtype=torch.int32))


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    run_ranks(hugging.run_page, 1, str(ROOT / "docs/huggingface.md"), str(tmp_path))
    assert sorted(one.name for one in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {
        one.name for one in (tmp_path / "gpt-hf").iterdir()
    }


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
