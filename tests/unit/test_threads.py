"""Law 10: collectives run on the thread that trains; the writer's thread does file I/O and uses its own mailbox."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train as dt
from dist_train.checkpoint.store import Operation, Store
from dist_train.world import Mailbox, SoloWorld


class WatchedWorld(SoloWorld):
    """Notes which thread asks for what."""

    def __init__(self) -> None:
        super().__init__()
        self.askers: set[int] = set()
        self.mailboxes: list[Mailbox] = []

    def _note(self) -> None:
        self.askers.add(threading.get_ident())

    def max(self, values: Sequence[int], what: str) -> list[int]:
        self._note()
        return super().max(values, what)

    def sum(self, values: Sequence[int], what: str) -> list[int]:
        self._note()
        return super().sum(values, what)

    def broadcast(self, value: Any, what: str) -> Any:
        self._note()
        return super().broadcast(value, what)

    def gather(self, value: Any, what: str) -> list[Any]:
        self._note()
        return super().gather(value, what)

    def open_mailbox(self) -> Mailbox:
        self.mailboxes.append(super().open_mailbox())
        return self.mailboxes[-1]


def test_background_threads_take_part_in_no_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = WatchedWorld()
    monkeypatch.setattr("dist_train.run.current_world", lambda: world)
    writers: set[int] = set()

    def note(operation: Operation) -> None:
        if ".saving-" in operation.path and operation.kind == "fsync":
            writers.add(threading.get_ident())

    options = dt.RunOptions(open_store=lambda root: Store(root, observer=note))
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = dt.CheckpointPolicy(every_steps=1, keep_last=2)
    with dt.Run(str(tmp_path), model=model, optimizer=optimizer, policy=policy, options=options) as run:
        for _ in run.epochs(2):
            for _ in range(3):
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()

    assert world.askers == {threading.get_ident()}
    assert len(writers) == 1
    assert writers.isdisjoint(world.askers)
    assert len(world.mailboxes) == 1
