"""Checkpoints of other programs in and out: nothing is lost, changed or executed on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_train.checkpoint import exchange, outbox
from dist_train.checkpoint.exchange import export_checkpoint, import_checkpoint, load_dictionary
from dist_train.checkpoint.inference import find_checkpoint, load_model
from dist_train.checkpoint.store import Operation, Store
from dist_train.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, StateMismatchError, StorageError
from dist_train.history import read_metrics
from dist_train.run import Run
from tests.support.old_checkpoint import build, build_optimizer, old_checkpoint, update
from tests.support.twins import same_bits

KINDS = ("plain", "tied", "bf16", "channels_last")


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where a value is not found again, bit for bit and of the same type; keys that came in addition are no matter."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and same_bits(one, other) else [place]
    if isinstance(one, Mapping):
        missing = [f"{place}/{key} is missing" for key in one if key not in other]
        shared = [differences(one[key], other[key], f"{place}/{key}") for key in one if key in other]
        return missing + list(itertools.chain(*shared))
    if isinstance(one, (list, tuple)):
        if type(one) is not type(other) or len(one) != len(other):
            return [f"{place} is another sequence"]
        pairs = enumerate(zip(one, other, strict=True))
        return list(itertools.chain(*(differences(*pair, f"{place}/{index}") for index, pair in pairs)))
    return [] if type(one) is type(other) and one == other else [f"{place}: {one!r} and {other!r}"]


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def round_trip(tmp_path: Path, content: Any) -> dict[str, Any]:
    import_checkpoint(saved(tmp_path / "old.pth", content), str(tmp_path / "run"))
    export_checkpoint(str(tmp_path / "run"), "latest", str(tmp_path / "new.pth"))
    loaded: dict[str, Any] = torch.load(tmp_path / "new.pth", weights_only=True)
    return loaded


# Round trips


@pytest.mark.parametrize("parts", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_imported_and_exported_again_every_value_is_the_same(
    kind: str, optimizer: str, parts: tuple[bool, bool], tmp_path: Path
) -> None:
    old = old_checkpoint(kind, optimizer, scheduler=parts[0], scaler=parts[1])
    new = round_trip(tmp_path, old)
    assert differences(old, new) == []
    assert differences({key: new[key] for key in new if key in old}, old) == []
    assert set(new) - set(old) <= {"global_step", "scaler_state_dict"}


def test_the_comparison_of_round_trips_sees_a_bit_a_type_and_a_missing_key() -> None:
    old = {"a": torch.zeros(2), "b": {"c": 1}, "d": (1, 2)}
    assert differences(old, {"a": -torch.zeros(2), "b": {"c": 1.0}, "d": [1, 2]}) == [
        "/a",
        "/b/c: 1 and 1.0",
        "/d is another sequence",
    ]
    assert differences(old, {"a": torch.zeros(2), "b": {}, "d": (1, 2)}) == ["/b/c is missing"]


def test_what_has_no_meaning_for_us_comes_out_again(tmp_path: Path) -> None:
    old = old_checkpoint() | {"args": {"lr": 1e-4, "arch": "ultra"}, "losses": [1.0, 0.5], "ema": {"w": torch.ones(2)}}
    assert differences(old, round_trip(tmp_path, old)) == []


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    new = round_trip(tmp_path, old_checkpoint("tied"))
    assert load_safetensors(tmp_path / "run").keys() == {"embedding.weight"}
    weights = new["model_state_dict"]
    assert weights["embedding.weight"].data_ptr() == weights["head.weight"].data_ptr()


def load_safetensors(run_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = run_dir.glob("checkpoints/*/model-*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_dictionary_loads_with_plain_torch_and_trains_on_as_if_nothing_had_been(
    kind: str, tmp_path: Path
) -> None:
    old = old_checkpoint(kind)
    new = round_trip(tmp_path, old)
    ends = []
    for content in (old, new):
        model = build(kind)
        model.load_state_dict(content["model_state_dict"])
        optimizer = build_optimizer(model, "adamw")
        optimizer.load_state_dict(content["optimizer_state_dict"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        schedule.load_state_dict(content["scheduler_state_dict"])
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(content["scaler_state_dict"])
        update(kind, model, optimizer, 3)
        schedule.step()
        ends.append([model.state_dict(), optimizer.state_dict(), schedule.state_dict(), scaler.state_dict()])
    assert differences(*ends) == []


# Resuming what was imported


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_from_an_import_as_the_old_script_would(kind: str, optimizer: str, tmp_path: Path) -> None:
    old = old_checkpoint(kind, optimizer)
    steps = 3 if optimizer == "sgd" else None  # SGD counts no updates
    import_checkpoint(saved(tmp_path / "old.pth", old), str(tmp_path / "run"), global_step=steps)
    expected = build(kind)
    expected.load_state_dict(old["model_state_dict"])
    by_hand = build_optimizer(expected, optimizer)
    by_hand.load_state_dict(old["optimizer_state_dict"])
    model = build(kind)
    trained = build_optimizer(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trained, 20)
    with Run(str(tmp_path / "run"), model=model, optimizer=trained, scheduler=schedule, resume="must") as run:
        assert (run.epochs_completed, run.global_step, run.best) == (13, 3, 41.82)
        assert run.metrics == {"val_smape": 42.15}
        assert schedule.last_epoch == 3
        assert trained.param_groups[0]["lr"] == by_hand.param_groups[0]["lr"]
        for _ in run.epochs(14):
            update(kind, expected, by_hand, 3)
            update(kind, model, trained, 3)
            run.step()
    assert differences(model.state_dict(), expected.state_dict()) == []
    assert differences(trained.state_dict()["state"], by_hand.state_dict()["state"]) == []


def test_a_count_of_steps_that_an_older_torch_kept_as_a_number_goes_on_counting(tmp_path: Path) -> None:
    old = old_checkpoint()
    for state in old["optimizer_state_dict"]["state"].values():
        state["step"] = int(state["step"])
    assert differences(old, round_trip(tmp_path, old)) == []
    model = build("plain")
    optimizer = build_optimizer(model, "adamw")
    with Run(str(tmp_path / "run"), model=model, optimizer=optimizer) as run:
        for _ in run.epochs(14):
            update("plain", model, optimizer, 3)
            run.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_the_metrics_of_the_old_script_begin_the_history(tmp_path: Path) -> None:
    import_checkpoint(saved(tmp_path / "old.pth", old_checkpoint()), str(tmp_path / "run"))
    expected = {"kind": "epoch", "global_step": 3, "epoch": 12, "train_loss": 0.3421, "val_smape": 42.15}
    assert read_metrics(tmp_path / "run") == [expected]


def test_names_that_differ_are_listed_by_the_resume(tmp_path: Path) -> None:
    import_checkpoint(saved(tmp_path / "old.pth", old_checkpoint("tied")), str(tmp_path / "run"))
    model = build("plain")
    with pytest.raises(StateMismatchError, match=r"model/embedding.weight is in the checkpoint and not in the model"):
        Run(str(tmp_path / "run"), model=model, optimizer=build_optimizer(model, "adamw")).__enter__()


def test_tied_weights_that_were_copied_apart_load_into_the_tied_model(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in build("tied").state_dict().items()}
    import_checkpoint(saved(tmp_path / "old.pth", weights), str(tmp_path / "run"))
    model = build("tied")
    model.embedding.weight.data.zero_()  # type: ignore[union-attr, operator]
    load_model(str(tmp_path / "run"), "latest", model)
    assert differences(dict(model.state_dict()), weights) == []


def test_copies_that_differ_are_no_tied_weights(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in build("tied").state_dict().items()}
    weights["head.weight"] += 1
    import_checkpoint(saved(tmp_path / "old.pth", weights), str(tmp_path / "run"))
    with pytest.raises(StateMismatchError, match="are one tensor in the model and differ in the checkpoint"):
        load_model(str(tmp_path / "run"), "latest", build("tied"))


# What an import refuses


def test_code_in_a_file_is_not_run_and_the_way_out_is_told(tmp_path: Path) -> None:
    old = old_checkpoint() | {"dataset": Exploding(tmp_path / "ran")}
    path = saved(tmp_path / "old.pth", old)
    with pytest.raises(CorruptCheckpointError, match=r"wants .* code .*nothing was executed.*weights_only=False"):
        import_checkpoint(path, str(tmp_path / "run"))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


class Exploding:
    """Its unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_file_that_was_cut_short_is_named(share: float, tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "old.pth", old_checkpoint()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CorruptCheckpointError, match=r"old.pth cannot be read .*damaged, cut short or of another kind"):
        import_checkpoint(str(path), str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["old.pth"]


@pytest.mark.parametrize("content", [b"hello, I am a text", pickle.dumps({"a": 1}), b"\x80\x02."], ids=str)
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"old.pth"):
        import_checkpoint(str(tmp_path / "old.pth"), str(tmp_path / "run"))


def test_a_text_is_not_said_to_want_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CorruptCheckpointError, match=r"cannot be read as a file of torch.save \(it does not begin"):
        import_checkpoint(str(tmp_path / "config.json"), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dictionary"),
        ({"epoch": 3}, "holds no model: expected one of the keys model_state_dict"),
        ({}, "holds no model"),
    ],
)
def test_a_file_without_a_model_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        import_checkpoint(saved(tmp_path / "old.pth", content), str(tmp_path / "run"))


def test_a_run_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pth", old_checkpoint())
    import_checkpoint(path, str(tmp_path / "run"))
    before = {one: one.read_bytes() for one in (tmp_path / "run").rglob("*") if one.is_file()}
    with pytest.raises(ConfigError, match="is a run already, with 1 checkpoints; nothing was changed"):
        import_checkpoint(path, str(tmp_path / "run"))
    assert {one: one.read_bytes() for one in (tmp_path / "run").rglob("*") if one.is_file()} == before


def test_an_import_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "old.pth", old_checkpoint())
    monkeypatch.setattr(Store, "free_bytes", lambda store: 100)
    with pytest.raises(StorageError, match="100 B are free"):
        import_checkpoint(path, str(tmp_path / "run"))
    monkeypatch.setattr(Store, "free_bytes", lambda store: 1 << 40)
    monkeypatch.setattr(Store, "write_image", fail_with_full_disk)
    with pytest.raises(StorageError, match=r"run was not made: the device has no space left"):
        import_checkpoint(path, str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["old.pth"]


def fail_with_full_disk(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_nothing_at_the_source_is_said(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="there is no such file or folder"):
        import_checkpoint(str(tmp_path / "old.pth"), str(tmp_path / "run"))


# What an import takes


def test_metrics_of_numpy_and_tensors_are_numbers(tmp_path: Path) -> None:
    import numpy as np

    old = old_checkpoint() | {"val_smape": np.float32(42.5), "val_loss": torch.tensor(0.25), "best_val_smape": 41}
    adopted = import_checkpoint(saved(tmp_path / "old.pth", old), str(tmp_path / "run"))
    assert adopted.metrics == {"val_smape": 42.5, "val_loss": 0.25}
    assert adopted.best is not None
    assert adopted.best["value"] == 41


def test_the_form_of_torch_before_1_6_is_read(tmp_path: Path) -> None:
    old = old_checkpoint()
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert differences(old, load_dictionary(str(tmp_path / "old.pth"))) == []
    assert import_checkpoint(str(tmp_path / "old.pth"), str(tmp_path / "run")).epochs_completed == 13


@pytest.mark.parametrize(("without", "absent"), [("scheduler", "scheduler"), ("optimizer", "optimizer")])
def test_parts_can_be_left_behind(without: str, absent: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pth", old_checkpoint())
    adopted = import_checkpoint(path, str(tmp_path / "run"), without=(without,))
    assert adopted.absent == [absent, "rng", "user"]
    assert adopted.global_step == 3, "as the optimizer counted"
    manifest = find_checkpoint(str(tmp_path / "run"), "latest")[2]
    assert absent not in manifest.state
    assert manifest.absent == adopted.absent


def test_several_models_and_optimizers_come_and_go_by_name(tmp_path: Path) -> None:
    nets = {"generator": build("plain"), "discriminator": build("tied")}
    optimizers = {name: build_optimizer(net, "sgd") for name, net in nets.items()}
    kinds = {"generator": "plain", "discriminator": "tied"}
    for name, net in nets.items():
        update(kinds[name], net, optimizers[name], 0)
    old = {
        "epoch": 0,
        "model_state_dict": {name: net.state_dict() for name, net in nets.items()},
        "optimizer_state_dict": {name: one.state_dict() for name, one in optimizers.items()},
    }
    assert differences(old, round_trip(tmp_path, old)) == []
    blank = {name: build(kinds[name]) for name in nets}
    load_model(str(tmp_path / "run"), "latest", blank)
    assert differences(blank["generator"].state_dict(), nets["generator"].state_dict()) == []


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints",
        "checkpoints/step-00000099",
        "checkpoints/abandoned/a000001/step-00000001",
        "checkpoints/step-00000003/x",
        "latest",
        "latest/x",
        "models/new",
    ],
)
def test_an_import_into_a_run_that_is_there_is_refused(place: str, run_dir: str, tmp_path: Path) -> None:
    assert os.path.islink(f"{run_dir}/latest")
    before = snapshot(Path(run_dir))
    with pytest.raises(ConfigError, match=r"in which only the training itself writes\. Nothing was changed there"):
        import_checkpoint(str(tmp_path / "old.pth"), f"{run_dir}/{place}")
    assert snapshot(Path(run_dir)) == before


def test_an_import_follows_a_link_to_an_empty_folder_and_names_a_dead_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pth", old_checkpoint())
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    import_checkpoint(path, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "run.json").exists()
    (tmp_path / "dead").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="dead is a link to nowhere, which is not there"):
        import_checkpoint(path, str(tmp_path / "dead"))
    with pytest.raises(ConfigError, match="dead is a link to nowhere, which is not there"):
        export_checkpoint(str(tmp_path / "link"), "latest", str(tmp_path / "dead"), form="hf")
    assert sorted(os.listdir(tmp_path)) == ["dead", "disk", "link", "old.pth"]


def test_folders_of_other_programs_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000100").mkdir(parents=True)
    for name in ("run.json", "manifest.json", "checkpoints/manifest.json"):
        (tmp_path / name).write_text('{"name": "mine"}')
    path = saved(tmp_path / "old.pth", old_checkpoint())
    import_checkpoint(path, str(tmp_path / "checkpoints" / "run"))
    export_checkpoint(str(tmp_path / "checkpoints" / "run"), "latest", str(tmp_path / "checkpoints" / "new.pth"))
    assert (tmp_path / "checkpoints" / "new.pth").exists()


def test_a_training_among_the_checkpoints_of_another_is_refused(run_dir: str) -> None:
    before = snapshot(Path(run_dir))
    for place in ("checkpoints", "checkpoints/step-00000003", "checkpoints/step-00000003/x", "checkpoints/new"):
        with pytest.raises(ConfigError, match="where a run keeps its checkpoints"):
            Run(f"{run_dir}/{place}", model=build("plain")).__enter__()
    assert snapshot(Path(run_dir)) == before


# Exports


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every name below a folder, and what the files hold."""
    return {str(one): one.read_bytes() if one.is_file() else None for one in sorted(root.rglob("*"))}


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    import_checkpoint(saved(tmp_path / "old.pth", old_checkpoint("tied")), str(tmp_path / "ultra"))
    return str(tmp_path / "ultra")


def test_safetensors_hold_the_weights_and_say_what_is_tied(run_dir: str, tmp_path: Path) -> None:
    export_checkpoint(run_dir, "latest", str(tmp_path / "w.safetensors"), form="safetensors")
    model = build("tied")
    model.embedding.weight.data.zero_()  # type: ignore[union-attr, operator]
    from safetensors.torch import load_model as load_safetensors_model

    load_safetensors_model(model, str(tmp_path / "w.safetensors"))
    assert differences(model.state_dict(), old_checkpoint("tied")["model_state_dict"]) == []


def test_a_folder_for_hugging_face_is_sharded_and_comes_back(run_dir: str, tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    import_checkpoint(saved(tmp_path / "m.pth", model.state_dict()), str(tmp_path / "six"))
    done = export_checkpoint(str(tmp_path / "six"), "latest", str(tmp_path / "hf"), form="hf", max_shard_bytes=600)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert done.num_files == len(set(index["weight_map"].values())) == 3
    assert index["weight_map"].keys() == model.state_dict().keys()
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "again"))
    blank = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    load_model(str(tmp_path / "again"), "latest", blank)
    assert differences(blank.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize(("which", "name"), [(None, "ultra-best.pth"), ("epoch:13", "ultra-epoch-13.pth")])
def test_a_file_that_nobody_named_is_called_after_run_and_checkpoint(
    which: str | None, name: str, run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_checkpoint(run_dir, which).path == name
    (tmp_path / "exports").mkdir()
    assert export_checkpoint(run_dir, which, "exports").path == f"exports/{name}"
    assert (tmp_path / "exports" / name).is_file()


def test_what_is_there_stays_until_it_may_be_replaced(run_dir: str, tmp_path: Path) -> None:
    target = tmp_path / "best.pth"
    target.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(run_dir, "best", str(target))
    assert target.read_text() == "mine"
    export_checkpoint(run_dir, "best", str(target), force=True)
    assert torch.load(target, weights_only=True)["epoch"] == 12


@pytest.mark.parametrize("form", ["pth", "safetensors", "hf"])
@pytest.mark.parametrize(
    "place",
    [
        "run.json",
        "metrics.jsonl",
        "new",
        "checkpoints/step-00000003",
        "checkpoints/step-00000003/manifest.json",
        "checkpoints/step-00000099",
        "../link",
        "../copied/manifest.json",
    ],
)
def test_an_export_into_a_run_is_refused_whatever_is_forced(
    form: Any, place: str, run_dir: str, tmp_path: Path
) -> None:
    shutil.copytree(Path(run_dir) / "checkpoints" / "step-00000003", tmp_path / "copied")
    (tmp_path / "link").symlink_to("ultra/checkpoints/step-00000003")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"in which only the training itself writes\. Nothing was changed there"):
        export_checkpoint(run_dir, "latest", f"{run_dir}/{place}", form=form, force=True)
    assert snapshot(tmp_path) == before


def test_only_the_weights_of_a_model_are_replaced_in_a_folder(run_dir: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    stale = ["model.safetensors.index.json", "model-00001-of-00009.safetensors", "model-00009-of-00009.safetensors"]
    mine = ["adapter.safetensors", "model_1.safetensors", "unet.safetensors.index.json", "config.json", "x.bin"]
    for name in [*stale, *mine]:
        (folder / name).write_text("there before")
    export_checkpoint(run_dir, "latest", str(folder), form="hf", force=True)
    assert sorted(os.listdir(folder)) == sorted([*mine, "model.safetensors"])
    assert all((folder / name).read_text() == "there before" for name in mine)


class Killed(BaseException):
    """SIGKILL, as far as one thread can tell: nothing after it happens."""


def read_folder(folder: Path, *, index_first: bool) -> dict[str, torch.Tensor] | None:
    """What a reader of a Hugging Face folder finds; which of two sets it takes is its own rule."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() and not (index_first and index.exists()):
        return load_file(single)
    if not index.exists():
        return None
    named: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return {key: load_file(folder / name)[key] for key, name in named.items()}


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Two runs with other values of the same six tensors, 256 bytes each."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for name in ("old", "new"):
        weights = {f"w{number}": torch.randn(8, 8) for number in range(6)}
        import_checkpoint(saved(root / f"{name}.pth", weights), str(root / name))
        made.append((str(root / name), weights))
    return made


@pytest.mark.parametrize(
    ("old_bytes", "new_bytes"), [(9999, 9999), (9999, 600), (600, 9999), (600, 900), (900, 600), (600, 600)]
)
def test_a_kill_while_weights_are_replaced_leaves_a_whole_set_and_never_a_mixed_one(
    old_bytes: int, new_bytes: int, two_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old_run, old), (new_run, new) = two_models
    folder, seen, killed = tmp_path / "hf", set(), True
    for nth in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        export_checkpoint(old_run, "latest", str(folder), form="hf", max_shard_bytes=old_bytes)
        (folder / "config.json").write_text("mine")
        left = itertools.count(nth, -1)

        def observe(operation: Operation, left: Iterator[int] = left) -> None:
            if "hf/" in f"{operation.path} {operation.target}" and operation.kind != "mkdir" and next(left) <= 0:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(outbox, "Store", lambda root, observe=observe: Store(root, observer=observe))
            with contextlib.suppress(Killed):
                export_checkpoint(new_run, "latest", str(folder), form="hf", max_shard_bytes=new_bytes, force=True)
                killed = False
        for index_first in (False, True):
            found = read_folder(folder, index_first=index_first)
            whole = [name for name, one in (("old", old), ("new", new)) if found and not differences(one, found)]
            assert whole or (found is None and old_bytes == new_bytes == 600), f"operation {nth}"
            seen |= set(whole)
        export_checkpoint(new_run, "latest", str(folder), form="hf", max_shard_bytes=new_bytes, force=True)
        assert differences(new, read_folder(folder, index_first=True)) == [], "the same command again finishes"
        assert len(os.listdir(folder)) == {9999: 1, 900: 3, 600: 4}[new_bytes] + 1
        if not killed:
            break
    assert not killed
    assert nth >= 1
    assert seen == {"old", "new"}


@pytest.mark.parametrize("form", ["pth", "safetensors", "hf"])
def test_a_disk_that_fills_up_leaves_no_part_of_an_export(
    form: Any, run_dir: str, tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    (tmp_path / "out").mkdir()
    full_disk()
    with pytest.raises(StorageError, match="was not written: the disk is full or a quota is exceeded"):
        export_checkpoint(run_dir, "latest", str(tmp_path / "out" / "w"), form=form)
    assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Every fsync of the exports fails as on a full disk: the last moment at which it can."""

    def fill() -> None:
        from dist_train.checkpoint import outbox

        monkeypatch.setattr(outbox.os, "fsync", fail_with_full_disk)

    return fill


def test_a_damaged_checkpoint_is_not_exported(run_dir: str, tmp_path: Path) -> None:
    (path,) = Path(run_dir).glob("checkpoints/*/model-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"cannot be used: model-.* has digest"):
        export_checkpoint(run_dir, "latest", str(tmp_path / "w.pth"))
    assert not (tmp_path / "w.pth").exists()


def test_a_checkpoint_that_training_prunes_meanwhile_is_chosen_again(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(Store(run_dir), "checkpoints/step-00000001", find_checkpoint(run_dir, "latest")[2])])
    monkeypatch.setattr(
        exchange, "find_checkpoint", lambda *args: next(answers, None) or find_checkpoint(run_dir, "latest")
    )
    assert export_checkpoint(run_dir, "latest", str(tmp_path / "w.pth")).checkpoint.endswith("step-00000003")


def test_an_export_without_training_state_says_what_it_leaves_out(run_dir: str, tmp_path: Path) -> None:
    done = export_checkpoint(run_dir, "latest", str(tmp_path / "w.pth"), weights_only=True)
    assert done.left_out == ["the state of the optimizer, scheduler and scaler"]
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert "optimizer_state_dict" not in loaded
    assert loaded["val_smape"] == 42.15
