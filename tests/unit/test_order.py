"""The order of samples and who takes which: bijective, independent of the world size, sought by arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.errors import ConfigError
from dist_train.order import EpochLayout, MicroBatch, Permutation, sample_order

few = settings(max_examples=50, deadline=None)


@few
@given(size=st.integers(1, 5000), key=st.integers())
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    values = Permutation(size, key)(np.arange(size))
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(size))


@few
@given(size=st.integers(1, 5000), key=st.integers(), data=st.data())
def test_random_access_equals_the_full_order(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    permutation = Permutation(size, key)
    assert np.array_equal(permutation(positions), permutation(np.arange(size))[positions])


@pytest.mark.parametrize("size", [4, 5, 6])
def test_every_order_of_few_samples_is_equally_likely(size: int) -> None:
    keys, orders = 3000, math.factorial(size)
    counts = Counter(tuple(Permutation(size, key)(np.arange(size)).tolist()) for key in range(keys))
    chi_square = sum(count**2 for count in counts.values()) * orders / keys - keys
    assert abs(chi_square - (orders - 1)) < 6 * math.sqrt(2 * (orders - 1))


def test_every_sample_is_equally_likely_at_every_position() -> None:
    size, epochs = 37, 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), sample_order(size, seed=0, epoch=epoch, shuffle=True)(np.arange(size))] += 1
    chi_square = ((counts - epochs / size) ** 2).sum() / (epochs / size)
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom)


def test_neighbours_in_the_dataset_are_not_neighbours_in_the_order() -> None:
    values = Permutation(10_000, key=1)(np.arange(10_000))
    assert (np.abs(np.diff(values)) == 1).sum() < 15  # 2 expected
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    pairs = [(seed, epoch) for seed in range(-5, 20) for epoch in range(20)]
    orders = {
        tuple(sample_order(100, seed=seed, epoch=epoch, shuffle=True)(np.arange(100)).tolist()) for seed, epoch in pairs
    }
    assert len(orders) == len(pairs)


def test_the_order_never_changes_between_versions() -> None:
    """A checkpoint of an older version continues its epoch in this order: change it only with a format version."""
    assert sample_order(10, seed=0, epoch=0, shuffle=True)(np.arange(10)).tolist() == [3, 7, 5, 4, 2, 8, 9, 6, 1, 0]


def test_unshuffled_order_is_the_dataset_order() -> None:
    assert sample_order(9, seed=3, epoch=2, shuffle=False)(np.arange(9)).tolist() == list(range(9))


def test_positions_outside_of_the_range_are_refused() -> None:
    for position in (-1, 10):
        with pytest.raises(IndexError, match="range"):
            Permutation(10, 0)(np.array([position]))


# --- EpochLayout -----------------------------------------------------------------------------------------------------

layouts = st.builds(
    lambda num_samples, start, **sizes: EpochLayout(num_samples=num_samples, start=min(start, num_samples), **sizes),
    num_samples=st.integers(1, 120),
    start=st.integers(0, 120),
    global_batch_size=st.integers(1, 40),
    micro_batch_size=st.integers(1, 12),
    world_size=st.integers(1, 7),
    drop_last=st.booleans(),
)


def windows_of(layout: EpochLayout) -> list[list[MicroBatch]]:
    """All micro-batches of all ranks, window by window."""
    windows: list[list[MicroBatch]] = [[]]
    for step in range(layout.num_micro_steps):
        shares = [layout.micro_batch(step, rank) for rank in range(layout.world_size)]
        assert len({share.ends_window for share in shares}) == 1
        windows[-1] += shares
        if shares[0].ends_window:
            windows.append([])
    assert windows[-1] == [], "the last micro-step ends a window"
    return windows[:-1]


def counted(window: list[MicroBatch]) -> list[int]:
    return [position for share in window if share.num_samples for position in range(share.start, share.stop)]


@few
@given(layout=layouts)
def test_every_sample_appears_once_at_any_world_size(layout: EpochLayout) -> None:
    windows = windows_of(layout)
    left = layout.num_samples - layout.start
    end = layout.num_samples - (left % layout.global_batch_size if layout.drop_last else 0)
    assert [position for window in windows for position in counted(window)] == list(range(layout.start, end))
    assert len(windows) == layout.num_windows


@few
@given(layout=layouts, world_size=st.integers(1, 7), micro_batch_size=st.integers(1, 12))
def test_windows_do_not_depend_on_the_world_size(layout: EpochLayout, world_size: int, micro_batch_size: int) -> None:
    other = EpochLayout(
        num_samples=layout.num_samples,
        global_batch_size=layout.global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        drop_last=layout.drop_last,
        start=layout.start,
    )
    assert list(map(counted, windows_of(layout))) == list(map(counted, windows_of(other)))


@few
@given(layout=layouts)
def test_weights_make_the_gradient_that_of_the_windows_mean_loss(layout: EpochLayout) -> None:
    for window in windows_of(layout):
        assert {share.window_samples for share in window} == {len(counted(window))}
        gradient = 0.0
        for share in window:
            mean_loss = sum(position**2 for position in range(share.start, share.stop)) / (share.stop - share.start)
            gradient += share.weight * mean_loss / layout.accumulation_steps / layout.world_size
        expected = sum(position**2 for position in counted(window)) / len(counted(window))
        assert gradient == pytest.approx(expected, rel=1e-12)


@few
@given(
    windows=st.integers(1, 4), micro_batch_size=st.integers(1, 9), world_size=st.integers(1, 7), steps=st.integers(1, 5)
)
def test_full_even_windows_have_weight_one(windows: int, micro_batch_size: int, world_size: int, steps: int) -> None:
    size = micro_batch_size * world_size * steps
    layout = EpochLayout(
        num_samples=windows * size, global_batch_size=size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    assert layout.accumulation_steps == steps
    assert {share.weight for window in windows_of(layout) for share in window} == {1.0}


@few
@given(layout=layouts)
def test_shares_differ_by_at_most_one_and_none_is_empty_or_too_large(layout: EpochLayout) -> None:
    for step in range(layout.num_micro_steps):
        shares = [layout.micro_batch(step, rank) for rank in range(layout.world_size)]
        sizes = [share.num_samples for share in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1
        for share in shares:
            assert 1 <= share.stop - share.start <= layout.micro_batch_size
            assert share.ends_epoch == (step == layout.num_micro_steps - 1)
            if not share.num_samples:
                assert (share.start, share.stop, share.weight) == (shares[0].start, shares[0].start + 1, 0.0)


@few
@given(layout=layouts)
def test_the_shares_of_a_window_differ_by_at_most_one_sample(layout: EpochLayout) -> None:
    for window in windows_of(layout):
        sizes = {share.num_samples for share in window}
        assert max(sizes) - min(sizes) <= 1


@few
@given(layout=layouts)
def test_a_rank_is_idle_only_where_no_sample_can_be_spared(layout: EpochLayout) -> None:
    for window in windows_of(layout):
        if layout.micro_batch_size > 1 and window[0].window_samples >= layout.world_size:
            assert all(share.num_samples for share in window)


@few
@given(layout=layouts)
def test_what_is_said_of_uneven_shares_is_what_is_done(layout: EpochLayout) -> None:
    """Against the micro-batches themselves, of a window that is full."""
    window = windows_of(replace(layout, num_samples=layout.global_batch_size, start=0, drop_last=False))[0]
    sizes, text = sorted({share.num_samples for share in window}, reverse=True), layout.describe_uneven()
    if len(sizes) == 1:
        assert text == ""
    else:
        passes = len(window) // layout.world_size
        assert f"an update is {f'{passes} passes' if passes > 1 else 'one pass'} of " in text
        assert f" of {sizes[0]} and {sizes[1]} samples a rank" in text
        assert ("counts nothing" in text) == (0 in sizes)


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "shares"),
    [
        (5, 5, "one pass of 5 and 4 samples a rank, weighted"),
        (4, 5, ""),  # two passes of three
        (3, 5, ""),
        (3, 7, ""),
        (3, 3, "3 passes of 3 and 2 samples a rank, weighted"),
        (5, 2, "3 passes of 2 and 1 samples a rank, weighted"),
        (7, 1, "4 passes of 1 and 0 samples a rank (a rank without one looks"),
    ],
)
def test_uneven_shares_of_a_global_batch_of_24_are_said_in_words(
    world_size: int, micro_batch_size: int, shares: str
) -> None:
    sizes = {"num_samples": 156, "global_batch_size": 24}
    text = EpochLayout(**sizes, micro_batch_size=micro_batch_size, world_size=world_size).describe_uneven()
    assert shares in text
    assert bool(shares) == bool(text)


def test_short_last_window_has_fewer_micro_steps() -> None:
    layout = EpochLayout(num_samples=20, global_batch_size=16, micro_batch_size=4, world_size=2)
    assert (layout.accumulation_steps, layout.num_windows, layout.num_micro_steps) == (2, 2, 3)
    assert layout.micro_batch(2, rank=1).weight == 2.0  # 2 samples * 2 ranks * 2 steps / 4 samples
    assert layout.micro_batch(2, rank=0).ends_epoch


def test_micro_steps_and_ranks_outside_are_refused() -> None:
    layout = EpochLayout(num_samples=20, global_batch_size=16, micro_batch_size=4, world_size=2)
    for step, rank in ((-1, 0), (3, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            layout.micro_batch(step, rank)


@pytest.mark.parametrize("bad", [{"start": 21}, {"start": -1}, {"world_size": 0}, {"global_batch_size": 2.0}])
def test_layouts_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    good: dict[str, Any] = {"num_samples": 20, "global_batch_size": 16, "micro_batch_size": 4, "world_size": 2}
    with pytest.raises(ConfigError):
        EpochLayout(**{**good, **bad})


# --- Samplers --------------------------------------------------------------------------------------------------------
