"""What a sharded model asks of a run besides an exact resume: evaluation, windows, hosts, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import carved_models
from tests.support.forked import run_ranks
from tests.support.fsdp_parts import drop_window, evaluate, refused, train

pytestmark = pytest.mark.distributed


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one["weights"].keys() == other["weights"].keys()
    pairs = [(torch.tensor(value), torch.tensor(other["weights"][name])) for name, value in one["weights"].items()]
    return all(torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) for mine, theirs in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank: there is nobody to share with, and the model is as it was made."""
    (found,) = run_ranks(train, 1, str(tmp_path_factory.mktemp("alone") / "run"), {"sharding": "fsdp"})
    assert found["placements"] == []
    return dict(found)


def test_the_trainer_shards_and_trains_what_one_rank_trains(tmp_path: Path, alone: dict[str, Any]) -> None:
    for found in run_ranks(train, 2, str(tmp_path / "run"), {"sharding": "fsdp"}):
        assert found["placements"] == ["(Shard(dim=0),)"]
        assert found["units"] == ["", "1", "2"]  # the blocks, each gathered alone
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        assert same_weights(found, alone)


def test_hosts_keep_copies_of_what_their_ranks_share(tmp_path: Path, alone: dict[str, Any]) -> None:
    options = {"sharding": "hsdp", "hosts": 2, "max_grad_norm": 100.0}
    for found in run_ranks(train, 4, str(tmp_path / "run"), options):
        assert found["placements"] == ["(Replicate(), Shard(dim=0))"]
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
        assert same_weights(found, alone)
    further = {"sharding": "fsdp", "epochs": 3, "max_grad_norm": 100.0}
    (first, second) = run_ranks(train, 2, str(tmp_path / "run"), further)
    assert first["step"] == 6
    assert first["weights"] == second["weights"]


def test_half_precision_trains_blocks_in_it_and_sums_in_full(tmp_path: Path, alone: dict[str, Any]) -> None:
    (found, _) = run_ranks(train, 2, str(tmp_path / "run"), {"sharding": "fsdp", "mixed_precision": "bf16"})
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=0.05)
    assert found["metrics"] != pytest.approx(alone["metrics"], rel=1e-6)


def test_a_compiled_model_is_sharded_evaluated_and_saved_by_its_own_names(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    run = str(tmp_path / "run")
    (found, _) = run_ranks(train, 2, run, {"sharding": "fsdp", "compiled": True})
    assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    assert same_weights(found, alone)
    further = {"sharding": "fsdp", "epochs": 3}
    (straight, _) = run_ranks(train, 2, str(tmp_path / "straight"), further)
    for found in (run_ranks(train, 2, run, {**further, "compiled": True})[0], straight):
        assert found["weights"] == straight["weights"]
    (on_one,) = run_ranks(train, 1, run, {**further, "epochs": 4})
    assert on_one["step"] == 8


def test_ranks_that_initialise_apart_train_the_main_ranks_model(tmp_path: Path, alone: dict[str, Any]) -> None:
    (found, _) = run_ranks(train, 2, str(tmp_path / "run"), {"sharding": "fsdp"}, 7, True)
    assert same_weights(found, alone)


def test_ranks_without_samples_take_part_in_the_trainers_evaluation(tmp_path: Path) -> None:
    (alone,) = run_ranks(train, 1, str(tmp_path / "alone"), {"sharding": "fsdp"}, 3)
    for found in run_ranks(train, 4, str(tmp_path / "run"), {"sharding": "fsdp"}, 3):
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(7, 2), (7, 1), (2, 4)])
def test_an_own_loops_evaluation_counts_each_sample_once(num_samples: int, batch_size: int, tmp_path: Path) -> None:
    (alone,) = run_ranks(evaluate, 1, str(tmp_path / "alone"), num_samples, batch_size)
    found = run_ranks(evaluate, 3, str(tmp_path / "run"), num_samples, batch_size)
    assert len({one["batches"] for one in found}) == 1  # each forward pass is collective
    for one in found:
        assert one["all_sharded"], "evaluation left the root's parameters gathered"
        assert one["count"] == num_samples
        assert one["by_hand"] == pytest.approx(one["val"], rel=1e-6)
        assert one["val"] == pytest.approx(alone["val"], rel=1e-5)


def test_gradients_of_a_window_that_was_given_up_are_gone() -> None:
    assert run_ranks(drop_window, 2) == [True, True]


@pytest.mark.parametrize(
    ("what", "told", "world_size"),
    [
        ("ignored plugin", "leaves it out on this device", 2),
        ("first version", "Give fsdp_version=2", 1),
        ("mixture", "2 trained parameters whose gradients nobody would average", 2),
        ("uneven hosts", r"their hosts have \[3, 3, 3, 1\]", 4),
        ("half a batch norm", "1 BatchNorm1d, whose weights FSDP2 casts to bf16", 2),
        ("state before the first step", "Adagrad holds state before its first step", 2),
        ("sharded already", "The model is sharded already", 2),
        ("wrapped already", "holds, a DistributedDataParallel", 2),
        ("a scalar", r"parameters without a dimension \(temperature\)", 2),
        ("another model's optimizer", r"AdamW trains \d+ tensors that are no parameters of the model", 2),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(what: str, told: str, world_size: int, tmp_path: Path) -> None:
    for message in run_ranks(refused, world_size, what, str(tmp_path / "run")):
        assert re.search(told, message), message


def test_embeddings_that_accelerate_would_shard_twice_are_gathered_with_the_rest(tmp_path: Path) -> None:
    sharded = run_ranks(carved_models.train, 2, str(tmp_path), "fsdp")[0]
    (alone,) = run_ranks(carved_models.train, 1, str(tmp_path), "none")
    for name, found in sharded.items():
        assert same_weights(found, alone[name]), name
        assert found["own"]
    units = {name: found["units"] for name, found in sharded.items()}
    assert units["EndInUnit"] == ["Block", "Embeddings"]
    assert {name for name, one in units.items() if one == ["Block"]} == {"ThreeEnds", "TiedToUnit", "Repeated"}
