"""BatchFeed: batches one at a time, the position inside a window, and what Accelerate is told of an epoch's end."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_train.errors import ConfigError
from dist_train.feed import BatchFeed
from dist_train.order import EpochLayout

CPU = torch.device("cpu")
LAYOUT = EpochLayout(num_samples=10, global_batch_size=4, micro_batch_size=1, world_size=1)


class GradientState:
    """Notes what is added, removed and, at each batch, whether the active loader is at its end."""

    def __init__(self) -> None:
        self.active: list[Any] = []

    def _add_dataloader(self, end: Any) -> None:
        self.active.append(end)

    def _remove_dataloader(self, end: Any) -> None:
        self.active.remove(end)


def accelerator() -> Any:
    return SimpleNamespace(gradient_state=GradientState(), gradient_accumulation_steps=99, step=3, sync_gradients=True)


def never() -> bool:
    return False


def batches(count: int) -> Iterator[torch.Tensor]:
    return (torch.tensor([number]) for number in range(count))


def test_batches_come_in_order_and_the_window_ends_after_4_8_and_10() -> None:
    feed = BatchFeed(None, CPU, rank=0)
    ends, seen = [], []
    for batch in feed.training_batches(batches(10), LAYOUT, never):
        seen.append(int(batch))
        feed.consume()
        if not feed.in_window:
            ends.append(len(seen))
    assert seen == list(range(10))
    assert ends == [4, 8, 10]


def weights_of(one: Any) -> list[float]:
    feed = BatchFeed(one, CPU, rank=0)
    weights = []
    for _ in feed.training_batches(batches(10), LAYOUT, never):
        weights.append(feed.micro.weight)
        feed.consume()
    return weights


def test_with_accelerate_the_weight_makes_up_for_its_division_in_short_windows() -> None:
    assert weights_of(accelerator()) == [1.0] * 8 + [2.0] * 2


def test_without_accelerate_the_weights_of_a_window_add_up_to_one() -> None:
    assert weights_of(None) == [0.25] * 8 + [0.5] * 2


def test_accelerate_is_told_the_accumulation_and_where_the_epoch_ends() -> None:
    one = accelerator()
    feed = BatchFeed(one, CPU, rank=0)
    ends = []
    for _ in feed.training_batches(batches(10), LAYOUT, never):
        (end,) = one.gradient_state.active
        ends.append((end.end_of_dataloader, end.remainder))
        feed.consume()
    assert (one.gradient_accumulation_steps, one.step) == (4, 0)
    assert ends == [(False, -1)] * 9 + [(True, -1)]
    assert one.gradient_state.active == []


def test_accelerate_forgets_an_epoch_that_was_left_early() -> None:
    one = accelerator()
    given = BatchFeed(one, CPU, rank=0).training_batches(batches(10), LAYOUT, never)
    next(given)
    given.close()
    assert one.gradient_state.active == []


def test_an_iterator_is_made_at_once_so_that_it_draws_before_generators_are_restored() -> None:
    made = []

    class Loader:
        def __iter__(self) -> Iterator[torch.Tensor]:
            made.append(True)
            return batches(10)

    BatchFeed(None, CPU, rank=0).training_batches(Loader(), LAYOUT, never)
    assert made == [True]


def test_no_batch_is_fetched_after_a_stop() -> None:
    fetched = []
    feed = BatchFeed(None, CPU, rank=0)

    def fetching() -> Iterator[torch.Tensor]:
        for batch in batches(10):
            fetched.append(int(batch))
            yield batch

    for _ in feed.training_batches(fetching(), LAYOUT, lambda: len(fetched) == 4):
        feed.consume()
    assert fetched == [0, 1, 2, 3]


def test_a_batch_that_was_not_consumed_is_an_error() -> None:
    given = BatchFeed(None, CPU, rank=0).training_batches(batches(10), LAYOUT, never)
    next(given)
    with pytest.raises(ConfigError, match=r"run.step\(\) was not called after the last batch; call it once a batch"):
        next(given)


def test_a_window_without_synchronised_gradients_is_an_error() -> None:
    one = accelerator()
    one.sync_gradients = False
    feed = BatchFeed(one, CPU, rank=0)
    given = feed.training_batches(batches(10), LAYOUT, never)
    for _ in range(3):
        next(given)
        feed.consume()
    next(given)
    with pytest.raises(ConfigError, match="Accelerate did not synchronise gradients"):
        feed.consume()


def test_without_a_training_loader_every_step_is_an_update_outside_of_any_window() -> None:
    feed = BatchFeed(None, CPU, rank=0)
    micro = feed.consume()
    assert (micro.ends_window, micro.ends_epoch, micro.window_samples, micro.weight) == (True, False, 0, 1.0)
    assert not feed.in_window
    assert not feed.knows_epoch_end


def test_plain_batches_do_not_move_the_position() -> None:
    feed = BatchFeed(None, CPU, rank=0)
    before = feed.micro
    assert [int(batch) for batch in feed.plain_batches(batches(3), never)] == [0, 1, 2]
    assert feed.micro is before


def test_plain_batches_end_on_a_stop() -> None:
    seen: list[int] = []
    for batch in BatchFeed(None, CPU, rank=0).plain_batches(batches(3), lambda: len(seen) == 1):
        seen.append(int(batch))
    assert seen == [0]


def test_batches_are_moved_to_the_device() -> None:
    feed = BatchFeed(None, torch.device("meta"), rank=0)
    (batch,) = feed.plain_batches([{"x": torch.ones(2), "name": "a"}], never)
    assert (batch["x"].device.type, batch["name"]) == ("meta", "a")
