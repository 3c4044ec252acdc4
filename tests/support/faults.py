"""Faults put in place of a store's primitive changes, and a count of those that really fired."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from dist_train.checkpoint.store import Operation


@dataclass
class FaultPlan:
    """An observer of a store: the `nth` matching change (from 0) fails in place of happening.

    Disarmed it only counts; `log` is what was told, the failing change included.
    """

    kind: str = ""
    """As `Operation.kind`; empty matches every kind."""
    nth: int = 0
    errno: int = 0
    """0 injects nothing."""
    lasting: bool = False
    """Every matching change fails from the nth on, until `disarm`."""
    matches: Callable[[Operation], bool] = lambda operation: True
    armed: bool = True
    fired: int = 0
    seen: int = 0
    log: list[Operation] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, operation: Operation) -> None:
        with self._lock:
            self.log.append(operation)
            if not self.armed or self.kind not in ("", operation.kind) or not self.matches(operation):
                return
            hit = self.seen >= self.nth if self.lasting else self.seen == self.nth
            self.seen += 1
            if not (hit and self.errno):
                return
            self.fired += 1
        raise OSError(self.errno, os.strerror(self.errno), operation.path)

    def disarm(self) -> None:
        self.armed = False
