"""Laws 4 and 5 on a mesh: ranks that share a copy of the model take the same samples, others different ones, each once
an epoch and counted once, over kills and over changes of the mesh's shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import dist_train as dt
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError
from dist_train.history import read_metrics
from tests.support import tensor_parallel
from tests.support.chaos import ChaosPlan
from tests.support.forked import run_ranks, run_script
from tests.support.launch import ROOT
from tests.support.small_run import events_of
from tests.support.specimen import Augmented
from tests.support.tensor_parallel import EPOCHS, EVALUATED, GLOBAL_BATCH, NUM_SAMPLES
from tests.support.twins import assert_same_run, consumed_samples

SPECIMEN = str(ROOT / "tests/support/tensor_parallel.py")
CHAOS = str(ROOT / "tests/support/chaos.py")
LIFE_SECONDS = 120.0
UPDATES_PER_EPOCH = -(-NUM_SAMPLES // GLOBAL_BATCH)

pytestmark = pytest.mark.distributed


def size(mesh: str) -> int:
    rows, columns = map(int, mesh.split("x"))
    return rows * columns


def train_on(meshes: list[str], folder: Path, seed: int = 0) -> Path:
    """Each life but the last is killed at a moment of training. Returns the run directory."""
    options = ["--run-dir", str(folder / "run"), "--samples", str(folder / "used")]
    plan = ChaosPlan(str(folder / "chaos"), seed, len(meshes) - 1, most_micro_steps=12, most_operations=40)
    for life, mesh in enumerate(meshes):
        arguments = [CHAOS, SPECIMEN, "--mesh", mesh, *options]
        if life + 1 < len(meshes):
            with pytest.raises(AssertionError, match="died without an answer"):
                run_script(size(mesh), *arguments, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
            assert len(plan.fired()) == life + 1
        else:
            run_script(size(mesh), *arguments, deadline_seconds=LIFE_SECONDS, extra=plan.to_environment())
    return folder / "run"


def records_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(Store(run_dir)) if record["kind"] == kind]


def require_each_sample_once(run_dir: Path, folder: Path) -> None:
    each_once = {epoch: dict.fromkeys(range(NUM_SAMPLES), 1) for epoch in range(EPOCHS)}
    assert consumed_samples(run_dir, folder / "used") == each_once
    steps = [record["global_step"] for record in records_of(run_dir, "step")]
    assert steps == list(range(1, UPDATES_PER_EPOCH * EPOCHS + 1))
    for record in records_of(run_dir, "epoch"):
        assert record["count"] == EVALUATED, "the loop counted samples of the evaluation twice, or not at all"
        assert record["by_hand"] == pytest.approx(record["val"], rel=1e-12)


def test_a_killed_run_on_a_mesh_equals_the_run_that_never_died(tmp_path: Path) -> None:
    whole = train_on(["2x2"], tmp_path / "whole")
    killed = train_on(["2x2", "2x2"], tmp_path / "killed", seed=3)
    assert events_of(killed, "resumed"), "the kill came before the first checkpoint: take another seed"
    assert_same_run(whole, killed)
    require_each_sample_once(killed, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [
        ["2x2", "2x1", "2x2"],
        ["2x2", "1x2", "2x2"],
        ["2x2", "4x1", "2x2"],
        ["2x2", "1x4", "2x2"],
        ["2x2", "1x1", "2x2"],
        ["1x2", "3x1", "2x2"],
    ],
    ids="-".join,
)
def test_other_meshes_go_on_with_each_sample_once(meshes: list[str], tmp_path: Path) -> None:
    check_change(meshes, tmp_path)


def test_a_mesh_of_another_shape_goes_on_with_each_sample_once(tmp_path: Path) -> None:
    check_change(["4x1", "2x2"], tmp_path)


def check_change(meshes: list[str], folder: Path) -> None:
    run_dir = train_on(meshes, folder, seed=3)
    resumed = events_of(run_dir, "resumed")
    assert resumed, "every kill came before the first checkpoint: take another seed"  # on a busy machine one may
    require_each_sample_once(run_dir, folder)
    require_alike_within_a_place(run_dir, meshes[-1])
    if all(mesh[0] != "1" for mesh in meshes):
        first, *_, last = ends_of(run_dir, meshes[-1])
        assert first["rng"] != last["rng"], "places that drop alike: the check above would not see a thing"


def ends_of(run_dir: Path, mesh: str) -> list[dict[str, Any]]:
    return [json.loads((run_dir / f"end-{rank}.json").read_text()) for rank in range(size(mesh))]


def require_alike_within_a_place(run_dir: Path, mesh: str) -> None:
    """The ranks of a place drew the same numbers, so that they still hold the same copies of plain parameters."""
    rows, columns = map(int, mesh.split("x"))
    ends = ends_of(run_dir, mesh)
    for row in range(rows):
        assert all(one == ends[row * columns] for one in ends[row * columns : (row + 1) * columns])


@pytest.mark.slow
def test_the_first_epoch_is_the_same_on_every_mesh(tmp_path: Path) -> None:
    """But for dropout, which is left out here: losses and evaluation agree to rounding."""
    found = [run_ranks(losses, size(mesh), mesh, str(tmp_path / mesh))[0] for mesh in ("1x1", "2x2", "1x2", "4x1")]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def losses(shape: str, folder: str) -> list[float]:
    tensor_parallel.nn.Dropout.forward = lambda module, inputs: inputs  # type: ignore[method-assign]
    tensor_parallel.sys.argv = ["tensor_parallel.py", "--mesh", shape, "--run-dir", folder, "--epochs", "1"]
    tensor_parallel.main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    records = read_metrics(Store(folder))
    return [record["loss"] for record in records if record["kind"] == "step"] + [records[-1]["val"]]


def places() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    other = init_device_mesh("cpu", (2, 4), mesh_dim_names=("tp", "batch"))
    sizes = {"global_batch_size": 8, "micro_batch_size": 1}

    def place(**options: Any) -> tuple[int, int, bool]:
        loader: Any = dt.data_loader(Augmented(16), **sizes, **options)
        return loader.batch_sampler.place.index, loader.batch_sampler.place.count, loader.batch_sampler.place.counts

    return {
        "hsdp_tp": place(mesh=mesh),
        "none": place(mesh=mesh, data_dims=()),
        "named": place(mesh=other, data_dims="batch"),
        "plain": place(),
        "refused": [
            message(lambda: place(mesh=mesh["dp_replicate"])),
            message(lambda: place(mesh=other)),
            message(lambda: place(mesh=other, data_dims=("dp", "batch"))),
            message(lambda: place(mesh=other, data_dims="batch", rank=0, world_size=4)),
            message(lambda: place(data_dims="dp")),
        ],
    }


def message(work: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        work()
    return str(caught.value)


def test_a_rank_finds_its_place_on_any_mesh() -> None:
    found = run_ranks(places, 8)
    assert [one["hsdp_tp"] for one in found] == [(rank // 2, 4, rank % 2 == 0) for rank in range(8)]
    assert [one["none"] for one in found] == [(0, 1, rank == 0) for rank in range(8)]
    assert [one["named"] for one in found] == [(rank % 4, 4, rank < 4) for rank in range(8)]
    assert [one["plain"] for one in found] == [(rank, 8, True) for rank in range(8)]
    part, unnamed, unknown, both, alone = found[0]["refused"]
    assert "give the mesh of all ranks" in part
    assert "are called tp, batch. Say over which" in unnamed
    assert "data_dims names dp" in unknown
    assert "leave out rank and world_size" in both
    assert "give mesh=" in alone


def apart(folder: str) -> list[str]:
    """Loops that would train apart, or count samples twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}

    def begin(loader: Any, *, averaged: bool) -> None:
        model = tensor_parallel.build(mesh, averaged=averaged)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dt.Run(folder, model=model, optimizer=optimizer, loader=loader) as run:
            next(iter(run.epochs(1)))

    by_hand = {"rank": mesh.get_local_rank("dp"), "world_size": 2}
    return [
        message(lambda: begin(dt.data_loader(Augmented(16), **sizes, mesh=mesh), averaged=False)),
        message(lambda: begin(dt.data_loader(Augmented(16), **sizes, **by_hand), averaged=True)),
        message(lambda: begin(dt.data_loader(Augmented(16), **sizes), averaged=True)),
    ]


def test_what_would_train_apart_or_count_twice_is_refused(tmp_path: Path) -> None:
    for not_averaged, twice, no_mesh in run_ranks(apart, 4, str(tmp_path)):
        assert (
            "nobody averages the gradients over these (down.bias, down.weight, norm.bias, norm.weight and"
            in not_averaged
        )
        assert "take the parts 0 of 2, 0 of 2, 1 of 2, 1 of 2" in twice
        assert "mesh=" in twice
        assert "has parameters on 2 of the 4 ranks (" in no_mesh
        assert "give dist_train.data_loader the mesh of all ranks (mesh=)" in no_mesh
