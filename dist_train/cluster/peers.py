"""The agents of several nodes in one attempt: that it has ended, why, and what each node saw of it.

    agent whose worker died: ended("failure") -> every agent ends its own workers -> report -> all reports -> decide

Invariant: no call waits on the store (it is shared with the rendezvous' heartbeat), and an agent that falls silent is
not waited for: its beat is watched on this agent's own clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

Json = Any
SILENT_SECONDS = 6.0
"""An agent whose beat does not change for so long is gone."""
_BEAT_SECONDS = 0.5
_POLL_SECONDS = 0.05


class Peers:
    """The other agents of an attempt, through the store of its rendezvous.

    Args:
        store: that lives as long as the attempt, or longer with a prefix for it.
        node: index of this agent, of `count`.
    """

    def __init__(self, store: Any, node: int, count: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._node, self._count, self._clock = store, node, count, clock
        self._beats = 0
        self._ended_alone = ""
        self._next_beat = clock()
        self._seen: dict[int, tuple[str, float]] = {}

    def beat(self) -> None:
        """Shows that this agent lives; call it often."""
        if self._count == 1 or self._clock() < self._next_beat:
            return
        self._next_beat = self._clock() + _BEAT_SECONDS
        self._beats += 1
        self._store.set(f"beat/{self._node}", str(self._beats))

    def end(self, why: str) -> None:
        """The attempt is over for all, and this is why; the first who says so is believed."""
        if self._count > 1:
            self._store.compare_set("ended", "", why)
        self._ended_alone = self._ended_alone or why

    def why_ended(self) -> str:
        """ "" while it goes on."""
        return self._ended_alone if self._count == 1 else self._read("ended")

    def exchange(self, report: Json, seconds: float) -> tuple[list[Json], set[int]]:
        """Each agent's report, and the nodes whose agents have gone without one; after so many seconds without."""
        if self._count == 1:
            return [report], set()
        self._store.set(f"report/{self._node}", json.dumps(report))
        deadline = self._clock() + seconds
        missing = set(range(self._count))
        lost: set[int] = set()
        while missing - lost and self._clock() < deadline:
            self.beat()
            missing = {node for node in missing if not self._store.check([f"report/{node}"])}
            lost = {node for node in missing if self._is_silent(node)}
            if missing - lost:
                time.sleep(_POLL_SECONDS)
        there = [node for node in range(self._count) if node not in missing]
        return [json.loads(self._read(f"report/{node}")) for node in there], missing

    def agree(self, mine: Json, *, leads: bool, seconds: float) -> Json:
        """One decision for all: the leader's, or the first other one where it does not come in time."""
        if self._count == 1:
            return mine
        deadline = self._clock() + (0.0 if leads else seconds)
        while not self._store.check(["decision"]) and self._clock() < deadline:
            self.beat()
            time.sleep(_POLL_SECONDS)
        self._store.compare_set("decision", "", json.dumps(mine))
        return json.loads(self._read("decision"))

    def part(self, seconds: float) -> None:
        """At the end of all: whoever serves the store stays until the others have read what they need."""
        if self._count == 1:
            return
        self._store.set(f"part/{self._node}", "")
        deadline = self._clock() + seconds
        others = [f"part/{node}" for node in range(self._count) if node != self._node]
        while self._clock() < deadline and not self._store.check(others):
            time.sleep(_POLL_SECONDS)

    def _is_silent(self, node: int) -> bool:
        beat = self._read(f"beat/{node}")
        before, since = self._seen.get(node, ("-", 0.0))
        if beat != before:
            self._seen[node] = (beat, self._clock())
            return False
        return self._clock() - since >= SILENT_SECONDS

    def _read(self, key: str) -> str:
        """ "" where the key is not there; never waits for it."""
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""
