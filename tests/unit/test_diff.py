"""`dist-train diff`: settings, metrics, progress, and every tensor bit by bit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.checkpoint import comparison
from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.comparison import TensorDifference, compare_manifests, compare_tensors
from dist_train.checkpoint.manifest import CHECKPOINTS, Manifest, step_name
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.stripping import strip
from dist_train.checkpoint.tensor_file import DTYPES
from dist_train.cli import main
from dist_train.state import LiveState
from tests.support.manifests import manifest
from tests.support.saving_run import SoloRun, commits, draft
from tests.support.small_run import SmallRun

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 5, 10 and 15; nothing may change it."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    SmallRun(run_dir=run_dir, epochs=3, policy=CheckpointPolicy(every_epochs=1, keep_last=9)).train()
    return run_dir


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def facts(call: Call, *arguments: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(call("diff", *arguments, "--json")[1])
    return result


class Holder(nn.Module):
    """Nothing but buffers, of any dtype and shape."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def compare(tmp_path: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, TensorDifference]:
    """Saves both and compares what was saved, by name."""
    readers: list[CheckpointReader] = []
    manifests: list[Manifest] = []
    for name, tensors in (("a", a), ("b", b)):
        run = SoloRun(Store(tmp_path / name))
        run.live = LiveState(models={"": Holder(tensors)}, optimizers={})
        run.open()
        run.checkpointer.save(run.live.capture(), draft(1))
        run.checkpointer.wait()
        (done,) = commits(run.close())
        manifests.append(done.manifest)
        readers.append(CheckpointReader(run.store, done.path, done.manifest))
    read: list[int] = []
    found = list(compare_tensors(readers[0], readers[1], (manifests[0], manifests[1]), read.append))
    assert sum(read) == sum(tensor.nbytes for tensor in [*a.values(), *b.values()])
    return {one.name.removeprefix("model/"): one for one in found}


# Tensors


def test_every_dtype_is_compared_bit_by_bit(tmp_path: Path) -> None:
    bits = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 4, dtype=torch.uint8)
    a = {name: (bits % 2 if name == "BOOL" else bits).view(dtype).clone() for name, dtype in DTYPES.items()}
    b = {name: tensor.clone() for name, tensor in a.items()}
    for tensor in b.values():
        tensor.view(torch.uint8)[0] ^= 1
    assert {one.kind for one in compare(tmp_path / "same", a, a).values()} == {"equal"}
    for name, one in compare(tmp_path / "other", a, b).items():
        assert (one.kind, one.differing, one.not_finite) == ("differ", 1, 0), name
        assert 0 < one.max_abs < math.inf, name
        assert one.relative > 0, name


def test_how_much_is_measured(tmp_path: Path) -> None:
    a = {"w": torch.tensor([3.0, 4.0, 0.0]), "i": torch.tensor([1, 5]), "c": torch.tensor([3 + 4j, 0j])}
    b = {"w": torch.tensor([3.0, 4.5, 0.0]), "i": torch.tensor([1, 2]), "c": torch.tensor([0j, 0j])}
    found = compare(tmp_path, a, b)
    assert (found["w"].elements, found["w"].differing, found["w"].max_abs) == (3, 1, 0.5)
    assert found["w"].relative == pytest.approx(0.1)
    assert (found["i"].max_abs, found["c"].max_abs, found["c"].relative) == (3.0, 5.0, 1.0)


def test_a_nan_equals_itself_and_zero_has_a_sign(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    a = {"same": torch.tensor([nan, inf, 1.0]), "sign": torch.tensor([0.0]), "new": torch.tensor([1.0, inf, 2.0])}
    b = {"same": torch.tensor([nan, inf, 1.0]), "sign": torch.tensor([-0.0]), "new": torch.tensor([nan, -inf, 2.5])}
    found = compare(tmp_path, a, b)
    assert found["same"].kind == "equal"
    assert (found["sign"].kind, found["sign"].max_abs, found["sign"].relative) == ("differ", 0.0, 0.0)
    assert (found["new"].differing, found["new"].not_finite, found["new"].max_abs) == (3, 2, 0.5)
    assert found["new"].rank == math.inf


def test_other_shapes_dtypes_and_missing_tensors_are_named(tmp_path: Path) -> None:
    a = {"shape": torch.zeros(2, 3), "dtype": torch.zeros(2), "gone": torch.zeros(1), "empty": torch.zeros(0)}
    b = {"shape": torch.zeros(3, 2), "dtype": torch.zeros(2).half(), "new": torch.zeros(1), "empty": torch.zeros(0)}
    kinds = {name: one.kind for name, one in compare(tmp_path, a, b).items()}
    assert kinds == {"shape": "shape", "dtype": "dtype", "gone": "only in a", "empty": "equal", "new": "only in b"}


def test_memory_order_does_not_matter_to_values(tmp_path: Path) -> None:
    values = torch.randn(2, 3, 4, 5)
    a, b = {"w": values}, {"w": values.to(memory_format=torch.channels_last)}
    assert compare(tmp_path, a, b)["w"].kind == "equal"


def test_large_tensors_are_compared_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CHUNK_ELEMENTS", 7)
    largest = 0
    original = comparison._wide

    def watch(values: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, values.numel())
        return original(values)

    monkeypatch.setattr(comparison, "_wide", watch)
    a = {"w": torch.arange(100.0)}
    b = {"w": torch.arange(100.0)}
    b["w"][[0, 50, 99]] += 2
    found = compare(tmp_path, a, b)["w"]
    assert (found.differing, found.max_abs, largest) == (3, 2.0, 7)
    assert found.relative == pytest.approx(math.sqrt(12) / float(a["w"].norm()))


def test_a_tensor_that_is_tied_on_one_side_only_is_compared(tmp_path: Path) -> None:
    one = torch.ones(3)
    found = compare(tmp_path, {"x": one, "y": one}, {"x": one, "y": one + 1})
    assert {name: each.kind for name, each in found.items()} == {"x": "equal", "y": "differ"}


# What manifests say


def test_values_are_compared_by_place() -> None:
    a = manifest(1, metrics={"val": 2.0}, settings={"optimizer": [{"lr": 0.1}], "config": {"policy": {"keep_last": 3}}})
    b = manifest(2, metrics={"val": 2.5}, settings={"optimizer": [{"lr": 0.2}], "config": {"policy": {"keep_last": 3}}})
    found = compare_manifests(a, replace(b, state={"scheduler": {"last_epoch": 7}}, world_size=2))
    assert found["settings"] == {"optimizer/0/lr": (0.1, 0.2)}
    assert found["metrics"] == {"val": (2.0, 2.5)}
    assert found["progress"] == {"global_step": (1, 2)}
    assert found["state"] == {"scheduler/last_epoch": (None, 7)}
    assert found["environment"] == {"world_size": (1, 2)}


def test_who_wrote_it_and_when_is_no_difference() -> None:
    a = manifest(3, metrics={"val": math.nan}, train_loss=math.nan)
    b = replace(a, sequence=9, attempt=2, run_id="other", committed_at=7.0, parent="x", reason="end")
    assert not any(compare_manifests(a, b).values())


# The command


def test_a_checkpoint_equals_itself_and_its_copy_in_another_run(trained: Path, copy: Path, call: Call) -> None:
    code, out, err = call("diff", trained, "latest", copy / CHECKPOINTS / step_name(15))
    assert (code, err) == (0, "")
    text = "tensors are equal, bit for bit; so are settings, metrics and progress."
    assert text in " ".join(out.split())
    assert facts(call, trained, "latest", copy / CHECKPOINTS / step_name(15))["equal"]


def test_two_epochs_differ_in_progress_metrics_state_and_tensors(trained: Path, call: Call) -> None:
    code, out, err = call("diff", trained, "epoch:1", "epoch:3", "--top", 99)
    assert (code, err) == (1, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    assert lines["global_step"] == ["5", "15"]
    assert lines["scheduler/last_epoch"] == ["5", "15"]
    assert lines["val"] == ["1.0000", "0.4286"]
    assert lines["random"] == ["generators", "one", "state", "another"]
    assert lines["model/0.weight"][:2] == ["18", "18"]
    assert " tensors differ; largest: " in " ".join(out.split())


def test_the_largest_difference_comes_first_and_the_rest_on_request(trained: Path, call: Call) -> None:
    tensors = facts(call, trained, "epoch:1", "epoch:3")["tensors"]
    relative = [one["relative"] for one in tensors]
    assert relative == sorted(relative, key=lambda value: -math.inf if value == "inf" else -value)
    out = call("diff", trained, "epoch:1", "epoch:3", "--top", 2)[1]
    assert f"... and {len(tensors) - 2} more (--top {len(tensors)} or --json lists them all)" in out


def test_weights_only_compares_nothing_else(trained: Path, call: Call) -> None:
    found = facts(call, trained, "epoch:1", "epoch:3", "--weights-only")
    assert found["differences"] == {}
    assert {one["name"].split("/")[0] for one in found["tensors"]} == {"model"}
    assert call("diff", trained, "epoch:1", "epoch:1", "--weights-only")[0] == 0


def test_a_stripped_checkpoint_has_equal_weights_and_no_optimizer(copy: Path, trained: Path, call: Call) -> None:
    path = f"{CHECKPOINTS}/{step_name(5)}"
    full = read_checkpoint(Store(copy), path).manifest
    assert full is not None
    strip(Store(copy), path, full)
    assert call("diff", copy, "epoch:1", trained / path, "--weights-only")[0] == 0
    code, out, _ = call("diff", copy, "epoch:1", trained / path)
    assert code == 1
    assert "only in b: optimizer/" in " ".join(out.split())


def test_changed_settings_are_shown(trained: Path, tmp_path: Path, call: Call) -> None:
    other = tmp_path / "other"
    SmallRun(run_dir=other, epochs=3, lr=0.01, policy=CheckpointPolicy(every_epochs=1, keep_last=7)).train()
    found = facts(call, trained, "latest", other / CHECKPOINTS / step_name(15))["differences"]["settings"]
    assert found["config/policy/keep_last"] == [9, 7]
    assert found["optimizer/0/lr"] == [0.05, 0.01]


def test_a_damaged_checkpoint_is_not_compared(copy: Path, call: Call) -> None:
    shard = next((copy / CHECKPOINTS / step_name(5)).glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    code, out, err = call("diff", copy, "epoch:1", "epoch:3")
    assert (code, out) == (2, "")
    assert "has digest" in err
    assert err.count("\n") == 1


def test_trouble_exits_with_2(trained: Path, tmp_path: Path, call: Call) -> None:
    for arguments, expected in (
        ([tmp_path / "nowhere", "best", "latest"], "there is no such directory"),
        ([trained, "epoch:9", "latest"], "holds no checkpoint for epoch:9"),
        ([trained, "latest", "last"], "there is no such folder"),
    ):
        code, out, err = call("diff", *arguments)
        assert (code, out) == (2, "")
        assert expected in err


def test_nothing_is_changed_by_comparing(trained: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    call("diff", trained, "epoch:1", "epoch:3")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
