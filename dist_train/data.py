"""The data of a run: in which order, which samples on which rank, with which randomness.

Invariant: what a sample is and when it is used follow from (seed, epoch, samples consumed) alone, never from the world
size, the number of DataLoader workers, how far they read ahead, or how often the run was killed. Seeking is arithmetic.

    (seed, epoch) -> Permutation -> EpochLayout -> ResumableSampler -> workers: SeededDataset -> _collate -> batch
                     the order      who takes what  SampleKey lists    RNGs seeded from (seed, epoch, index)

It does not count consumed samples (the `Run` does), does not move batches to a device, and does not seed generators
that a dataset makes for itself (`numpy.random.default_rng()` without a seed cannot be reproduced).
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from dist_train.errors import ConfigError
from dist_train.order import (
    EpochLayout,
    GivenOrder,
    OrderFunction,
    Positions,
    derive_seed,
    require_at_least_one,
    sample_order,
    split,
)
from dist_train.places import Place, find_place

_DECIDED_HERE: Final = {"batch_size", "sampler", "batch_sampler", "shuffle", "drop_last", "generator", "in_order"}
_ORPHAN_SECONDS: Final = 2.0  # how often a worker looks whether its parent is still there
_STEPS_PER_BLOCK: Final = 64  # micro-steps permuted in one vectorised call
# What a seed is for. Python's and numpy's generators are the same Mersenne Twister: seeded alike they would draw alike.
# 0 is the order's.
_PYTHON, _NUMPY, _TORCH, _COLLATE = range(1, 5)


class SampleKey(NamedTuple):
    """Names one use of one sample; all of its randomness follows from it and the run's seed."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a key
    use: int = 0
    """How many times an `order` used it before in this epoch."""

    @property
    def words(self) -> tuple[int, ...]:
        """What its randomness is seeded from, besides the run's seed."""
        return tuple(self) if self.use else (self.epoch, self.index)


class ResumableSampler(Sampler[list[SampleKey]]):
    """A batch sampler whose order is f(seed, epoch) and whose position is set, never skipped to.

    DataLoader workers reading ahead do not move the position: it belongs to the `Run`, which counts consumed samples.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        shuffle: bool,
        seed: int,
        place: Place = Place(),  # noqa: B008  # frozen
        drop_last: bool = False,
        order: OrderFunction | None = None,
    ) -> None:
        """Starts at epoch 0, sample 0. Raises ConfigError for sizes or an order that cannot work."""
        self._layout = EpochLayout(
            num_samples=num_samples,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=place.count,
            drop_last=drop_last,
        )
        self._given = None if order is None else GivenOrder(order, num_samples)
        self.num_samples, self.shuffle, self.seed, self.drop_last = num_samples, shuffle, seed, drop_last
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.place = place
        self.set_position(epoch=0)

    def set_position(self, *, epoch: int, samples_into_epoch: int = 0) -> None:
        """Where the next iterator starts; running ones are not disturbed. Raises ConfigError outside the epoch."""
        if epoch < 0:
            raise ConfigError(f"epoch must be at least 0, found {epoch}")
        count = self.num_samples if self._given is None else len(self._given.at(epoch)[0])
        if samples_into_epoch == 0 and self.drop_last and count < self.global_batch_size:
            raise ConfigError(
                f"drop_last leaves nothing: {count} samples, global_batch_size {self.global_batch_size}; "
                "use a smaller global_batch_size or drop_last=False"
            )
        self._epoch, self._layout = epoch, replace(self._layout, num_samples=count, start=samples_into_epoch)

    @property
    def order(self) -> dict[str, Any] | None:
        """Which order the present epoch has, for a comparison at a resume; None for the built-in one."""
        return None if self._given is None else {"epoch": self._epoch, "digest": self._given.digest(self._epoch)}

    @property
    def epoch(self) -> int:
        """0-based index of the epoch that the next iterator belongs to."""
        return self._epoch

    @property
    def layout(self) -> EpochLayout:
        """What is left of the epoch, from the present position."""
        return self._layout

    def __len__(self) -> int:
        return self._layout.num_micro_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # A generator reads its position at the first `next`: hand it over now.
        return self._key_lists(self._epoch, self._layout)

    def _key_lists(self, epoch: int, layout: EpochLayout) -> Iterator[list[SampleKey]]:
        keys_at = self._keys_of(epoch)
        for first in range(0, layout.num_micro_steps, _STEPS_PER_BLOCK):
            steps = range(first, min(first + _STEPS_PER_BLOCK, layout.num_micro_steps))
            batches = [layout.micro_batch(step, self.place.index) for step in steps]
            keys = keys_at(np.concatenate([np.arange(batch.start, batch.stop) for batch in batches]))
            for batch in batches:
                yield [next(keys) for _ in range(batch.start, batch.stop)]

    def indices(self, epoch: int, first: int, stop: int) -> list[int]:
        """Dataset indices of the samples at the places `first` to before `stop` of an epoch's order."""
        return [key.index for key in self._keys_of(epoch)(np.arange(first, stop))]

    def _keys_of(self, epoch: int) -> Callable[[Positions], Iterator[SampleKey]]:
        """The epoch's samples, by positions of its order."""
        if self._given is None:
            order = sample_order(self.num_samples, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
            return lambda positions: (SampleKey(epoch, index) for index in order(positions).tolist())
        indices, uses = self._given.at(epoch)
        return lambda positions: map(SampleKey, repeat(epoch), indices[positions].tolist(), uses[positions].tolist())


class ShardSampler(Sampler[list[SampleKey]]):
    """A place's contiguous shard of range(num_samples) in batches: unpadded, sizes of shards differ by at most one.

    All ranks have the same number of batches, which share a shard evenly, but for those that have no sample left for
    the last one (a batch size of 1, or fewer samples than ranks).
    """

    def __init__(self, num_samples: int, *, batch_size: int, place: Place = Place()) -> None:  # noqa: B008  # frozen
        """Raises ConfigError for sizes that cannot work."""
        require_at_least_one(num_samples=num_samples, batch_size=batch_size)
        self.place = place
        shard = split(num_samples, place.index, place.count)
        passes = -(-len(split(num_samples, 0, place.count)) // batch_size)
        parts = [split(len(shard), at, passes) for at in range(passes)]
        self._batches = [shard[part.start : part.stop] for part in parts]
        self._filler = range(min(shard.start, num_samples - 1), min(shard.start, num_samples - 1) + 1)
        self.fills = False
        """Where this rank has no sample left: whether it gives one that is counted elsewhere, or no batch."""

    def batch_sizes(self) -> list[int]:
        """Samples of each batch, as many numbers on every rank: 0 where this rank has none left."""
        return [len(batch) for batch in self._batches]

    def __len__(self) -> int:
        return sum(self.fills or size > 0 for size in self.batch_sizes())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        batches = [batch or self._filler for batch in self._batches if batch or self.fills]
        return ([SampleKey(0, index) for index in batch] for batch in batches)


class SeededSamples(NamedTuple):
    """The samples of one micro-batch and the words that its collation is seeded from."""

    samples: list[Any]
    words: tuple[int, ...]


class SeededDataset(Dataset[Any]):
    """Makes a sample a function of (seed, epoch, index), equal with 0 or N workers, in this attempt or the next.

    Python's `random`, numpy's global generator and torch's CPU generator are seeded before `inner[index]`. Outside of
    workers they are put back after it: making samples never disturbs training's randomness. `inner.__getitems__` is not
    used, because its samples would share one stream of random numbers.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        """`dataset` has `__getitem__(int)` and `__len__`; it stays within reach as `inner`."""
        self.inner = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> Any:
        with _training_rngs_kept():
            return self._sample(key)

    def __getitems__(self, keys: list[SampleKey]) -> SeededSamples:
        """The DataLoader's call: one save and restore of the generators for the whole micro-batch."""
        with _training_rngs_kept():
            return SeededSamples([self._sample(key) for key in keys], (self.seed, *keys[0].words, _COLLATE))

    def _sample(self, key: SampleKey) -> Any:
        _seed_rngs(self.seed, *key.words)
        return self.inner[key.index]


def _collate(collate: Callable[[list[Any]], Any], batch: SeededSamples | list[Any]) -> Any:
    """Seeds for `collate` too: mixup or token masking is as exact as the samples. A plain list is a call by hand."""
    if not isinstance(batch, SeededSamples):
        return collate(batch)
    with _training_rngs_kept():
        _seed_rngs(*batch.words)
        return collate(batch.samples)


def _seed_rngs(*words: int) -> None:
    random.seed(derive_seed(*words, _PYTHON))
    np.random.seed(list(divmod(derive_seed(*words, _NUMPY), 2**32)))
    torch.default_generator.manual_seed(derive_seed(*words, _TORCH))  # unlike `torch.manual_seed`, leaves CUDA alone


@contextmanager
def _training_rngs_kept() -> Iterator[None]:
    """Outside of workers, puts the global CPU generators back; in a worker nobody else uses them."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _start_worker(then: Callable[[int], None] | None, loader_pid: int, worker_id: int) -> None:
    """Keeps a stop signal to the whole job from killing the workers before the loop reads its flag.

    SIGTERM is obeyed from the parent alone. Were it ignored outright, a DataLoader that is alive when Python exits
    would hang there for ever: `multiprocessing` terminates its children, then waits for them.
    """
    parent = os.getppid()
    if parent == 1 != loader_pid:
        os._exit(0)  # the parent was killed while this worker started; torch's own watchdog would never notice
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(signal.Signals[name], signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, where SIGTERM keeps its meaning
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for threads that began before the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    if then is not None:
        then(worker_id)


def shield_workers(loader: Any) -> None:
    """Has the workers of a loader of the user's outlive a stop signal, from its next iterator on, as ours do."""
    while (inner := getattr(loader, "base_dataloader", None)) is not None:  # of Accelerate
        loader = inner
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return
    then = loader.worker_init_fn
    if not (isinstance(then, partial) and then.func is _start_worker):
        loader.worker_init_fn = partial(_start_worker, then, os.getpid())


def _exit_with_parent(parent: int) -> None:
    """Ends the worker when its parent tells it to, or has died."""
    while True:
        told = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_SECONDS)
        if (told is not None and told.si_pid == parent) or os.getppid() != parent:
            os._exit(0)


def data_loader(
    dataset: Dataset[Any],
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    shuffle: bool | None = None,
    order: OrderFunction | None = None,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
    mesh: Any | None = None,
    data_dims: str | Sequence[str] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    **loader_options: Any,
) -> DataLoader[Any]:
    """A DataLoader of this rank's micro-batches, exact across kills and changes of world size. Do not `prepare` it.

    Args:
        dataset: Map-style, with `__len__`; every rank has the same one.
        global_batch_size: Samples of one optimizer update over all ranks.
        micro_batch_size: Most samples of one forward pass; None is the rank's whole share of an update.
        shuffle: A new order each epoch, from (seed, epoch), unless it is False: then the dataset's own.
        order: Instead of `shuffle`: `order(epoch)` gives the indices of an epoch, for weighted sampling (repeats are
            allowed) or samples grouped by length; as many as it likes. Called once an epoch in each process, it must
            be a function of the epoch alone: seed its generator with it.
        seed: Of the order, and of the randomness in samples and collation.
        num_workers: Processes that make samples; it does not change them.
        drop_last: Leave out an epoch's last update if it is short; otherwise it is weighted by its samples.
        mesh: The `DeviceMesh` of all ranks, where some of them share a copy of the model (tensor parallel): they take
            the same samples, and others different ones.
        data_dims: Names of the mesh's dimensions over which samples are divided; None for those of `dp`,
            `dp_replicate` and `dp_shard` that it has.
        rank: Together with `world_size`; None asks torch.distributed, then RANK and WORLD_SIZE, then it is 0 of 1.
        world_size: See `rank`.
        **loader_options: Of `torch.utils.data.DataLoader`, but those that would decide the order.

    Raises:
        ConfigError: A dataset without length or without samples, a size below 1, or options that contradict.
    """
    place = find_place(rank, world_size, mesh, data_dims)
    if order is not None and shuffle:
        raise ConfigError("order and shuffle=True contradict: let order(epoch) return the indices shuffled.")
    sampler = ResumableSampler(
        _count_samples(dataset),
        global_batch_size=global_batch_size,
        micro_batch_size=-(-global_batch_size // place.count) if micro_batch_size is None else micro_batch_size,
        shuffle=order is None and shuffle is not False,
        seed=seed,
        place=place,
        drop_last=drop_last,
        order=order,
    )
    return _seeded_loader(dataset, sampler, seed, num_workers, loader_options)


def evaluation_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    mesh: Any | None = None,
    data_dims: str | Sequence[str] | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    **loader_options: Any,
) -> DataLoader[Any]:
    """A DataLoader that gives each sample exactly once over all ranks: in order, unpadded, a contiguous shard a rank
    (with `mesh`: a place on it, whose first rank counts).

    A rank may have a batch less than the others, or none at all, so no collective of the loop's may depend on one; a
    run whose model is sharded sees to that (see `Run.batch_counts`). `loader.batch_sampler` is a `ShardSampler`;
    samples are seeded as in epoch 0. Arguments and errors are those of `data_loader`; `batch_size` is a rank's.
    """
    place = find_place(rank, world_size, mesh, data_dims)
    sampler = ShardSampler(_count_samples(dataset), batch_size=batch_size, place=place)
    return _seeded_loader(dataset, sampler, seed, num_workers, loader_options)


def _seeded_loader(
    dataset: Dataset[Any], sampler: Sampler[list[SampleKey]], seed: int, num_workers: int, options: dict[str, Any]
) -> DataLoader[Any]:
    if taken := sorted(_DECIDED_HERE & set(options)):
        raise ConfigError(f"{', '.join(taken)}: decided by the loader so that a resume is exact; leave it out")
    init, collate = options.pop("worker_init_fn", None), options.pop("collate_fn", None)
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(_collate, collate or default_collate),
        worker_init_fn=partial(_start_worker, init, os.getpid()),
        generator=torch.Generator().manual_seed(derive_seed(seed)),  # else an iterator draws from the global generator
        **options,
    )


def _count_samples(dataset: Dataset[Any]) -> int:
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(f"{name} needs __len__ and __getitem__(index): an exact resume needs random access")
    if len(dataset) == 0:
        raise ConfigError(f"{name} is empty: there is nothing to train or evaluate on")
    return len(dataset)


def training_sampler(loader: Any) -> ResumableSampler | None:
    """The sampler of a loader that `data_loader` made, None for any other loader.

    Raises:
        ConfigError: Accelerate has wrapped the loader and would shard it a second time.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(getattr(sampler, "batch_sampler", None), ResumableSampler):
        raise ConfigError(
            "The loader of dist_train.data_loader was given to accelerator.prepare. Leave it out there: it shards by "
            "itself and run.batches moves its batches to the device."
        )
    return sampler if isinstance(sampler, ResumableSampler) else None


def describe_sampler(loader: Any) -> dict[str, Any]:
    """What decides which samples are used when; empty for a loader that is not ours."""
    sampler = training_sampler(loader)
    keys = ("num_samples", "global_batch_size", "micro_batch_size", "shuffle", "seed", "drop_last", "order")
    found = {} if sampler is None else {key: getattr(sampler, key) for key in keys}
    if sampler is not None and sampler.place.ranks is not None:
        found["places"] = sampler.place.count
    return {key: value for key, value in found.items() if value is not None}


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; nested dicts, lists, tuples and what has `.to` are gone through."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        moved = {key: move_batch(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_batch(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
