"""What `StorageWriter` and `StorageReader` add to the contract: runs under torch's keys, and our own commands."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException, LoadPlan
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dist_train as dt
from dist_train.checkpoint import dcp_reader
from dist_train.checkpoint.dcp_keys import key_of, name_of
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.plan import group_of, key_in_file
from dist_train.cli import main
from dist_train.errors import DisagreementError, NoCheckpointError
from dist_train.run import Run


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch warns of every save without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def saved(path: Path, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    dcp.save({"model": model.state_dict(), "epoch": seed}, storage_writer=dt.StorageWriter(path))
    return model


# Names


@given(st.text(alphabet="model.optimizerdcp/~_@0,$ ", max_size=24) | st.text(max_size=8))
def test_every_key_has_a_name_of_its_own_and_comes_back(key: str) -> None:
    assert key_of(name_of(key)) == key
    assert key_in_file(name_of(key)) != "__metadata__"


@pytest.mark.parametrize(
    ("key", "name", "group"),
    [
        ("model.a.weight", "model/a.weight", "model"),
        ("optimizer.state.a.weight.exp_avg", "optimizer/state.a.weight.exp_avg", "optimizer"),
        ("layers.0.weight", "layers.0.weight", "state"),
        ("model/a", "dcp/model/a", "state"),
        ("model", "dcp/model", "state"),
        ("__metadata__", "dcp/__metadata__", "state"),
        ("model.__metadata__", "dcp/model.__metadata__", "state"),
    ],
)
def test_a_model_lies_where_a_run_would_put_it(key: str, name: str, group: str) -> None:
    assert (name_of(key), group_of(name)) == (name, group)


# What else reads the folder


def test_the_manifest_says_what_the_document_says(tmp_path: Path) -> None:
    first = saved_manifest(tmp_path / "a")
    assert (first.reason, first.sequence, first.parent, first.world_size) == ("dcp", 1, None, 1)
    assert list(first.state) == ["dcp"]
    assert set(first.state["dcp"]) == {"values", "planner_data", "fragments", "dtypes"}
    again = saved_manifest(tmp_path / "a")
    assert (again.run_id, again.sequence, again.parent) == (first.run_id, 2, first.digest)


def test_long_bytes_do_not_make_the_manifest_long(tmp_path: Path) -> None:
    """Every rank reads that."""
    state = {"loader": {"buffer": bytes(1_000_000), "few": bytes(100)}, "pair": (1, bytearray(500_000))}
    dcp.save(state, storage_writer=dt.StorageWriter(tmp_path / "a"))
    manifest = Manifest.from_json((tmp_path / "a/manifest.json").read_bytes())
    assert (tmp_path / "a/manifest.json").stat().st_size < 5000
    assert sorted(entry.shape[0] for entry in manifest.tensors.values()) == [500_000, 1_000_000]


def saved_manifest(path: Path) -> Manifest:
    saved(path)
    return Manifest.from_json((path / "manifest.json").read_bytes())


def test_safetensors_reads_the_model_as_it_is(tmp_path: Path) -> None:
    model = saved(tmp_path / "a")
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    tensors = load_file(tmp_path / "a" / index["weight_map"]["weight"])
    assert torch.equal(tensors["weight"], model.weight)
    assert set(tensors) == set(model.state_dict())


def test_load_model_reads_it(tmp_path: Path) -> None:
    model = saved(tmp_path / "a", seed=1)
    other = dt.load_model(str(tmp_path / "a"), "latest", nn.Linear(4, 3))
    assert torch.equal(other.weight, model.weight)


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(one) for one in arguments])
    return code, out.getvalue(), err.getvalue()


def test_the_commands_take_the_folder_itself(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a", seed=1), saved(tmp_path / "b", seed=2)
    code, out, _ = call("verify", tmp_path / "a")
    assert code == 0
    assert "every byte is as committed" in out
    code, out, _ = call("show", tmp_path / "a")
    assert code == 0
    assert out.startswith(f"Checkpoint {tmp_path / 'a'}")
    code, out, _ = call("diff", tmp_path / "a", "latest", tmp_path / "b")
    assert code == 1
    assert "2 of 2 tensors differ" in out
    code, _, err = call("export", tmp_path / "a", "--format", "safetensors", "--to", tmp_path / "out.safetensors")
    assert code == 0, err
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], model.weight)


def test_verify_names_the_damaged_file_of_such_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    file = next((tmp_path / "a").glob("model-*"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    code, out, _ = call("verify", tmp_path / "a")
    assert code == 1
    assert file.name in out


@pytest.mark.parametrize("command", [["ls"], ["prune"], ["pin", "--checkpoint", "latest"]], ids=lambda c: c[0])
def test_commands_that_manage_a_run_leave_it_alone(tmp_path: Path, command: list[str]) -> None:
    saved(tmp_path / "a")
    before = sorted(one.name for one in (tmp_path / "a").iterdir())
    code, _, err = call(command[0], tmp_path / "a", *command[2:])
    assert code != 0
    assert "belongs to no run" in err
    assert "`verify`, `diff` and `export` take such a checkpoint" in err
    assert sorted(one.name for one in (tmp_path / "a").iterdir()) == before


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune"])
def test_a_folder_of_such_checkpoints_is_told_from_a_run(tmp_path: Path, command: str) -> None:
    for step in (1, 2):
        saved(tmp_path / f"step-{step}")
    code, _, err = call(command, tmp_path)
    assert code != 0
    assert "checkpoints that belong to no run (step-1, step-2)" in err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("way", ["resume", "warm_start"])
def test_a_run_begins_with_the_weights_of_such_a_checkpoint(tmp_path: Path, way: str) -> None:
    model, other = saved(tmp_path / "a", seed=1), nn.Linear(4, 3)
    options: dict[str, Any] = {"resume": str(tmp_path / "a")}
    if way == "warm_start":
        options = {"options": dt.RunOptions(warm_start=str(tmp_path / "a"))}
    parts: dict[str, Any] = {"model": other, "optimizer": torch.optim.SGD(other.parameters())}
    quietly = contextlib.redirect_stdout(io.StringIO())
    with quietly, Run(str(tmp_path / "run"), **parts, **options):
        assert torch.equal(other.weight, model.weight)


# A run's checkpoint under torch's keys


class Counting:
    """Registered with the run."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "pair": (1, torch.ones(2)), "by_number": {3: "three"}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """A loss."""
        return self.b(self.norm(self.a(batch))).square().mean()  # type: ignore[no-any-return]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(run_dir: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    quietly = contextlib.redirect_stdout(io.StringIO())
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with quietly, Run(str(run_dir), **parts, policy=dt.CheckpointPolicy(at_end=False)) as run:
        run.register("counting", Counting(7))
        for _ in run.epochs(1):
            for seed in range(3):
                step(model, optimizer, seed)
                scheduler.step()
                run.step()
            run.save(wait=True)
    return next((run_dir / "checkpoints").glob("step-*")), model, optimizer


def test_dcp_loads_model_and_optimizer_of_a_run(tmp_path: Path) -> None:
    """And trains on to the same bits."""
    path, model, optimizer = train(tmp_path / "run")
    torch.manual_seed(1)
    other = Tied()
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    step(other, fresh, 9)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    dcp.load(state, storage_reader=dt.StorageReader(path))
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for seed in (5, 6):
        step(model, optimizer, seed)
        step(other, fresh, seed)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_what_else_a_run_keeps_is_found_by_its_kind(tmp_path: Path) -> None:
    path, model, _ = train(tmp_path / "run")
    everything = dcp.state_dict_loader._load_state_dict_from_keys(storage_reader=dt.StorageReader(path))
    assert everything["scheduler"]["last_epoch"] == 3
    assert everything["user"]["counting"]["count"] == 7
    assert everything["user"]["counting"]["by_number"] == {"3": "three"}
    assert everything["user"]["counting"]["pair"][0] == 1
    assert torch.equal(everything["user"]["counting"]["pair"][1], torch.ones(2))
    assert torch.equal(everything["model"]["b.weight"], model.state_dict()["a.weight"])


def test_a_run_directory_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(CheckpointException, match="is a run directory, expected one checkpoint"):
        dcp.load({}, storage_reader=dt.StorageReader(tmp_path / "run"))


# The parts


def test_the_writer_goes_to_another_process_without_its_copy_of_the_state(tmp_path: Path) -> None:
    writer = dt.StorageWriter(tmp_path / "a", cache_staged_state_dict=True)
    writer.state_dict_cache = {"a": torch.ones(1000)}  # as `stage` does where there is a GPU to pin it for
    sent = pickle.dumps(writer)
    assert len(sent) < 2000
    assert pickle.loads(sent).checkpoint_id == tmp_path / "a"
    dcp.save({"a": 1}, storage_writer=writer)
    pickle.dumps(writer)


def test_a_reader_that_is_kept_holds_no_file_and_reads_again(tmp_path: Path) -> None:
    """Else a checkpoint that is deleted while training goes on keeps its place on the disk."""
    model = saved(tmp_path / "a")
    reader = dt.StorageReader(tmp_path / "a")
    state = {"model": nn.Linear(4, 3).state_dict()}
    dcp.load(state, storage_reader=reader)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    planner = dcp.DefaultLoadPlanner()
    state["model"]["weight"].zero_()
    planner.set_up_planner(state, dt.StorageReader(tmp_path / "a").read_metadata())
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
    assert torch.equal(state["model"]["weight"], model.weight)


def test_each_file_is_verified_by_one_rank_and_as_evenly_as_can_be(tmp_path: Path) -> None:
    reader = dt.StorageReader(tmp_path / "a")
    dcp.save(
        {"model": {"w": torch.ones(5000)}, "b": torch.ones(4), "c": 1}, storage_writer=dt.StorageWriter(tmp_path / "a")
    )
    reader.read_metadata()
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner({"model": {"w": torch.zeros(5000)}, "b": torch.zeros(4)}, reader.read_metadata())
    plan = reader.prepare_local_plan(planner.create_local_plan())
    assert len(plan.storage_data.files) == 2
    shares = [
        one.storage_data.files for one in reader.prepare_global_plan([plan, plan, LoadPlan([], plan.storage_data)])
    ]
    assert sorted(name for share in shares for name in share) == sorted(plan.storage_data.files)
    assert [len(share) for share in shares] == [1, 1, 0]


def test_ranks_that_see_different_checkpoints_are_told(tmp_path: Path) -> None:
    plans = []
    for seed in (1, 2):
        saved(tmp_path / "a", seed)
        reader = dt.StorageReader(tmp_path / "a")
        reader.read_metadata()
        plans.append(reader.prepare_local_plan(LoadPlan([])))
    with pytest.raises(DisagreementError, match="The ranks see different checkpoints"):
        reader.prepare_global_plan(plans)


def test_an_older_torch_that_drops_the_reason_is_made_to_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 2.12 `dcp.load` says "metadata is None" of whatever could not be read."""
    monkeypatch.setattr(dcp_reader, "_TELLS_WHY", "99")
    reader = dt.StorageReader(tmp_path / "nothing")
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"a": torch.zeros(1)}, storage_reader=reader)
    (error,) = caught.value.failures.values()
    assert isinstance(error[0], NoCheckpointError)
    assert "there is no such folder" in str(error[0])
    with pytest.raises(NoCheckpointError, match="there is no such folder"):
        reader.read_metadata()
