"""Weights for inference: which checkpoint, verified, and nothing but the model is touched."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
from torch import nn

import dist_train as dt
from dist_train.checkpoint.inference import find_checkpoint, load_model
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    StateMismatchError,
)
from dist_train.rng import capture_rng
from tests.support.small_run import EACH_EPOCH, SmallRun, small_model, smooth_model
from tests.support.twins import same_bits

BEST, LAST = "step-00000010", "step-00000015"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Three epochs, of which the second is the best."""
    loop = SmallRun(run_dir=tmp_path_factory.mktemp("trained") / "run", policy=EACH_EPOCH)
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train()
    return loop


@pytest.fixture
def run_dir(trained: SmallRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.run_dir, tmp_path / "run", symlinks=True))


def blank() -> nn.Module:
    model = small_model()
    for value in model.state_dict().values():
        value.zero_()
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(same_bits(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_latest_weights_and_buffers_are_those_that_training_ended_with(trained: SmallRun) -> None:
    model = blank()
    assert load_model(str(trained.run_dir), "latest", model) is model
    assert equal(model, trained.prepared)
    assert int(model.state_dict()["1.num_batches_tracked"]) == 15


def test_the_best_is_that_of_the_monitored_metric(run_dir: Path) -> None:
    best, by_path = blank(), blank()
    load_model(str(run_dir), "best", best)
    load_model(str(run_dir), str(run_dir / "checkpoints" / BEST), by_path)
    assert equal(best, by_path)
    assert int(best.state_dict()["1.num_batches_tracked"]) == 10


def test_the_best_does_not_depend_on_the_link(run_dir: Path) -> None:
    (run_dir / "best").unlink()
    os.symlink(f"checkpoints/{LAST}", run_dir / "best")
    assert find_checkpoint(str(run_dir), "best")[1] == f"checkpoints/{BEST}"


@pytest.mark.parametrize("named", ["absolute", "relative", "step"])
def test_a_checkpoint_is_found_by_its_path_or_its_step(
    named: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    full = f"{run_dir}/checkpoints/{BEST}"
    path = {"absolute": full, "relative": f"run/checkpoints/{BEST}", "step": "step:10"}[named]
    store, name, manifest = find_checkpoint(str(run_dir), path)
    assert manifest.progress.global_step == 10
    assert store.path(name).resolve() == (run_dir / "checkpoints" / BEST).resolve()


def test_loading_changes_nothing_but_the_model(run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    model = blank()
    model.eval()
    rng = capture_rng()
    load_model(str(run_dir), "latest", model)
    assert capture_rng() == rng
    assert not model.training
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_wrapped_model_is_filled_too(run_dir: Path, trained: SmallRun) -> None:
    model = blank()
    load_model(str(run_dir), "latest", nn.DataParallel(model))
    assert equal(model, trained.prepared)


def test_a_directory_without_checkpoints_has_neither(tmp_path: Path) -> None:
    for which in ("latest", "best"):
        with pytest.raises(NoCheckpointError, match=f"{tmp_path} is not a run directory"):
            load_model(str(tmp_path), which, blank())


def test_a_run_without_metrics_has_no_best(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "run", epochs=1, policy=CheckpointPolicy(), metrics=lambda run: {}).train()
    with pytest.raises(NoCheckpointError, match="holds no best checkpoint: no monitored metric"):
        load_model(str(tmp_path / "run"), "best", small_model())
    assert load_model(str(tmp_path / "run"), "latest", small_model())


def test_a_name_that_is_nothing_is_an_error_that_says_what_may_be_given(run_dir: Path) -> None:
    with pytest.raises(
        NoCheckpointError, match=r"'newest' is no checkpoint: expected latest, best, epoch:10, step:1200 or the path"
    ):
        load_model(str(run_dir), "newest", blank())


def test_a_folder_that_was_never_committed_is_refused(run_dir: Path) -> None:
    (run_dir / "checkpoints" / LAST / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        load_model(str(run_dir), str(run_dir / "checkpoints" / LAST), blank())


def test_a_flipped_byte_is_found_before_the_model_is_touched(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / LAST / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = blank()
    with pytest.raises(
        CorruptCheckpointError, match=r"cannot be used: model-00001-of-00001.safetensors.*dist-train ls"
    ):
        load_model(str(run_dir), "latest", model)
    assert equal(model, blank())


def test_a_model_that_does_not_fit_is_unchanged(run_dir: Path) -> None:
    model = smooth_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError, match=r"does not fit the model: .* The model is unchanged"):
        load_model(str(run_dir), "latest", model)
    assert all(same_bits(before[name], value) for name, value in model.state_dict().items())


def test_a_model_without_memory_is_refused_and_not_left_as_it_is(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with dt.Run(str(tmp_path / "run"), model=model) as run:
        for _ in run.epochs(1):
            run.step()
    with pytest.raises(StateMismatchError, match=r"model/bias and 1 more of the model on the meta device.*to_empty"):
        load_model(str(tmp_path / "run"), "latest", nn.Linear(2, 1, device="meta"))
    filled = load_model(str(tmp_path / "run"), "latest", nn.Linear(2, 1, device="meta").to_empty(device="cpu"))
    assert filled.weight.tolist() == model.weight.tolist()


def test_what_is_no_run_is_told_as_such(tmp_path: Path) -> None:
    with dt.Run(str(tmp_path / "run"), model=nn.Linear(2, 1)) as run:
        for _ in run.epochs(1):
            run.step()
    model, inner = nn.Linear(2, 1), str(tmp_path / "run/checkpoints/step-00000001")
    for place, told in (
        (inner, "is one checkpoint, expected the run directory, which is"),
        (str(tmp_path / "nothing"), "there is no such directory"),
        (str(tmp_path), "is not a run directory"),
    ):
        with pytest.raises(NoCheckpointError, match=told):
            load_model(place, "latest", model)
    load_model(str(tmp_path / "run"), inner, model)
