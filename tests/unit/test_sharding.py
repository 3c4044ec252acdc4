"""What is gathered at a time, how ranks and hosts make a mesh, and which settings are refused early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.fully_sharded import drop_unreduced_gradients, is_sharded, reshard
from dist_train.metrics import MAE, Mean, counting_nothing
from dist_train.sharding import (
    _mesh_shape,
    _require_apart,
    find_units,
    give_all_ranks_one_start,
    make_trainers_accelerator,
)
from dist_train.trainer import TrainConfig
from dist_train.world import SoloWorld


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)


class Expert(Block):
    pass


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList([Block(), Expert()])
        self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])


class World(SoloWorld):
    def __init__(self, rank: int, answers: list[Any]) -> None:
        super().__init__()
        self.rank, self.world_size, self.answers, self.received = rank, len(answers), answers, 0

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value if answer is None else answer for answer in self.answers]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        self.received += 1


def nested() -> nn.Module:
    """As a Lightning module around a transformer."""
    outer = nn.Module()
    outer.add_module("net", Listed())
    return outer


class Told(Listed):
    _no_split_modules = ("Expert", "LayerOfAnotherModel")


@pytest.mark.parametrize(
    ("model", "units"),
    [
        (Listed(), ["Block", "Expert"]),
        (nested(), ["Block", "Expert"]),
        (Told(), ["Expert"]),
        (nn.Sequential(nn.Linear(3, 3), Block(), Block()), ["Block"]),
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), Block()), []),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, batch_first=True), 2), ["TransformerEncoderLayer"]),
        (nn.Linear(3, 3), []),
    ],
)
def test_units_are_what_a_model_says_or_its_blocks(model: nn.Module, units: list[str]) -> None:
    assert find_units(model) == units


def test_a_unit_that_is_tied_to_the_rest_is_refused_with_the_parameter() -> None:
    model = Listed()
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    assert find_units(model) == []
    with pytest.raises(ConfigError, match=r"names Block, and blocks\.0\.linear\.weight belongs to .* \(it is tied\)"):
        _require_apart(model, ["Block"])
    assert _require_apart(model, ["ModuleList"]) == ["ModuleList"]


def test_a_unit_that_is_not_in_the_model_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"shard_units names Layer, .*Linear \(4\)"):
        make_trainers_accelerator("fsdp", Listed(), ["Block", "Layer"], SoloWorld(), cpu=True)


@pytest.mark.parametrize(
    ("kind", "ranks", "local", "shape"),
    [
        ("none", 4, 2, None),
        ("fsdp", 1, 1, None),
        ("hsdp", 1, 1, None),
        ("fsdp", 4, 2, (4,)),
        ("hsdp", 4, 2, (2, 2)),
        ("hsdp", 4, 4, (4,)),
        ("hsdp", 4, 1, None),
    ],
)
def test_the_mesh_follows_from_ranks_and_hosts(
    kind: str, ranks: int, local: int, shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert _mesh_shape(kind, World(0, [local] * ranks)) == shape


@pytest.mark.parametrize("sizes", [[3, 3, 3, 1], [3, 3, 3, 3]])
def test_hosts_of_different_sizes_are_refused(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="same number of ranks"):
        _mesh_shape("hsdp", World(0, list(sizes)))


def test_equal_weights_are_not_sent() -> None:
    for answers, received in (([None, None], 0), ([None, "another"], 2)):
        world = World(1, answers)
        give_all_ranks_one_start(nn.Linear(2, 2), world)
        assert world.received == received


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sharding": "zero"}, "give one of 'none', 'fsdp', 'hsdp'"),
        ({"sharding": "fsdp", "shard_units": "Block"}, "must be a sequence of class names"),
        ({"sharding": "fsdp", "shard_units": [Block]}, "must be a sequence of class names"),
        ({"shard_units": ("Block",)}, "has no effect without"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TrainConfig(run_dir="run", epochs=1, global_batch_size=8, **options)


def test_a_model_that_nobody_sharded_is_left_alone() -> None:
    model = Listed()
    assert not is_sharded(model)
    reshard([model])
    drop_unreduced_gradients(model)


def test_metrics_leave_out_what_they_are_given_for_the_others_sake() -> None:
    error, mean = MAE(), Mean()
    error.update(torch.ones(2), torch.zeros(2))
    with counting_nothing() as ignored:
        error.update(torch.full((2,), 9.0), torch.zeros(2))
        mean.update(3.0)
    mean.update(5.0)
    assert ignored == [error, mean]
    assert (error.compute(), mean.compute()) == (1.0, 5.0)
