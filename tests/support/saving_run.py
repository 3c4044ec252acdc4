"""A run of one process that saves through the Checkpointer, without a training loop around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from dist_train.checkpoint.catalog import committed, list_checkpoints
from dist_train.checkpoint.checkpointer import Checkpointer, Draft, Opened
from dist_train.checkpoint.manifest import METRICS_LOG, Best, Manifest, Progress
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.checkpoint.writer import Committed, Event, Pruned, SaveFailed
from dist_train.state import LiveState
from dist_train.world import SoloWorld

KEEP_TWO = CheckpointPolicy(every_steps=1, keep_last=2, keep_best=0)


class SoloRun:
    """A small model whose weights are the step, so that a checkpoint shows which step it is of."""

    def __init__(
        self, store: Store, policy: CheckpointPolicy = KEEP_TWO, make: type[Checkpointer] = Checkpointer
    ) -> None:
        self.store = store
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.live = LiveState(models={"": self.model}, optimizers={"": self.optimizer})
        self.checkpointer = make(store, SoloWorld(), policy)
        self.resumed: Manifest | None = None
        self.events: list[Event] = []

    def open(self, resume: str = "auto") -> SoloRun:
        self.checkpointer.open()
        self.checkpointer.wait()
        opened: Opened | None = self.checkpointer.restore(resume)
        if opened is not None:
            self.live.restore(opened.manifest.state, opened.manifest.settings, opened.reader)
            opened.reader.close()
            self.resumed = opened.manifest
        self.checkpointer.dry_run(self.live.capture())
        return self

    def train(self, step: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(step)
        self.model.bias.grad = torch.full_like(self.model.bias, step)
        self.optimizer.step()

    def save(self, step: int, *, metrics: dict[str, float] | None = None, best: Best | None = None) -> list[Event]:
        """Trains to a step, appends to the history, saves and waits; returns what the writer told."""
        self.train(step)
        self.checkpointer.save(self.live.capture(), draft(step, metrics, best))
        self.checkpointer.wait()
        new = self.checkpointer.poll()
        self.events += new
        return new

    def close(self) -> list[Event]:
        new = self.checkpointer.close()
        self.events += new
        return new

    def note(self, text: str) -> None:
        """A line in the metrics history, which a commit makes durable."""
        self.store.append(METRICS_LOG, text + "\n")


def draft(step: int, metrics: dict[str, float] | None = None, best: Best | None = None) -> Draft:
    return Draft(
        progress=Progress(global_step=step),
        reason="test",
        settings={},
        environment={},
        metrics=metrics or {},
        train_loss=None,
        best=best,
        rank_state={"loss": []},
    )


@contextmanager
def solo_run(
    root: Path, policy: CheckpointPolicy = KEEP_TWO, store: Callable[[Path], Store] = Store
) -> Iterator[SoloRun]:
    run = SoloRun(store(root), policy).open()
    try:
        yield run
    finally:
        run.close()


def commits(events: list[Event]) -> list[Committed]:
    return [event for event in events if isinstance(event, Committed)]


def failures(events: list[Event]) -> list[SaveFailed]:
    return [event for event in events if isinstance(event, SaveFailed)]


def pruned(events: list[Event]) -> list[str]:
    return [event.path for event in events if isinstance(event, Pruned)]


def listed(root: Path) -> dict[str, Manifest]:
    """What the catalog calls committed."""
    return dict(committed(list_checkpoints(Store(root))))


def whole(root: Path) -> dict[str, Manifest]:
    """Those of them whose bytes verify."""
    store = Store(root)
    return {path: one for path, one in listed(root).items() if not verify_checkpoint(store, path, one)}
