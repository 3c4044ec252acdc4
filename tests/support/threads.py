"""Ranks that are threads of one process: for what ranks agree on without training (opening, restoring)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dist_train.world import Mailbox, SoloWorld, World

Result = TypeVar("Result")
MEETING_SECONDS = 20.0


class Meeting:
    """Where the ranks of one world put what the others read."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=MEETING_SECONDS)
        self.rows = [""] * world_size
        self.mail = SoloWorld()


class ThreadWorld(World):
    """One rank; each counts as a node of its own."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = self.local_rank = rank
        self.world_size = len(meeting.rows)
        self._meeting = meeting

    def gather(self, value: Any, what: str) -> list[Any]:
        self._meeting.rows[self.rank] = json.dumps(value)
        self._meeting.barrier.wait()
        rows = [json.loads(row) for row in self._meeting.rows]
        self._meeting.barrier.wait()
        return rows

    def broadcast(self, value: Any, what: str) -> Any:
        return self.gather(value if self.is_main else None, what)[0]

    def max(self, values: Sequence[int], what: str) -> list[int]:
        return [max(column) for column in zip(*self.gather(list(values), what), strict=True)]

    def sum(self, values: Sequence[int], what: str) -> list[int]:
        return [sum(column) for column in zip(*self.gather(list(values), what), strict=True)]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def open_mailbox(self) -> Mailbox:
        return self._meeting.mail.open_mailbox()


def on_ranks(world_size: int, work: Callable[[World], Result]) -> list[Result]:
    """What `work` returns on each rank; the first error of any rank is raised."""
    meeting = Meeting(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(work, ThreadWorld(meeting, rank)) for rank in range(world_size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]
