"""Writes down, in the victim, what each step used and what came of it, so that two runs can be laid side by side.

    records/<run>/a000002-r1.jsonl    one line a step of attempt 2 on rank 1, and one for where the attempt began

Invariant: recording changes nothing that is trained. A line is written before a fault of the same moment comes.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dist_train import phases
from dist_train.drill.arrival import when_imported
from dist_train.drill.digests import digest_of, digests_of_generators, digests_of_models, surroundings
from dist_train.phases import Phase, Point

Json = Any
RECORDS: Final = "records"
_SHOWN: Final = 4


class Recorder:
    """Of one process."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder = Path(folder, RECORDS)
        self._rank = rank
        self._run: Any = None
        self._file: Any = None
        self._pulled: Json = None
        """The batch that was given out last and not trained on yet."""
        self._batches: list[Json] = []
        """Of the window in progress."""

    def arm(self) -> None:
        """From now on everything is written down; before the faults are armed."""
        phases.on_reach(self._reached)
        when_imported("dist_train.run", self._wrap_run)
        when_imported("torch.utils.data.dataloader", self._wrap_loaders)

    def _wrap_run(self, module: ModuleType) -> None:
        run_class = module.Run
        enter, begin, step, batches = run_class.__enter__, run_class._begin, run_class.step, run_class.batches

        def recorded_enter(run: Any) -> Any:
            entered = enter(run)
            self._open(run)
            return entered

        def recorded_begin(run: Any, count: int) -> None:
            is_first = not run._begun
            begin(run, count)
            if is_first:
                self._write_begin(run)

        def recorded_step(run: Any, loss: Any = None) -> None:
            self._take(loss)
            step(run, loss)

        def recorded_batches(run: Any, loader: Any) -> Iterator[Any]:
            for batch in batches(run, loader):
                if self._pulled is None and phases.current() is not Phase.EVALUATION:
                    self._pull(batch, None, type(loader).__name__)
                yield batch

        run_class.__enter__, run_class._begin = recorded_enter, recorded_begin
        run_class.step, run_class.batches = recorded_step, recorded_batches

    def _wrap_loaders(self, module: ModuleType) -> None:
        """Which samples a batch is made of, and in which order, only torch's iterators know."""
        iterator = module._BaseDataLoaderIter
        next_index, next_batch, reset = iterator._next_index, iterator.__next__, iterator._reset

        def recorded_index(self_: Any) -> Any:
            index = next_index(self_)
            self_.__dict__.setdefault("_drilled", deque()).append(index)
            return index

        def recorded_next(self_: Any) -> Any:
            batch = next_batch(self_)
            asked = self_.__dict__.get("_drilled")
            index = asked.popleft() if asked else None
            if phases.current() is not Phase.EVALUATION:
                sampler = getattr(self_._index_sampler, "sampler", self_._index_sampler)
                self._pull(batch, index, type(sampler).__name__)
            return batch

        def recorded_reset(self_: Any, *given: Any, **more: Any) -> Any:
            self_.__dict__.pop("_drilled", None)
            return reset(self_, *given, **more)

        iterator._next_index, iterator._reset = recorded_index, recorded_reset
        iterator.__next__ = recorded_next

    def _open(self, run: Any) -> None:
        self._run = run
        place = self._folder / os.path.basename(run.run_dir)
        place.mkdir(parents=True, exist_ok=True)
        self._file = open(place / f"a{run.attempt:06d}-r{self._rank}.jsonl", "a")  # noqa: SIM115 - for the process's life
        self._pulled, self._batches = None, []

    def _write_begin(self, run: Any) -> None:
        self._write(
            {
                "kind": "begin",
                "step": run.global_step,
                "weights": digests_of_models(run._live.models),
                "lr": _rates(run),
                "loader": run._intake.loader is not None,
                "optimizers": len(run._live.optimizers),
                "around": surroundings(self._known()),
            }
        )

    def _pull(self, batch: Any, index: Any, sampler: str) -> None:
        samples = None if index is None or index == [None] * len(index) else _samples(index)
        self._pulled = {
            "samples": None if samples is None else digest_of(repr(samples)),
            "shown": None if samples is None else [str(one) for one in samples[:_SHOWN]],
            "content": digest_of(batch),
            "rng": digests_of_generators(),
            "sampler": sampler,
            "around": {} if self._batches else surroundings(self._known()),
        }

    def _take(self, loss: Any) -> None:
        pulled = self._pulled or {**dict.fromkeys(("samples", "shown", "content", "rng")), "sampler": "", "around": {}}
        value = None if loss is None else repr(float(loss))
        self._batches.append({**pulled, "loss": value})
        self._pulled = None

    def _reached(self, point: Point) -> None:
        if point is not Point.STEP_DONE or self._run is None:
            return
        run = self._run
        self._write(
            {
                "kind": "step",
                "step": run.global_step,
                "epoch": run.epoch,
                "batches": self._batches,
                "lr": _rates(run),
                "weights": digests_of_models(run._live.models),
                "rng": digests_of_generators(),
                "around": surroundings(self._known()),
            }
        )
        self._batches = []

    def _known(self) -> list[Any]:
        """What the checkpoint holds, wrapped or not."""
        if self._run is None:
            return []
        live = self._run._live
        parts = [live.models, live.optimizers, live.schedulers, live.registered]
        known = [one for part in parts for one in part.values()]
        inner = [getattr(one, name) for one in known for name in ("module", "optimizer") if hasattr(one, name)]
        return [*known, *inner, self._run, self._run._intake.loader]

    def _write(self, line: Json) -> None:
        self._file.write(json.dumps({**line, "at": time.time()}) + "\n")
        self._file.flush()


def _samples(index: Any) -> list[Any]:
    """The samples of one batch by their places in the dataset; of ours, with the epoch that seeds them."""
    keys = index if isinstance(index, list) else [index]
    return [key.index if hasattr(key, "words") else key for key in keys]


def _rates(run: Any) -> list[float]:
    return [group["lr"] for one in run._live.optimizers.values() for group in one.param_groups]
