"""A training loader that `data_loader` did not make: what a checkpoint holds of it, and how a resume finds its place.

    state    the loader (torchdata's StatefulDataLoader) or its iterable dataset has `state_dict` and `load_state_dict`:
             each rank's state is saved as it is and loaded again.
    replay   the random generators are put to where the epoch began, the loader is iterated, and the batches that were
             consumed are thrown away: its order, and what its workers draw, are then those of the killed run.
    restart  it cannot be iterated a second time: the epoch goes on with whatever comes.

Invariant: what is captured stands at the last consumed batch, never at what was read ahead; where that cannot be had,
`caveats` says so by name. It counts batches: how many samples are in one, nobody knows.
"""

from __future__ import annotations

import json as json_module
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from dist_train.errors import ConfigError, UnsaveableStateError
from dist_train.rng import capture_rng, restore_rng
from dist_train.tree import decode_whole, encode_whole

logger = logging.getLogger(__name__)
Json = Any
Way = Literal["state", "replay", "restart"]
# All ranks' states travel through the store into the manifest.
MOST_STATE_BYTES: Final = 16 << 20
# Source: torchdata 0.11, stateful_dataloader.py, StatefulDataLoader.__iter__.
_FINISHED_ITERATOR: Final = "_initial_iter_for_state_dict"
_GENERATOR_HOLDERS: Final = ("", "sampler", "batch_sampler", "batch_sampler.sampler")


class UserLoader:
    """The position of one rank in a training loader of the user's.

    Args:
        show: told (batches replayed, batches to replay) while a replay goes on.
    """

    def __init__(self, loader: Any, show: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.loader = loader
        self.batches = 0
        """Consumed of this epoch."""
        self.is_exhausted = False
        """The epoch's iterator has said that there is no further batch."""
        self._show = show
        self._holder = _state_holder(loader)
        self.way: Way = "replay"
        if self._holder is not None:
            self.way = "state"
        elif isinstance(loader, Iterator):
            self.way = "restart"
        self._epoch_start: Json = None
        self._restored: Json = None
        self._iterator: Iterator[Any] = iter(())

    @property
    def num_batches(self) -> int | None:
        """Of an epoch, where the loader is sure of it: it then knows its last batch before it is asked for more."""
        loader = self.loader
        is_sure = isinstance(loader, Sequence) or (_is_map_style(loader) and _has_length(loader))
        return len(loader) if is_sure else None

    @property
    def caveats(self) -> list[str]:
        """What a resume cannot make exact, by name."""
        loader, kind = self.loader, type(self.loader).__name__
        if self.way == "restart":
            return [
                f"a {kind} can be iterated only once: a resumed epoch goes on with whatever it gives then. Give a "
                f"loader whose __iter__ begins again"
            ]
        workers = getattr(loader, "num_workers", 0)
        if self.way == "state":
            return [
                f"what {workers} workers of {kind} draw at random is in no state_dict: the samples are exact, random "
                f"augmentation in workers is not"
            ] * bool(workers)
        return _caveats_of_replay(loader, kind, workers)

    # Saving

    def capture(self) -> Json:
        """This rank's part of a checkpoint, between two batches; changes nothing that training can see.

        Raises:
            UnsaveableStateError: the state is no plain value, or too large.
        """
        found: dict[str, Json] = {
            "way": self.way,
            "batches": self.batches,
            "exhausted": self.is_exhausted or self._has_ended(),
        }
        found |= self._loader_state()
        if self.way == "replay" and self.batches:
            found["epoch_start"] = self._epoch_start
        if self._holder is not None:
            before = capture_rng()
            state = self._holder.state_dict()  # torchdata makes an iterator where there is none, which draws a seed
            restore_rng(before)
            found["state"] = encode_whole(state, "the state of the training loader")
            size = len(json_module.dumps(found["state"]))
            if size > MOST_STATE_BYTES:
                raise UnsaveableStateError(
                    f"state_dict() of {type(self._holder).__name__} takes {size >> 20} MiB on this rank; at most "
                    f"{MOST_STATE_BYTES >> 20} MiB are saved. Leave buffers of samples out of it."
                )
        return found

    # Restoring

    def restore(self, captured: Json) -> None:
        """What `capture` gave; the place is sought when the next epoch's iterator is made."""
        if captured is None or captured["way"] != self.way:
            if captured and captured["batches"]:
                logger.warning("The training loader is of another kind than in the checkpoint: its epoch begins again.")
            return
        self.batches, self.is_exhausted = captured["batches"], captured["exhausted"]
        self._restored = captured

    def end_epoch(self) -> None:
        self.batches, self.is_exhausted, self._iterator = 0, False, iter(())

    def iterate(self, *, is_complete: bool) -> Iterator[Any]:
        """The rest of the epoch, none where it is complete. The iterator is made, and the place found, at once."""
        restored, self._restored = self._restored, None
        in_epoch = restored is not None and self.batches > 0
        if restored is not None and self._holder is not None:
            self._holder.load_state_dict(decode_whole(restored["state"]))
            if is_complete and not self.is_exhausted:
                for _ in self.loader:  # from the last batch to the iterator's end, so that the next one begins afresh
                    pass
            if not self.batches and hasattr(self.loader, _FINISHED_ITERATOR):
                self._leave_finished_iterator()
        elif in_epoch and self.way == "replay" and not is_complete:
            return self._replay(restored["epoch_start"])
        if restored is not None:
            self._set_loader_state(restored)
        if is_complete:
            self.is_exhausted = True
            return iter(())
        self._epoch_start = {"rng": capture_rng(), **self._loader_state()}
        self._iterator = iter(self.loader)
        return self._iterator

    def _leave_finished_iterator(self) -> None:
        """torchdata restores the iterator that the last epoch ended with, finds it finished and makes a second one:
        two seeds are drawn where the killed run drew one. Here both are made in vain, so that the next is like its.
        """
        before = capture_rng()
        iter(self.loader)
        restore_rng(before)

    def _has_ended(self) -> bool:
        """Whether an iterable dataset ended with the last batch, a short one: its state is the next epoch's already."""
        fetcher = getattr(self._iterator, "_dataset_fetcher", None) if self._holder is not self.loader else None
        return bool(getattr(fetcher, "ended", False))

    def _replay(self, epoch_start: Json) -> Iterator[Any]:
        started = time.monotonic()
        self._epoch_start = epoch_start
        restore_rng(epoch_start["rng"])
        self._set_loader_state(epoch_start)
        iterator: Iterator[Any] = iter(self.loader)
        for done in range(self.batches):
            self._show(done, self.batches)
            try:
                next(iterator)
            except StopIteration:
                raise ConfigError(
                    f"The checkpoint stands after {self.batches} batches of its epoch, but the training loader "
                    f"({type(self.loader).__name__}) has only {done} on this rank: the data have changed. Give the "
                    f"data of that run, or resume from an epoch's end (resume='epoch:N')."
                ) from None
        self._show(self.batches, self.batches)
        logger.info(
            "Replayed %d batches of the training loader in %.1f s to find the place of the checkpoint; a loader from "
            "dist_train.data_loader finds it at once.",
            self.batches,
            time.monotonic() - started,
        )
        return iterator

    # The loader's own generators

    def _generators(self) -> dict[str, torch.Generator]:
        found: dict[str, torch.Generator] = {}
        for path in _GENERATOR_HOLDERS:
            one = self.loader
            for name in filter(None, path.split(".")):
                one = getattr(one, name, None)
            generator = getattr(one, "generator", None)
            if isinstance(generator, torch.Generator) and all(generator is not known for known in found.values()):
                found[path] = generator
        return found

    def _loader_state(self) -> dict[str, Json]:
        """What the loader itself keeps from epoch to epoch: its generators, and whether workers are alive."""
        keeps = getattr(self.loader, "persistent_workers", False) and self.loader is not self._holder
        return {
            "generators": {path: encode_whole(one.get_state(), path) for path, one in self._generators().items()},
            "workers": bool(keeps and getattr(self.loader, "_iterator", None) is not None),
        }

    def _set_loader_state(self, state: Json) -> None:
        if state["workers"] and getattr(self.loader, "_iterator", None) is None:
            before = capture_rng()  # their start draws a seed, which the killed run had drawn epochs ago
            iter(self.loader)
            restore_rng(before)
        for path, generator in self._generators().items():
            if path in state["generators"]:
                generator.set_state(decode_whole(state["generators"][path]))


def _state_holder(loader: Any) -> Any | None:
    """Who knows the loader's place. A dataset does only without workers: they have copies, which read ahead."""
    if _has_state(loader):
        return loader
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) and _has_state(dataset) and not getattr(loader, "num_workers", 0):
        return dataset
    return None


def _has_state(one: Any) -> bool:
    return hasattr(one, "state_dict") and hasattr(one, "load_state_dict")


def _is_map_style(loader: Any) -> bool:
    dataset = getattr(loader, "dataset", None)
    return dataset is not None and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__")


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False


def _caveats_of_replay(loader: Any, kind: str, workers: int) -> list[str]:
    if isinstance(loader, Sequence):
        return []
    if not _is_map_style(loader):
        dataset = getattr(loader, "dataset", None)
        name = kind if dataset is None else type(dataset).__name__
        cause = f"with {workers} workers, which read ahead," if _has_state(dataset) else "without state_dict"
        return [
            f"{name}, iterated {cause} is replayed from the epoch's beginning: exact only where iterating it again "
            f"gives the same samples. Give it state_dict and load_state_dict and num_workers=0, or use torchdata's "
            f"StatefulDataLoader"
        ]
    found = []
    if workers and getattr(loader, "persistent_workers", False):
        found.append(
            "persistent_workers=True keeps the workers' random state from epoch to epoch: the samples are exact, "
            "random augmentation in workers is not"
        )
    if workers and not getattr(loader, "in_order", True):
        found.append("in_order=False gives batches in the order in which workers finish them")
    if not isinstance(loader, DataLoader):
        found.append(f"{kind} is replayed: exact only where iterating it again gives the same batches")
    return found
