"""What people are told where an argument, a file or a setting does not do what they meant."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train as dt
from dist_train.checkpoint.exchange import export_checkpoint, load_dictionary
from dist_train.checkpoint.parents import find_parents
from dist_train.checkpoint.store import Store
from dist_train.differences import compare_config
from dist_train.errors import ConfigError, CorruptCheckpointError
from tests.support.small_run import SmallRun

# Settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_time", "abc", "'abc' is not a duration"),
        ("max_time", "11,5h", "'11,5h' is not a duration"),
        ("max_time", "0s", "must be longer than nothing"),
        ("max_time", -1, "must be longer than nothing"),
        ("time_reserve", "soon", "'soon' is not a duration"),
        ("time_reserve", -5.0, "must be 0 or more"),
    ],
)
def test_a_time_that_is_none_is_refused_where_it_is_written(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"TrainConfig\.{name}.*{expected}"):
        dt.TrainConfig(run_dir="run", epochs=1, global_batch_size=1, **{name: value})
    with pytest.raises(ConfigError, match=rf"RunOptions\.{name}.*{expected}"):
        dt.RunOptions(**{name: value})


def test_no_reserve_and_long_times_are_accepted() -> None:
    dt.RunOptions(max_time="11h30m", time_reserve=0)
    dt.TrainConfig(run_dir="run", epochs=1, global_batch_size=1, max_time=90, time_reserve="1min")


def test_how_long_a_session_lasts_is_no_setting_of_the_training() -> None:
    def config(**user: Any) -> dict[str, Any]:
        return {"user": user}

    then = config(max_time="60s", time_reserve=None, log_with=None, search=["a"], run_dir="a", num_workers=0)
    today = config(max_time="11h", time_reserve="5min", log_with="wandb", search=["b"], run_dir="b", num_workers=2)
    assert compare_config(then, today, (1, 1)) == {"config.num_workers": (0, 2)}


# Files of others


class Settings:
    """A class of the script that made the file."""


def test_the_recipe_for_a_file_with_code_keeps_all_that_a_training_goes_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = {
        "epoch": 3,
        "model_state_dict": {"weight": torch.arange(3.0)},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "scheduler_state_dict": {"last_epoch": 4},
        "scaler_state_dict": {"scale": 1024.0},
        "val_smape": 9.5,
        "best_val_smape": 9.25,
    }
    torch.save({**kept, "config": Settings()}, "old.pth")
    with pytest.raises(CorruptCheckpointError, match="Settings, which is code") as caught:
        load_dictionary("old.pth")
    load, save = re.findall(r"`([^`]*torch\.(?:load|save)\(\{?.*?)`", str(caught.value))[:2]
    recipe = f"import torch\n{load}\n{save}"
    assert "weights_only=False" in recipe
    exec(recipe, {})
    plain = load_dictionary("plain.pth")
    assert plain.keys() == kept.keys()
    assert torch.equal(plain["model_state_dict"]["weight"], torch.arange(3.0))


def test_a_file_that_is_cut_short_is_told_without_numbers_of_errors(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000), "args": Namespace(lr=0.1)}, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    told = set()
    for length in range(0, len(data), 500):
        cut.write_bytes(data[:length])
        with pytest.raises(CorruptCheckpointError, match="damaged, cut short or of another kind") as caught:
            load_dictionary(str(cut))
        assert "Errno" not in str(caught.value)
        told.add("it ends too early" in str(caught.value))
    assert told == {True, False}


# Exports


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_largest_file_is_refused_where_there_is_only_one(form: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"The format {form} is one file"):
        export_checkpoint(str(tmp_path), to=str(tmp_path / "out"), form=form, max_shard_bytes=1000)


def test_an_export_for_hugging_face_says_what_belongs_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_train.cli import main

    SmallRun(run_dir=tmp_path / "run", epochs=1).train()
    assert main(["export", str(tmp_path / "run"), "--format", "hf", "--to", str(tmp_path / "out")]) == 0
    assert "copy config.json (and the tokenizer's files) of the model beside it" in capsys.readouterr().out


# Several runs


def test_runs_that_are_found_are_told_one_by_one(tmp_path: Path) -> None:
    """Two places hold the same run: they are named together, with what is newest there."""
    first, again, other = (tmp_path / name for name in ("v1/runs/price", "v2/runs/price", "other/runs/price"))
    SmallRun(run_dir=first, epochs=1).train()
    SmallRun(run_dir=again, epochs=2, search=(str(first),)).train()
    SmallRun(run_dir=other, epochs=1).train()
    ids = [json.loads((one / "run.json").read_text())["run_id"] for one in (again, other)]
    with pytest.raises(ConfigError) as caught:
        find_parents(Store(str(tmp_path / "working/price")), [f"{tmp_path}/v*", f"{tmp_path}/other"])
    said = str(caught.value)
    assert said.startswith("search finds 2 different runs: ")
    assert re.search(rf"run {ids[0]} \(newest: step 10 of 20\d\d-\d\d-\d\d \d\d:\d\d\) in {again} and {first}", said)
    assert re.search(rf"run {ids[1]} \(newest: step 5 of 20\d\d-\d\d-\d\d \d\d:\d\d\) in {other}", said)
    assert "remove the input that holds the other" in said
