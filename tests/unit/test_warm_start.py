"""A fresh run that begins with the weights of another one: which, how exactly, and what is recorded of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train as dt
from dist_train.checkpoint.exchange import export_checkpoint
from dist_train.checkpoint.inference import load_model
from dist_train.cli import main as command_line
from dist_train.errors import CorruptCheckpointError, NoCheckpointError, StateMismatchError
from tests.support.damage import Damage
from tests.support.forked import run_ranks
from tests.support.grown import adam, assert_same, network, train, values
from tests.support.small_run import Numbered, events_of, manifests_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, all of them saved."""
    run_dir = tmp_path_factory.mktemp("base") / "base"
    train(run_dir, network(seed=7), steps=4)
    return run_dir


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base", symlinks=True))


def weights_of(base: Path, which: str) -> dict[str, torch.Tensor]:
    return dict(load_model(str(base), which, network()).state_dict())


@pytest.mark.parametrize(
    ("text", "which"),
    [
        pytest.param("{base}", "latest", id="a run directory"),
        pytest.param("{base}:latest", "latest", id="latest"),
        pytest.param("{base}:step:2", "step:2", id="a step"),
        pytest.param("{base}:epoch:3", "epoch:3", id="an epoch"),
        pytest.param("{base}/checkpoints/step-00000002", "step:2", id="a folder"),
    ],
)
def test_a_fresh_run_begins_with_the_weights_that_are_named_and_nothing_else(
    text: str, which: str, base: Path, tmp_path: Path
) -> None:
    model = network()
    optimizer, options = adam(model), dt.RunOptions(warm_start=text.format(base=base))
    with dt.Run(str(tmp_path), model=model, optimizer=optimizer, options=options) as run:
        for name, value in weights_of(base, which).items():
            assert torch.equal(model.state_dict()[name], value), name
        assert (run.global_step, run.epochs_completed, run.resumed_from) == (0, 0, None)
    assert not optimizer.state
    started = events_of(tmp_path, "started")[0]["warm_start"]
    assert started["requested"] == text.format(base=base)
    assert started["run_id"] == manifests_of(base)[0]["run_id"]


def test_a_run_directory_means_its_best_checkpoint_where_a_metric_is_monitored(tmp_path: Path) -> None:
    model = network()
    policy = dt.CheckpointPolicy(every_epochs=1, monitor="val", mode="min")
    with dt.Run(str(tmp_path / "base"), model=model, policy=policy) as run:
        for epoch in run.epochs(3):
            model.seen += 1
            run.step()
            run.end_epoch(val=abs(epoch - 1))
    model = network()
    with dt.Run(str(tmp_path / "run"), model=model, options=dt.RunOptions(warm_start=str(tmp_path / "base"))):
        assert int(model.seen) == 2


def test_a_start_that_is_killed_before_its_first_checkpoint_is_the_same_again(base: Path, tmp_path: Path) -> None:
    expected = values(*train(tmp_path / "straight", network(), steps=6, warm_start=str(base)))
    for kill_at in (0, 3):
        with pytest.raises(AssertionError, match="died without an answer"):
            run_ranks(killed, 1, tmp_path / "run", str(base), kill_at)
    found = values(*train(tmp_path / "run", network(), steps=6, warm_start=str(base)))
    assert_same(found, expected)
    first = load_model(str(tmp_path / "run"), "step:1", network())
    assert not torch.equal(first.body.weight, network().body.weight)


def killed(run_dir: Path, warm_start: str, kill_at: int) -> None:
    train(run_dir, network(), steps=6, warm_start=warm_start, kill_at=kill_at)


def test_a_base_that_trains_on_between_two_starts_gives_the_same_start(own_base: Path, tmp_path: Path) -> None:
    expected = values(*train(tmp_path / "straight", network(), steps=3, warm_start=str(own_base)))
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(killed, 1, tmp_path / "run", str(own_base), 0)
    train(own_base, network(seed=7), steps=6)
    assert_same(values(*train(tmp_path / "run", network(), steps=3, warm_start=str(own_base))), expected)


def test_a_choice_that_is_not_there_any_more_is_told(own_base: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without an answer"):
        run_ranks(killed, 1, tmp_path / "run", str(own_base), 0)
    shutil.rmtree(own_base / "checkpoints/step-00000004")
    train(tmp_path / "run", network(), steps=1, warm_start=str(own_base))
    notes = events_of(tmp_path / "run", "noted")[-1]["notes"]
    assert any("step-00000004, which is not there any more" in note for note in notes)


def test_its_own_checkpoints_come_first_and_the_origin_stays_known(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, network(), steps=2, warm_start=str(base))
    train(run_dir, network(), steps=4, warm_start=str(base))
    assert events_of(run_dir, "resumed")[-1]["notes"] == []
    newest = manifests_of(run_dir)[-1]["settings"]["warm_start"]
    assert (newest["digest"], newest["global_step"]) == (digest_of(base), 4)
    train(run_dir, network(), steps=5)
    train(run_dir, network(), steps=6, warm_start=f"{base}:step:1")
    (note,) = events_of(run_dir, "resumed")[-1]["notes"]
    assert "has no effect: the run started with warm_start=" in note
    assert manifests_of(run_dir)[-1]["settings"]["warm_start"] == newest
    capsys.readouterr()
    assert command_line(["show", str(run_dir)]) == 0
    assert str(base / "checkpoints/step-00000004") in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def digest_of(base: Path) -> str:
    return str(manifests_of(base)[-1]["digest"])


def test_must_begins_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError):
        train(tmp_path, network(), steps=1, resume="must", warm_start=str(base))


# What differs


def test_another_head_needs_a_pattern_and_is_new_then(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"Nothing was loaded.*partial_load=\('new_head.\*', 'head.\*'\)"):
        train(tmp_path / "run", network("new_head"), steps=1, warm_start=str(base))
    options = {"warm_start": str(base), "partial_load": ("new_head.*", "head.*")}
    model = network("new_head")
    with dt.Run(str(tmp_path / "other"), model=model, options=dt.RunOptions(**options)) as run:
        for _ in run.epochs(0):
            pass
        assert torch.equal(model.body.weight, weights_of(base, "latest")["body.weight"])
        assert torch.equal(model.new_head.weight, network("new_head").new_head.weight)
    (notes,) = [event["notes"] for event in events_of(tmp_path / "other", "noted")]
    assert any("Loaded in part: 3 of the 5" in note for note in notes)
    train(tmp_path / "third", network("new_head"), steps=2, **options)
    train(tmp_path / "third", network("new_head"), steps=3, **options)
    assert events_of(tmp_path / "third", "resumed")[-1]["notes"] == []


def test_one_of_several_models_is_enough(base: Path, tmp_path: Path) -> None:
    models = {"one": network(seed=3), "two": network(seed=4)}
    with dt.Run(str(tmp_path / "pair"), model=models) as run:
        for _ in run.epochs(1):
            run.step()
    only = {"two": network()}
    with dt.Run(str(tmp_path / "run"), model=only, options=dt.RunOptions(warm_start=str(tmp_path / "pair"))):
        assert torch.equal(only["two"].body.weight, models["two"].body.weight)


def test_a_copy_that_was_made_before_the_weights_came_is_told(base: Path, tmp_path: Path) -> None:
    model = network()
    run = dt.Run(str(tmp_path), model=model, options=dt.RunOptions(warm_start=str(base)))
    run.register("average", torch.optim.swa_utils.AveragedModel(model))
    with run:
        for _ in run.epochs(0):
            pass
    (notes,) = [event["notes"] for event in events_of(tmp_path, "noted")]
    assert any("Registered before these weights were there: average" in note for note in notes)


def test_the_trainer_hands_its_settings_on(tmp_path: Path) -> None:
    def fit(run_dir: str, head: int, **settings: Any) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4).eval(), torch.nn.Linear(4, head))
        dt.Trainer(
            model,
            torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1),
            train_data=Numbered(),
            loss=lambda model, batch: model(batch[0]).square().mean(),
            config=dt.TrainConfig(run_dir=str(tmp_path / run_dir), epochs=1, global_batch_size=4, cpu=True, **settings),
        ).fit()
        return events_of(tmp_path / run_dir)

    fit("base", 1)
    patterns = {"partial_load": ("2.*",), "exclude": ("1.weight", "1.bias")}
    events = fit("run", 2, warm_start=f"{tmp_path}/base", **patterns)
    assert events[0]["warm_start"]["requested"] == f"{tmp_path}/base"
    settings = manifests_of(tmp_path / "run")[-1]["settings"]
    assert (settings["partial_load"], settings["exclude"]["patterns"]) == (["2.*"], ["1.weight", "1.bias"])


# What cannot be used


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{base}-not", "there is no .*-not. Give a run directory"),
        ("{base}:step:9", "step:9"),
        ("{base}:newest", "there is no .*:newest"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_can_be_given(
    text: str, told: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(NoCheckpointError, match=told):
        train(tmp_path, network(), steps=1, warm_start=text.format(base=base))


def test_a_damaged_base_is_refused_before_a_tensor_was_changed(own_base: Path, tmp_path: Path) -> None:
    file = next((own_base / "checkpoints/step-00000004").glob("model-*.safetensors"))
    Damage("flip").apply(file)
    model = network()
    with pytest.raises(CorruptCheckpointError, match=r"cannot be used: .*has digest .*Nothing was loaded"):
        train(tmp_path / "run", model, steps=1, warm_start=str(own_base))
    assert_same(dict(model.state_dict()), dict(network().state_dict()))
    train(tmp_path / "run", network(), steps=1, warm_start=f"{own_base}:step:3")


# Weights of other programs


@pytest.mark.parametrize("form", ["safetensors", "pth", "hf"])
def test_the_files_of_other_programs_do_too(form: Any, base: Path, tmp_path: Path) -> None:
    path = export_checkpoint(str(base), "latest", str(tmp_path / f"weights.{form}"), form=form).path
    model = network()
    with dt.Run(str(tmp_path / "run"), model=model, options=dt.RunOptions(warm_start=path)) as run:
        assert_same(dict(model.state_dict()), weights_of(base, "latest"))
        for _ in run.epochs(1):
            run.step()
    origin = manifests_of(tmp_path / "run")[-1]["settings"]["warm_start"]
    assert (origin["path"], len(origin["digest"])) == (path, 32)


def test_the_record_of_the_choice_is_documented_json(base: Path, tmp_path: Path) -> None:
    train(tmp_path, network(), steps=1, warm_start=str(base))
    record = json.loads((tmp_path / "warm_start.json").read_text())
    assert record.keys() == {"requested", "root", "path", "digest", "note"}
    text = (Path(__file__).parents[2] / "docs/checkpoint-format.md").read_text()
    assert all(f"`{key}`" in text.partition("`warm_start.json`: ")[2][:500] for key in record)


def test_a_hugging_face_folder_with_other_names_points_to_from_pretrained(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    export_checkpoint(str(base), "latest", str(folder), form="hf")
    other = {"body": torch.nn.Linear(3, 4), "heads": torch.nn.Linear(4, 1)}
    with pytest.raises(StateMismatchError) as caught:
        train(tmp_path / "plain", torch.nn.ModuleDict(other), steps=1, warm_start=str(folder))
    assert "from_pretrained" not in str(caught.value)
    (folder / "config.json").write_text("{}")
    with pytest.raises(StateMismatchError, match=r"call from_pretrained\(folder\) in the script then"):
        train(tmp_path / "hugging", torch.nn.ModuleDict(other), steps=1, warm_start=str(folder))
