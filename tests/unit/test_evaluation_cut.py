"""Which evaluations a signal cuts where there are other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dist_train import evaluation
from dist_train.evaluation import Cut


class Evaluations:
    """Of one rank; the loop waits for the others after the batches that `waits` names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, several: bool = True) -> None:
        self.cut = Cut(several=several)
        self.collectives = 0
        self.told = False
        monkeypatch.setattr(evaluation, "count_collectives", lambda: self.collectives)

    def run(self, *lengths: int, waits: Callable[[int], bool] = lambda batch: False, told_at: int = -1) -> list[int]:
        """Goes through loaders of so many batches; how many came of each."""
        start: Any = object()
        self.cut.begin(start)
        came = []
        for length in lengths:
            batches: Iterable[int] = self.cut.watched(iter(range(length)), lambda: self.told)
            count = 0
            for batch in batches:
                count += 1
                self.told = self.told or batch == told_at
                self.collectives += waits(batch)
            came.append(count)
        self.cut.end()
        return came


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    return Evaluations(monkeypatch)


def every_fifth(batch: int) -> bool:
    return batch % 5 == 4


def only_the_last(batch: int) -> bool:
    return batch == 15


def test_the_first_evaluation_of_a_process_is_finished(several: Evaluations) -> None:
    assert several.run(16, told_at=1) == [16]


def test_one_that_was_seen_whole_is_cut_the_next_time(several: Evaluations) -> None:
    assert several.run(16) == [16]
    assert several.run(16, told_at=1) == [2]


@pytest.mark.parametrize("waits", [every_fifth, only_the_last])
def test_ranks_that_wait_for_each_other_now_and_then_are_never_parted(
    several: Evaluations, waits: Callable[[int], bool]
) -> None:
    assert several.run(16, waits=waits) == [16]
    assert several.run(16, waits=waits, told_at=1) == [16]


def test_a_further_loader_of_an_evaluation_is_seen_whole_first_too(several: Evaluations) -> None:
    assert several.run(4) == [4]
    assert several.run(4, 16, told_at=6) == [4, 16]
    several.told = False
    assert several.run(4, 16, told_at=6) == [4, 7]


def test_a_loop_that_ends_its_evaluation_early_by_itself_has_seen_it(several: Evaluations) -> None:
    start: Any = object()
    several.cut.begin(start)
    for batch in several.cut.watched(iter(range(16)), lambda: False):
        if batch == 3:
            break
    several.cut.end()
    assert several.run(16, told_at=1) == [2]


def test_alone_the_first_one_is_cut_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Evaluations(monkeypatch, several=False).run(16, told_at=1) == [2]
