"""data_loader(order=...): weighted or length-grouped orders keep what the built-in order promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_train as dt
from dist_train.data import SampleKey
from dist_train.errors import ConfigError
from tests.support.own_loaders import NUM_SAMPLES, Augmented, assert_same, train


def weighted(epoch: int) -> Any:
    """Repeats, and another length in each epoch."""
    return np.random.default_rng(epoch).choice(NUM_SAMPLES, size=20 + 4 * epoch, p=weights())


def weights() -> Any:
    raw = np.arange(1.0, NUM_SAMPLES + 1)
    return raw / raw.sum()


def loader(order: Any = weighted, **options: Any) -> Any:
    return dt.data_loader(Augmented(), global_batch_size=8, order=order, **options)


def keys(one: Any) -> list[SampleKey]:
    return [key for batch in one.batch_sampler for key in batch]


def test_the_samples_are_those_of_the_function_in_its_order() -> None:
    one = loader()
    for epoch in (0, 3):
        one.batch_sampler.set_position(epoch=epoch)
        assert [key.index for key in keys(one)] == weighted(epoch).tolist()
        assert len(one) == -(-len(weighted(epoch)) // 8)


def test_a_resume_seeks_in_it() -> None:
    one = loader()
    one.batch_sampler.set_position(epoch=2, samples_into_epoch=8)
    assert [key.index for key in keys(one)] == weighted(2)[8:].tolist()


def test_windows_are_the_same_samples_at_any_world_size() -> None:
    whole = [key.index for key in keys(loader())]
    parts = [keys(loader(micro_batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    for start in range(0, len(whole), 8):
        taken = [key.index for part in parts for key in part[start // 2 : start // 2 + 4]]
        assert Counter(taken) == Counter(whole[start : start + 8])


def test_a_sample_that_is_used_twice_is_augmented_anew_and_its_first_use_as_ever() -> None:
    twice = next(iter(loader(lambda epoch: [5, 5, 3])))
    once = next(iter(dt.data_loader(Augmented(), global_batch_size=NUM_SAMPLES, shuffle=False)))
    assert torch.equal(twice[0], once[5])
    assert torch.equal(twice[2], once[3])
    assert not torch.equal(twice[0], twice[1])
    assert float(twice[1][0]) == 5


def test_it_is_called_once_an_epoch() -> None:
    asked: list[int] = []

    def order(epoch: int) -> list[int]:
        asked.append(epoch)
        return [2, 1, 0]

    one = loader(order)
    for epoch in (0, 1, 2):
        one.batch_sampler.set_position(epoch=epoch)
        assert len(list(one)) == 1
        len(one)
        dt.data.describe_sampler(one)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one dataset index"),
        ([0.5, 1.0], r"order\(0\) gave float64 of shape \[2\]"),
        ([[0, 1]], r"of shape \[1, 2\]"),
        ([0, NUM_SAMPLES], r"indices from 0 to 26; the dataset has 26 samples, indices 0 to 25"),
        ([-1, 3], "indices from -1 to 3"),
        ([True, False], "gave bool"),
    ],
)
def test_what_is_no_order_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(lambda epoch: given)


def test_an_order_and_shuffle_contradict() -> None:
    with pytest.raises(ConfigError, match="order and shuffle=True contradict"):
        loader(shuffle=True)


def test_drop_last_that_leaves_nothing_is_refused_in_the_epoch_that_it_happens_in() -> None:
    one = loader(lambda epoch: range(10 - 5 * epoch), drop_last=True)
    assert len(one) == 1
    with pytest.raises(ConfigError, match="drop_last leaves nothing: 5 samples"):
        one.batch_sampler.set_position(epoch=1)


def test_tensors_and_ranges_are_orders() -> None:
    assert [key.index for key in keys(loader(lambda epoch: torch.tensor([3, 1])))] == [3, 1]
    assert [key.index for key in keys(loader(lambda epoch: range(3)))] == [0, 1, 2]


@pytest.mark.parametrize("leave_at", [2, 5])
def test_a_run_that_is_left_ends_as_one_that_is_not(leave_at: int, tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", loader)
    train(tmp_path / "left", loader, leave_at=leave_at)
    assert_same(train(tmp_path / "left", loader), straight)


def test_an_order_that_has_changed_in_mid_epoch_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, loader, leave_at=2)
    train(tmp_path, lambda: loader(lambda epoch: weighted(epoch)[::-1]), leave_at=3)
    assert "The order of samples has changed in mid-epoch" in capsys.readouterr().err


def test_an_order_instead_of_the_built_in_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, lambda: dt.data_loader(Augmented(), global_batch_size=8), leave_at=2)
    train(tmp_path, loader, leave_at=3)
    said = capsys.readouterr()
    assert "The order of samples has changed in mid-epoch" in said.err
    assert 'data.order: "built-in" -> ' in said.out


@pytest.mark.parametrize("leave_at", [2, 3])
def test_the_same_order_is_not_told(leave_at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, loader, leave_at=leave_at)
    train(tmp_path, loader, leave_at=leave_at + 2)
    said = capsys.readouterr()
    assert "order of samples" not in said.err
    assert "data.order" not in said.out
