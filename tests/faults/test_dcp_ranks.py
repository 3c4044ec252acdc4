"""What comes of a `dcp.save` of several ranks when one of them dies or fails, and of saves that overlap."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner

import dist_train as dt
from tests.support.dcp_killed import MODES, NAME, disagree, fail_on_one, kill_in, load, state_of
from tests.support.forked import run_ranks


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch warns of every save without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Ranks that die


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1], ids=["coordinator", "other"])
@pytest.mark.parametrize("mode", MODES[:2])
def test_a_rank_that_dies_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, mode: str, rank: int) -> None:
    seen = []
    for dies_at in range(1, 60):
        root = tmp_path / str(dies_at)
        root.mkdir()
        seen.append(kill_in(root, mode, rank, dies_at))
        dcp.save(state_of(3), storage_writer=dt.StorageWriter(root / NAME))
        assert load(root) == 3
        assert os.listdir(root) == [NAME]
        if seen[-2:] == [2, 2] and len(seen) > 3:  # the kill comes too late from here on
            break
    assert set(seen) == {1, 2}
    assert seen == sorted(seen), "once it is published it stays"
    assert len(seen) > (10 if rank == 0 else 3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("rank", "dies_at"), [(0, 1), (0, 5), (0, 9), (1, 1), (1, 2)])
def test_a_saving_process_that_dies_leaves_the_old_or_the_new(tmp_path: Path, rank: int, dies_at: int) -> None:
    """`async_save` in processes of their own: those die, and the ranks are told."""
    assert kill_in(tmp_path, "process", rank, dies_at) in (1, 2)
    dcp.save(state_of(3), storage_writer=dt.StorageWriter(tmp_path / NAME))
    assert load(tmp_path) == 3
    assert os.listdir(tmp_path) == [NAME]


# Ranks that fail


@pytest.mark.distributed
def test_a_rank_without_space_is_told_by_all_and_leaves_nothing(tmp_path: Path) -> None:
    for told, left, then in run_ranks(fail_on_one, 2, str(tmp_path)):
        assert list(told) == [1], "the others have nothing to tell"
        assert "failed on rank 1: the device has no space left" in told[1]
        assert left == []
        assert then == [NAME]
    assert load(tmp_path) == 2


@pytest.mark.distributed
def test_what_one_rank_may_not_save_all_are_told(tmp_path: Path) -> None:
    for told in run_ranks(disagree, 2, str(tmp_path), "value"):
        assert list(told) == [1]
        assert told[1].startswith("UnsaveableStateError: 'odd' cannot be saved")
    assert os.listdir(tmp_path) == []


@pytest.mark.distributed
def test_what_one_rank_finds_damaged_all_are_told(tmp_path: Path) -> None:
    for told in run_ranks(disagree, 2, str(tmp_path), "bytes"):
        assert list(told) == [0, 1], "the length is looked at by each"
        assert all("model-00001-of-00002.safetensors is 5000 bytes long" in text for text in told.values())


# Saves that overlap


class Meeting(DefaultSavePlanner):
    """Writes nothing before all saves of a test have begun."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__()
        self._meeting = meeting
        self.has_begun = threading.Event()

    def resolve_data(self, write_item: Any) -> Any:
        if not self.has_begun.is_set():
            self.has_begun.set()
            self._meeting.wait(30)
        return super().resolve_data(write_item)


def begin_saves(writers: list[Any], paths: list[Path]) -> list[Future[Any]]:
    """One after the other; then all go on at once."""
    meeting, saves = threading.Barrier(len(writers)), []
    for number, (writer, path) in enumerate(zip(writers, paths, strict=True)):
        planner = Meeting(meeting)
        saves.append(dcp.async_save(state_of(number), storage_writer=writer, checkpoint_id=path, planner=planner))
        assert planner.has_begun.wait(30)
    return saves


def test_overlapping_saves_of_one_writer_are_each_whole(tmp_path: Path) -> None:
    writer = dt.StorageWriter()
    roots = [tmp_path / str(number) for number in range(3)]
    for save in begin_saves([writer] * 3, [root / NAME for root in roots]):
        save.result(60)
    assert [load(root) for root in roots] == [0, 1, 2]
    assert [os.listdir(root) for root in roots] == [[NAME]] * 3


@pytest.mark.parametrize("shared", [True, False], ids=["one writer", "a writer each"])
def test_overlapping_saves_of_one_path_never_mix(tmp_path: Path, shared: bool) -> None:
    one = dt.StorageWriter()
    writers = [one if shared else dt.StorageWriter() for _ in range(3)]
    outcomes = [save.exception(60) for save in begin_saves(writers, [tmp_path / NAME] * 3)]
    assert outcomes[2] is None, "the last one to begin has the folder"
    assert load(tmp_path) == 2
    for error in outcomes[:2]:
        assert isinstance(error, CheckpointException)
        assert "one path takes one save at a time" in str(error)
    dcp.save(state_of(7), storage_writer=one, checkpoint_id=tmp_path / NAME)
    assert load(tmp_path) == 7
    assert os.listdir(tmp_path) == [NAME]


def test_a_save_without_an_id_goes_where_the_writer_went_last(tmp_path: Path) -> None:
    writer = dt.StorageWriter(tmp_path / "first" / NAME)
    dcp.async_save(state_of(1), storage_writer=writer, checkpoint_id=tmp_path / "second" / NAME).result(60)
    dcp.save(state_of(2), storage_writer=writer)
    assert load(tmp_path / "second") == 2
    assert not (tmp_path / "first").exists()
    assert torch.equal(state_of(2)["model"]["plain"], torch.full((5,), 2.0))
