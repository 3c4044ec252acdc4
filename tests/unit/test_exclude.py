"""Tensors that checkpoints do without: never written, never filled, and told where they are not what they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dist_train as dt
from dist_train.checkpoint.exchange import export_checkpoint
from dist_train.checkpoint.inference import load_model
from dist_train.cli import main as command_line
from dist_train.errors import ConfigError, StateMismatchError
from tests.support.forked import run_ranks
from tests.support.grown import assert_same, values
from tests.support.small_run import events_of, manifests_of

EXCLUDE = ("base.*", "table")


def adapted(seed: int = 0) -> Any:
    """A frozen base, a large constant and a hidden one, and what is trained."""
    torch.manual_seed(seed)
    model: Any = nn.Module()
    model.base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
    model.register_buffer("table", torch.randn(50))
    model.register_buffer("mask", torch.randn(5), persistent=False)
    torch.manual_seed(1)
    model.lora = nn.Linear(4, 2)
    return model


def train(run_dir: Path, model: Any, steps: int, *, kill_at: int | None = None, **options: Any) -> tuple[Any, Any]:
    from tests.support import grown

    return grown.train(
        run_dir, model, lambda m: torch.optim.AdamW(m.lora.parameters(), 0.1), steps=steps, kill_at=kill_at, **options
    )


def stored(run_dir: Path) -> set[str]:
    """Names in the newest checkpoint's files of the model."""
    names: set[str] = set()
    for path in (run_dir / "latest/").glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_what_is_excluded_is_in_no_file_table_or_index(tmp_path: Path) -> None:
    train(tmp_path, adapted(), 2, exclude=(*EXCLUDE, "mask"))
    assert stored(tmp_path) == {"lora.weight", "lora.bias"}
    manifest = manifests_of(tmp_path)[-1]
    assert {name for name in manifest["tensors"] if "optimizer" not in name} == {"model/lora.weight", "model/lora.bias"}
    index = json.loads((tmp_path / "latest/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {"lora.weight", "lora.bias"}
    told = manifest["settings"]["exclude"]
    assert told["patterns"] == [*EXCLUDE, "mask"]
    assert {"model/base.0.weight", "model/base.1.running_mean", "model/table", "buffer/model/mask"} <= set(
        told["tensors"]
    )
    assert all(len(one) == 32 for one in told["tensors"].values())


def test_a_resume_takes_it_from_the_script_and_is_exact_across_kills(tmp_path: Path) -> None:
    expected = values(*train(tmp_path / "straight", adapted(), 6))
    for kill_at in (1, 4):
        with pytest.raises(AssertionError, match="died without an answer"):
            run_ranks(killed, 1, tmp_path / "run", kill_at)
    assert_same(values(*train(tmp_path / "run", adapted(), 6, exclude=EXCLUDE)), expected)
    assert events_of(tmp_path / "run", "resumed")[-1]["notes"] == []


def killed(run_dir: Path, kill_at: int) -> None:
    train(run_dir, adapted(), 6, kill_at=kill_at, exclude=EXCLUDE)


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (("lora.bias", "base.*"), r"matches lora.bias, which an optimizer trains"),
        (("*",), r"matches lora.(weight|bias), lora.(bias|weight), which an optimizer trains"),
        (("base.*", "bse.*"), r"bse.\* matches no tensor of the model, which has table"),
    ],
)
def test_what_is_trained_and_what_is_not_there_cannot_be_excluded(
    patterns: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        train(tmp_path / "run", adapted(), 1, exclude=patterns)
    assert not (tmp_path / "run").exists()


def test_another_base_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, adapted(), 2, exclude=EXCLUDE)
    model = adapted()
    with torch.no_grad():
        model.base[0].weight[0, 0] += 1e-3
    train(tmp_path, model, 3, exclude=EXCLUDE)
    assert "1 tensors that are not in checkpoints do not have the values" in caplog.text
    assert "(base.0.weight)" in caplog.text


def test_another_list_is_told_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, adapted(), 2)
    other = adapted()
    with torch.no_grad():
        other.table[0] += 1
    train(tmp_path, other, 3, exclude=EXCLUDE)
    (note,) = events_of(tmp_path, "resumed")[-1]["notes"]
    assert note.startswith("exclude is ('base.*', 'table') now and was ()")
    assert "(table)" in caplog.text  # which the checkpoint still holds, with other values
    with pytest.raises(StateMismatchError) as caught:
        train(tmp_path, adapted(), 4)
    assert "model/base.0.weight is in the model and not in the checkpoint" in str(caught.value)
    assert "It was saved with exclude=('base.*', 'table'): give that again" in str(caught.value)
    train(tmp_path, adapted(), 4, partial_load=EXCLUDE)
    assert "model/table" in manifests_of(tmp_path)[-1]["tensors"]


def test_training_that_changes_what_is_excluded_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    with dt.Run(str(tmp_path), model=model, options=dt.RunOptions(exclude=EXCLUDE)) as run:
        for epoch in run.epochs(4):
            model.base[1].running_mean.add_(0.0)  # as DDP does it, which sends equal buffers around
            if epoch >= 1:
                model.base(torch.ones(2, 3) * epoch)  # in train mode: BatchNorm moves
            run.step()
            run.save(wait=True)
            told = [one for one in caplog.records if "training has changed it" in one.getMessage()]
            assert len(told) == (epoch >= 1)
    assert told[0].levelno == logging.WARNING


def test_the_model_is_loaded_with_what_is_there_and_the_base_is_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = train(tmp_path, adapted(), 2, exclude=EXCLUDE)
    model = adapted()
    with torch.no_grad():
        model.lora.weight.zero_()
    load_model(str(tmp_path), "latest", model)
    assert_same(dict(model.state_dict()), dict(trained.state_dict()))
    assert (
        "saved with exclude=('base.*', 'table'), and stay as they are in the model, with the values of the training"
        in caplog.text
    )
    assert "do not have the values" not in caplog.text
    load_model(str(tmp_path), "latest", adapted(seed=5))
    assert "do not have the values that they had in the run that saved (base.0.bias" in caplog.text


def test_one_name_of_a_tied_tensor_excludes_nothing_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted()
    model.head = nn.Linear(3, 4, bias=False)
    model.head.weight = model.base[0].weight
    with caplog.at_level(logging.WARNING, logger="dist_train"):
        train(tmp_path, model, 1, exclude=("base.*",))
    told = [record.getMessage() for record in caplog.records if "tied" in record.getMessage()]
    assert len(told) == 1
    assert "exclude=('base.*',) matches base.0.weight, which is tied to head.weight" in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dist_train"):
        train(tmp_path / "both", model, 1, exclude=("base.*", "head.*"))
    assert not [record for record in caplog.records if "tied" in record.getMessage()]


def test_an_excluded_tensor_that_is_tied_to_one_that_is_saved_is_saved(tmp_path: Path) -> None:
    def tied() -> Any:
        model = adapted()
        model.copy = nn.Linear(3, 4, bias=False)
        model.copy.weight = model.base[0].weight
        return model

    train(tmp_path, tied(), 2, exclude=EXCLUDE)
    assert "base.0.weight" in stored(tmp_path)
    assert "model/base.0.weight" not in manifests_of(tmp_path)[-1]["settings"]["exclude"]["tensors"]
    train(tmp_path, tied(), 3, exclude=EXCLUDE)


def test_everything_but_what_is_trained_can_be_excluded(tmp_path: Path) -> None:
    train(tmp_path, adapted(), 2, exclude=("*", "!lora.*"))
    assert stored(tmp_path) == {"lora.weight", "lora.bias"}
    assert not any(name.startswith("buffer/") for name in manifests_of(tmp_path)[-1]["tensors"])


def test_of_several_models_the_names_begin_with_the_models(tmp_path: Path) -> None:
    models = {"student": adapted(), "teacher": adapted(seed=3).requires_grad_(False)}
    with dt.Run(str(tmp_path), model=models, options=dt.RunOptions(exclude=("teacher.*",))) as run:
        for _ in run.epochs(1):
            run.step()
    names = manifests_of(tmp_path)[-1]["tensors"]
    assert {name.split("/")[1] for name in names if name.startswith("model/")} == {"student"}
    assert "buffer/model/teacher/mask" not in names


def test_a_warm_start_leaves_it_alone(tmp_path: Path) -> None:
    train(tmp_path / "base", adapted(), 2)
    model, _ = adapted(seed=5), None
    options = dt.RunOptions(exclude=EXCLUDE, warm_start=str(tmp_path / "base"))
    with dt.Run(str(tmp_path / "run"), model=model, options=options):
        assert torch.equal(model.base[0].weight, adapted(seed=5).base[0].weight)
        assert not torch.equal(model.lora.weight, adapted(seed=5).lora.weight)


def test_it_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", adapted(), 1, exclude=EXCLUDE)
    capsys.readouterr()
    assert command_line(["show", str(tmp_path / "run")]) == 0
    assert "8 tensors of the model (base.*, table)" in capsys.readouterr().out
    export_checkpoint(str(tmp_path / "run"), "latest", str(tmp_path / "w.safetensors"), form="safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"lora.weight", "lora.bias"}


def test_extra_state_of_an_excluded_module_goes_with_its_tensors(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        scale = 1.0

        def get_extra_state(self) -> Any:
            return {"scale": self.scale}

        def set_extra_state(self, state: Any) -> None:
            self.scale = state["scale"]

    def make() -> Any:
        model = adapted()
        model.base[0], model.out = Scaled(3, 4).requires_grad_(False), Scaled(2, 2).requires_grad_(False)
        return model

    torch.manual_seed(0)
    model = make()
    model.base[0].scale = model.out.scale = 3.0
    with dt.Run(str(tmp_path), model=model, options=dt.RunOptions(exclude=EXCLUDE)) as run:
        for _ in run.epochs(1):
            run.step()
    back = make()
    with dt.Run(str(tmp_path), model=back, options=dt.RunOptions(exclude=EXCLUDE)):
        assert (back.base[0].scale, back.out.scale) == (1.0, 3.0)
