"""The laws of data order: exact, independent of the world size and of workers, without a trace in training's RNGs."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dist_train.data import (
    ResumableSampler,
    SampleKey,
    SeededDataset,
    ShardSampler,
    data_loader,
    evaluation_loader,
)
from dist_train.errors import ConfigError
from dist_train.places import Place

few = settings(max_examples=50, deadline=None)


class Augmented(Dataset[torch.Tensor]):
    """Draws from every global generator; `draws` varies by index, so that streams would drift if they were shared."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [random.random() for _ in range(1 + index % 3)]
        return torch.tensor([index, draws[-1], float(np.random.rand()), float(torch.rand(()))], dtype=torch.float64)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    """As mixup or token masking does."""
    return torch.stack(samples) + torch.rand(()) + random.random() + np.random.rand()


def rng_states() -> tuple[Any, bytes, list[int]]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


def full_order(sampler: ResumableSampler) -> list[SampleKey]:
    return [key for batch in sampler for key in batch]


# --- Permutation -----------------------------------------------------------------------------------------------------


def make_sampler(num_samples: int = 50, **options: Any) -> ResumableSampler:
    defaults: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "shuffle": True, "seed": 5}
    return ResumableSampler(num_samples, **{**defaults, **options})


@few
@given(
    num_samples=st.integers(1, 300),
    global_batch_size=st.integers(1, 40),
    epoch=st.integers(0, 5),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_seeking_equals_the_tail_of_the_whole_epoch(
    num_samples: int, global_batch_size: int, epoch: int, drop_last: bool, data: st.DataObject
) -> None:
    global_batch_size = min(global_batch_size, num_samples)
    options: dict[str, Any] = {"global_batch_size": global_batch_size, "drop_last": drop_last}
    whole, sought = make_sampler(num_samples, **options), make_sampler(num_samples, **options)
    whole.set_position(epoch=epoch)
    skipped = data.draw(st.integers(0, num_samples // global_batch_size))
    sought.set_position(epoch=epoch, samples_into_epoch=skipped * global_batch_size)
    assert list(sought) == list(whole)[skipped * whole.layout.accumulation_steps :]
    assert len(sought) == len(list(sought))


def test_ranks_together_take_the_order_of_one_rank_even_when_their_number_changes_midway() -> None:
    expected = full_order(make_sampler())
    taken: list[SampleKey] = []
    for world_size, start, stop in ((1, 0, 16), (3, 16, 32), (2, 32, 50)):
        samplers = [make_sampler(place=Place(rank, world_size)) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_position(epoch=0, samples_into_epoch=start)
        for step, lists in enumerate(zip(*samplers, strict=True)):
            shares = [samplers[0].layout.micro_batch(step, rank) for rank in range(world_size)]
            if shares[0].start >= stop:
                break
            taken += [key for keys, share in zip(lists, shares, strict=True) for key in keys[: share.num_samples]]
    assert taken == expected


def test_a_running_iterator_keeps_its_position_and_reading_ahead_moves_none() -> None:
    sampler = make_sampler()
    expected = list(sampler)
    running = iter(sampler)
    sampler.set_position(epoch=3, samples_into_epoch=8)
    assert list(running) == expected
    assert (sampler.epoch, sampler.layout.start) == (3, 8)


def test_a_trillion_samples_are_sought_by_arithmetic() -> None:
    sampler = make_sampler(10**12, global_batch_size=4096, micro_batch_size=8)
    sampler.set_position(epoch=7, samples_into_epoch=4096 * 10**8)
    keys = next(iter(sampler))
    assert len(keys) == 8
    assert all(key.epoch == 7 and 0 <= key.index < 10**12 for key in keys)
    assert len(sampler) == sampler.layout.num_micro_steps > 10**10


def test_a_finished_epoch_has_nothing_left() -> None:
    sampler = make_sampler()
    sampler.set_position(epoch=0, samples_into_epoch=50)
    assert (list(sampler), len(sampler)) == ([], 0)


@pytest.mark.parametrize("position", [{"epoch": -1}, {"epoch": 0, "samples_into_epoch": 51}])
def test_positions_outside_of_the_epoch_are_refused(position: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_sampler().set_position(**position)


def test_drop_last_that_leaves_no_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing"):
        make_sampler(7, drop_last=True)


@few
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 9))
def test_evaluation_shards_hold_each_sample_exactly_once(num_samples: int, batch_size: int, world_size: int) -> None:
    shards = [
        ShardSampler(num_samples, batch_size=batch_size, place=Place(rank, world_size)) for rank in range(world_size)
    ]
    assert [key.index for shard in shards for batch in shard for key in batch] == list(range(num_samples))
    sizes = [sum(shard.batch_sizes()) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        assert [size for size in shard.batch_sizes() if size] == [len(batch) for batch in shard]
        assert len(shard) == len(list(shard))
        assert max(shard.batch_sizes()) <= batch_size


@few
@given(num_samples=st.integers(1, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 9))
def test_evaluation_has_as_many_batches_on_every_rank(num_samples: int, batch_size: int, world_size: int) -> None:
    shards = [
        ShardSampler(num_samples, batch_size=batch_size, place=Place(rank, world_size)) for rank in range(world_size)
    ]
    for batches in zip(*(shard.batch_sizes() for shard in shards), strict=True):
        assert max(batches) - min(batches) <= 1
        assert min(batches) > 0 or batch_size == 1 or num_samples < world_size
    for shard in shards:
        shard.fills = True
        assert len(shard) == len(list(shard)) == len(shard.batch_sizes())
        for size, batch in zip(shard.batch_sizes(), shard, strict=True):
            assert len(batch) == max(size, 1)
            assert all(0 <= key.index < num_samples for key in batch)


# --- Loaders ---------------------------------------------------------------------------------------------------------


def make_loader(**options: Any) -> Any:
    defaults: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "seed": 5, "collate_fn": noisy_collate}
    return data_loader(Augmented(), **{**defaults, **options})


def test_workers_do_not_change_samples_or_collation() -> None:
    alone = list(make_loader())
    with_workers = list(make_loader(num_workers=2))
    assert len(alone) == 12
    assert all(torch.equal(one, other) for one, other in zip(alone, with_workers, strict=True))


def test_persistent_workers_follow_the_position() -> None:
    loader = make_loader(num_workers=1, persistent_workers=True)
    first = list(loader)
    loader.batch_sampler.set_position(epoch=0, samples_into_epoch=16)
    rest = list(loader)
    assert all(torch.equal(one, other) for one, other in zip(first[8:], rest, strict=True))


def test_samples_are_equal_after_a_resume_and_differ_between_epochs() -> None:
    whole, resumed = make_loader(), make_loader()
    resumed.batch_sampler.set_position(epoch=0, samples_into_epoch=16)
    assert all(torch.equal(one, other) for one, other in zip(list(whole)[8:], resumed, strict=True))
    dataset = SeededDataset(Augmented(), seed=5)
    samples = [dataset[SampleKey(epoch, 3)] for epoch in range(2)]
    assert samples[0][0] == samples[1][0]
    assert not torch.equal(samples[0], samples[1])


def test_samples_do_not_depend_on_the_world_size() -> None:
    dataset = SeededDataset(Augmented(), seed=5)
    batch = dataset.__getitems__([SampleKey(0, 7), SampleKey(0, 3)])
    assert torch.equal(batch.samples[1], dataset[SampleKey(0, 3)])


def test_python_and_numpy_do_not_draw_the_same_numbers() -> None:
    """Both are MT19937 and seed it alike: one seed for both would correlate independent augmentations."""
    sample = SeededDataset(Augmented(), seed=5)[SampleKey(0, 0)]
    assert len(set(sample.tolist())) == 4


def test_loading_leaves_the_global_rngs_untouched() -> None:
    before = rng_states()
    assert len(list(make_loader())) == 12
    assert rng_states() == before
    next(iter(make_loader(num_workers=1)))
    assert rng_states() == before


def test_a_failing_sample_leaves_the_global_rngs_untouched() -> None:
    before = rng_states()
    with pytest.raises(IndexError):
        SeededDataset(TensorDataset(torch.zeros(1)), seed=0)[SampleKey(0, 9)]
    assert rng_states() == before


def test_everything_that_goes_to_a_spawned_worker_pickles() -> None:
    loader = make_loader()
    copies = pickle.loads(
        pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn, loader.batch_sampler))
    )
    assert isinstance(copies[0].inner, Augmented)
    assert list(copies[3]) == list(loader.batch_sampler)


def test_workers_survive_a_stop_signal_to_the_job_and_obey_their_parent() -> None:
    loader = make_loader(num_workers=1, worker_init_fn=lambda worker_id: os.nice(1))
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for name in ("TERM", "INT"):  # from another process, as a launcher or scheduler sends it
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True, timeout=10)
    assert len(list(batches)) == 11
    batches = iter(make_loader(num_workers=1, persistent_workers=True))
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=10)
    assert worker.exitcode == 0


def test_a_script_that_ends_with_a_living_loader_exits() -> None:
    """With SIGTERM ignored outright it would hang: multiprocessing terminates its children, then joins them."""
    script = (
        "import builtins, torch; from dist_train.data import data_loader\n"
        "it = builtins.kept = iter(data_loader(torch.utils.data.TensorDataset(torch.zeros(99)),"
        " global_batch_size=1, num_workers=1)); next(it); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, cwd=os.getcwd()).returncode == 7


def test_the_micro_batch_defaults_to_the_whole_share_of_a_rank() -> None:
    loader = data_loader(Augmented(), global_batch_size=9, rank=1, world_size=2)
    assert loader.batch_sampler.micro_batch_size == 5
    assert loader.batch_sampler.layout.accumulation_steps == 1


def test_rank_and_world_size_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = data_loader(Augmented(), global_batch_size=9).batch_sampler
    assert sampler.place == Place(2, 3)
    assert [len(batch) for batch in evaluation_loader(Augmented(), batch_size=5)] == [4, 3]


def test_evaluation_gives_each_sample_once_the_same_on_any_world_size() -> None:
    whole = torch.cat(list(evaluation_loader(Augmented(), batch_size=4, rank=0, world_size=1)))
    parts = [list(evaluation_loader(Augmented(), batch_size=4, rank=rank, world_size=30)) for rank in range(30)]
    assert torch.equal(torch.cat([batch for part in parts for batch in part]), whole)
    assert parts[29] == []


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("dataset", [Stream(), TensorDataset(torch.zeros(0)), iter([1]), {1}])
def test_datasets_without_length_samples_or_random_access_are_refused(dataset: Any) -> None:
    with pytest.raises(ConfigError):
        data_loader(dataset, global_batch_size=1)
    with pytest.raises(ConfigError):
        evaluation_loader(dataset, batch_size=1)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"sampler": [0]},
        {"batch_sampler": [[0]]},
        {"in_order": False},
        {"generator": None},
        {"global_batch_size": 0},
        {"micro_batch_size": 0},
        {"rank": 0},
        {"rank": 2, "world_size": 2},
        {"rank": 0, "world_size": 0},
    ],
)
def test_options_that_contradict_or_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_loader(**options)


@pytest.mark.parametrize("options", [{"shuffle": True}, {"drop_last": True}, {"batch_size": 0}])
def test_evaluation_options_that_would_lose_or_move_samples_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        evaluation_loader(Augmented(), **{"batch_size": 4, **options})
