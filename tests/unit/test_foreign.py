"""Whose checkpoint is it, and which part is which: the files and folders that people bring."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import nn

from dist_train.checkpoint.exchange import import_checkpoint, load_dictionary
from dist_train.checkpoint.facts import mode_of, read_facts
from dist_train.checkpoint.foreign import Foreign, ImportOptions, read_foreign
from dist_train.checkpoint.inference import find_checkpoint, load_model
from dist_train.errors import ConfigError, CorruptCheckpointError, NoCheckpointError
from dist_train.run import Run
from tests.support.old_checkpoint import build, build_optimizer, old_checkpoint, update
from tests.unit.test_exchange import differences, saved


def read(source: Path | str, **options: Any) -> Foreign:
    return read_foreign(str(source), ImportOptions(**options), load_dictionary)


def prefixed(prefix: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


WEIGHTS = build("plain").state_dict()


# Dictionaries


@pytest.mark.parametrize(
    "keys",
    [
        ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict"),
        ("state_dict", "optimizer", "lr_scheduler", "scaler"),
        ("model", "optim", "sched", "grad_scaler"),
        ("net", "optimizer_state", "lr_scheduler_state_dict", "native_amp_scaling_state"),
    ],
)
def test_parts_are_found_under_the_names_that_people_use(keys: tuple[str, ...], tmp_path: Path) -> None:
    old = old_checkpoint()
    usual = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "scaler_state_dict")
    renamed = {keys[usual.index(key)] if key in usual else key: value for key, value in old.items()}
    foreign = read(saved(tmp_path / "a.pt", renamed))
    found = (foreign.models[""], foreign.optimizers[""], foreign.schedulers[""], foreign.scaler)
    assert differences([old[key] for key in usual], list(found)) == []
    assert foreign.facts == {key: old[key] for key in ("epoch", "val_smape", "train_loss", "best_val_smape")}
    assert foreign.notes == []


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_what_wrappers_put_before_names_is_taken_off(prefix: str, tmp_path: Path) -> None:
    foreign = read(saved(tmp_path / "a.pt", {"model": prefixed(prefix, WEIGHTS)}))
    assert foreign.models[""].keys() == WEIGHTS.keys()
    assert f"{len(WEIGHTS)} names" in " ".join(foreign.notes)
    kept = read(tmp_path / "a.pt", keep_names=True)
    assert kept.models[""].keys() == prefixed(prefix, WEIGHTS).keys()


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    weights = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    assert read(saved(tmp_path / "a.pt", weights)).models[""].keys() == weights.keys()


def test_a_bare_state_dict_is_weights_only(tmp_path: Path) -> None:
    adopted = import_checkpoint(saved(tmp_path / "a.pth", WEIGHTS), str(tmp_path / "run"))
    assert adopted.kind == "a bare state_dict (weights only)"
    assert adopted.absent == ["optimizer", "scheduler", "scaler", "rng", "user"]
    assert (adopted.epochs_completed, adopted.global_step) == (0, 0)
    assert "--epochs-completed" in " ".join(adopted.notes)


def test_a_run_starts_its_optimizer_fresh_where_there_is_none(tmp_path: Path) -> None:
    import_checkpoint(saved(tmp_path / "a.pth", WEIGHTS), str(tmp_path / "run"), epochs_completed=2)
    model = build("plain")
    optimizer = build_optimizer(model, "adamw")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with Run(str(tmp_path / "run"), model=model, optimizer=optimizer, scheduler=schedule, resume="must") as run:
        assert run.epochs_completed == 2
        assert differences(dict(model.state_dict()), dict(WEIGHTS)) == []
        assert not optimizer.state
        for _ in run.epochs(3):
            update("plain", model, optimizer, 0)
            run.step()
    assert run.epochs_completed == 3


def test_an_optimizer_entry_that_is_none_of_torch_is_told(tmp_path: Path) -> None:
    foreign = read(saved(tmp_path / "a.pth", {"model": WEIGHTS, "optimizer": {"name": "adam"}}))
    assert foreign.notes == ["optimizer is no state of a torch optimizer and was not taken"]


def test_arguments_in_a_namespace_load_without_running_anything(tmp_path: Path) -> None:
    foreign = read(saved(tmp_path / "a.pth", {"model": WEIGHTS, "args": Namespace(lr=0.1)}))
    assert foreign.facts["args"].lr == 0.1
    adopted = import_checkpoint(str(tmp_path / "a.pth"), str(tmp_path / "run"))
    assert any("args" in note for note in adopted.notes)


@pytest.mark.parametrize("options", [{"mode": "up"}, {"without": ("weights",)}, {"epochs_completed": -1}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ImportOptions(**options)


# Lightning


def lightning(**more: Any) -> dict[str, Any]:
    """The shape of a .ckpt of Lightning 2, saved by ModelCheckpoint at the end of the third epoch."""
    old = old_checkpoint()
    watched = {"monitor": "val_loss", "best_model_score": torch.tensor(0.25), "current_score": torch.tensor(0.5)}
    progress = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    return {
        "epoch": 2,
        "global_step": 30,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.", old["model_state_dict"]),
        "loops": {
            "fit_loop": {
                "epoch_progress": {"total": progress, "current": progress},
                "epoch_loop.batch_progress": {"is_last_batch": True},
            }
        },
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_epochs': 1}": watched},
        "optimizer_states": [old["optimizer_state_dict"]],
        "lr_schedulers": [old["scheduler_state_dict"]],
        "MixedPrecision": old["scaler_state_dict"],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
        **more,
    }


def test_a_lightning_checkpoint_is_imported_whole(tmp_path: Path) -> None:
    adopted = import_checkpoint(saved(tmp_path / "a.ckpt", lightning()), str(tmp_path / "run"))
    assert adopted.kind == "a checkpoint of Lightning 2.4.0"
    assert (adopted.epochs_completed, adopted.global_step) == (3, 30)
    assert adopted.absent == ["rng", "user"]
    assert adopted.metrics == {"val_loss": 0.5}
    assert adopted.best == {
        "monitor": "val_loss",
        "mode": "min",
        "value": 0.25,
        "global_step": 0,
        "epochs_completed": 0,
    }
    assert "6 names: model. taken off" not in adopted.notes  # BatchNorm has buffers, too
    assert f"{len(WEIGHTS)} names: model. taken off" in adopted.notes
    model = build("plain")
    load_model(str(tmp_path / "run"), "latest", model)
    assert differences(dict(model.state_dict()), old_checkpoint()["model_state_dict"]) == []


@pytest.mark.parametrize(
    ("ready", "last_batch", "epochs", "note"),
    [(3, True, 3, False), (3, False, 2, True), (2, True, 2, False)],
    ids=["at an epoch's end", "in mid-epoch", "after the fit"],
)
def test_lightnings_epochs_are_counted_as_completed_ones(
    ready: int, last_batch: bool, epochs: int, note: bool, tmp_path: Path
) -> None:
    loops = {
        "fit_loop": {
            "epoch_progress": {"current": {"ready": ready, "completed": 2}},
            "epoch_loop.batch_progress": {"is_last_batch": last_batch},
        }
    }
    foreign = read(saved(tmp_path / "a.ckpt", lightning(loops=loops)))
    assert foreign.facts["epochs_completed"] == epochs
    assert any("middle of an epoch" in one for one in foreign.notes) is note


def test_one_module_of_a_lightning_module_is_taken_by_its_prefix(tmp_path: Path) -> None:
    weights = {**prefixed("net.", WEIGHTS), "loss.weight": torch.ones(3)}
    path = saved(tmp_path / "a.ckpt", lightning(state_dict=weights))
    assert "--prefix takes those of one of its modules" in " ".join(read(path).notes)
    foreign = read(path, prefix="net.")
    assert foreign.models[""].keys() == WEIGHTS.keys()
    assert "loss.weight" in " ".join(foreign.notes)
    with pytest.raises(ConfigError, match=r"No weight's name begins with 'nothing\.'"):
        read(path, prefix="nothing.")


def test_several_optimizers_of_lightning_need_names(tmp_path: Path) -> None:
    one = old_checkpoint()["optimizer_state_dict"]
    path = saved(tmp_path / "a.ckpt", lightning(optimizer_states=[one, one]))
    with pytest.raises(ConfigError, match=r"holds 2 optimizers; give their names in order"):
        read(path)
    assert read(path, names=("generator", "discriminator")).optimizers.keys() == {"generator", "discriminator"}


# Folders


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps what it was first made with in the process, for other tests to stumble over."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_folder_that_accelerate_saved_is_imported_and_continued(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = build("plain")
    optimizer = build_optimizer(model, "adamw")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    for number in range(3):
        update("plain", prepared, wrapped, number)
        schedule.step()
    accelerator.save_state(str(tmp_path / "state"))
    adopted = import_checkpoint(str(tmp_path / "state"), str(tmp_path / "run"), epochs_completed=3)
    assert adopted.kind == "a folder of Accelerate's save_state"
    assert adopted.global_step == 3, "from the optimizer's own count"
    assert adopted.absent == ["scheduler", "scaler", "rng", "user"]
    assert "random_states_0.pkl" in " ".join(adopted.notes)
    again = build("plain")
    restored = build_optimizer(again, "adamw")
    with Run(str(tmp_path / "run"), model=again, optimizer=restored, resume="must"):
        pass
    assert differences(dict(again.state_dict()), dict(model.state_dict())) == []
    assert differences(restored.state_dict()["state"], optimizer.state_dict()["state"]) == []


def test_a_folder_of_several_models_goes_by_the_names_that_are_given(tmp_path: Path) -> None:
    for number in ("", "_1"):
        save_file({"weight": torch.full((2,), float(len(number)))}, tmp_path / f"model{number}.safetensors")
        torch.save(old_checkpoint()["optimizer_state_dict"], tmp_path / f"optimizer{number}.bin")
    with pytest.raises(ConfigError, match="holds 2 models; give their names in order"):
        read(tmp_path)
    foreign = read(tmp_path, names=("generator", "critic"))
    assert {name: float(weights["weight"][0]) for name, weights in foreign.models.items()} == {
        "generator": 0.0,
        "critic": 2.0,
    }
    assert foreign.optimizers.keys() == {"generator", "critic"}


@pytest.mark.parametrize(("epoch", "notes"), [(3.0, []), (2.5, ["it was saved in the middle of an epoch (2.50)"])])
def test_a_folder_of_transformers_trainer(epoch: float, notes: list[str], tmp_path: Path) -> None:
    old = old_checkpoint()
    save_file(dict(WEIGHTS), tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save(old["optimizer_state_dict"], tmp_path / "optimizer.pt")
    torch.save(old["scheduler_state_dict"], tmp_path / "scheduler.pt")
    history = [{"step": 20, "eval_loss": 3.0}, {"step": 30, "loss": 1.0}, {"step": 30, "eval_loss": 0.5}]
    state = {"epoch": epoch, "global_step": 30, "log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text("{}")
    foreign = read(tmp_path)
    assert foreign.kind == "a checkpoint of transformers' Trainer"
    assert foreign.facts == {"epochs_completed": int(epoch), "global_step": 30, "eval_loss": 0.5}
    assert differences(old["optimizer_state_dict"], foreign.optimizers[""]) == []
    assert [note.partition(", which")[0] for note in foreign.notes if "middle" in note] == notes
    assert foreign.attached == [str(tmp_path / "config.json")]


def test_weights_in_bin_files_and_their_index(tmp_path: Path) -> None:
    names = list(WEIGHTS)
    torch.save({name: WEIGHTS[name] for name in names[:3]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: WEIGHTS[name] for name in names[3:]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {name: f"pytorch_model-0000{1 + (names.index(name) >= 3)}-of-00002.bin" for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert differences(dict(WEIGHTS), read(tmp_path).models[""]) == []


def test_tied_weights_that_safetensors_store_once_load_whichever_name_it_was(tmp_path: Path) -> None:
    tied = build("tied").state_dict()
    for number, name in enumerate(tied):
        save_file({name: tied[name]}, tmp_path / f"{number}.safetensors")
        import_checkpoint(str(tmp_path / f"{number}.safetensors"), str(tmp_path / f"run-{number}"))
        model = build("tied")
        nn.init.zeros_(model.embedding.weight)  # type: ignore[arg-type, union-attr]
        load_model(str(tmp_path / f"run-{number}"), "latest", model)
        assert differences(dict(model.state_dict()), dict(tied)) == []


def test_safetensors_that_are_damaged_or_empty_are_named(tmp_path: Path) -> None:
    save_file(dict(WEIGHTS), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-10])
    with pytest.raises(CorruptCheckpointError, match=r"a\.safetensors cannot be read as safetensors"):
        read(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    with pytest.raises(CorruptCheckpointError, match="holds no tensors"):
        read(tmp_path / "b.safetensors")


def test_folders_that_are_no_foreign_checkpoints_are_told_from_each_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoCheckpointError, match="holds no model that is known"):
        read(tmp_path / "empty")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "__0_0.distcp").touch()
    with pytest.raises(ConfigError, match="is a sharded checkpoint"):
        read(tmp_path / "sharded")
    import_checkpoint(saved(tmp_path / "a.pth", WEIGHTS), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="is of dist_train already: nothing has to be imported"):
        read(tmp_path / "run")
    with pytest.raises(ConfigError, match="is of dist_train already"):
        read(tmp_path / "run" / find_checkpoint(str(tmp_path / "run"), "latest")[1])


# Numbers


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val_smape", "min"),
        ("val_loss", "min"),
        ("val_acc", "max"),
        ("eval/accuracy", "max"),
        ("f1", "max"),
        ("acc_loss", "min"),
        ("whatever", "min"),
    ],
)
def test_whether_more_is_better_is_judged_by_the_name(metric: str, mode: str) -> None:
    assert mode_of(metric) == mode


def test_metrics_are_told_from_settings() -> None:
    told = {"val_smape": 1.0, "acc": 0.5, "lr": 0.1, "seed": 3, "accumulation_steps": 4, "loss_weight": 2.0}
    facts = read_facts(told, [])
    assert facts.metrics == {"val_smape": 1.0, "acc": 0.5}
    assert facts.others == ["lr", "seed", "accumulation_steps", "loss_weight"]


@pytest.mark.parametrize(
    ("told", "monitor", "epochs"),
    [
        ({"best_val_smape": 2.0, "val_smape": 3.0}, "val_smape", 0),
        ({"best_val_smape": 3.0, "val_smape": 3.0}, "val_smape", 5),
        ({"best_smape": 2.0, "val_smape": 3.0, "best_epoch": 1}, "val_smape", 2),
        ({"best_metric": 2.0}, "metric", 0),
    ],
    ids=["elsewhere", "here", "by epoch", "unknown"],
)
def test_the_best_is_of_the_metric_that_its_name_names(told: dict[str, Any], monitor: str, epochs: int) -> None:
    best = read_facts({"epoch": 4, "step": 50, **told}, []).best
    assert best is not None
    assert (best.monitor, best.epochs_completed, best.global_step) == (monitor, epochs, 50 if epochs == 5 else 0)


def test_a_schedule_that_counts_epochs_is_warned_of(tmp_path: Path) -> None:
    old = old_checkpoint()
    old["scheduler_state_dict"]["last_epoch"] = 13
    adopted = import_checkpoint(saved(tmp_path / "a.pth", old | {"global_step": 1300}), str(tmp_path / "run"))
    assert any("the scheduler counts epochs (last_epoch 13)" in note for note in adopted.notes)
    assert not any("counts epochs" in note for note in read(tmp_path / "a.pth").notes)
