"""What watches one attempt from its entry to its end, in one place: each part is opened, asked and closed here.

    begin  the attempt has a number: from here on hangs are noticed
    open   the run was entered: the launcher is told of it
    close  the `with Run` block was left, however: nothing that watches outlives it

Invariant: what is open is closed, also after an error. It decides nothing: the boundary asks, and all ranks agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple

from dist_train import launched, phases
from dist_train.checkpoint.store import Store
from dist_train.health.hang_folder import HANGS, HangFolder, untold_hangs
from dist_train.health.patience import Patience
from dist_train.health.stacks import Peer
from dist_train.health.watchdog import Surroundings, Watchdog
from dist_train.phases import Phase
from dist_train.world import World


class Monitoring:
    """The watchers of one run.

    Args:
        hang_timeout: of `RunOptions`.
        write_event: into run.jsonl.
    """

    def __init__(
        self, world: World, store: Store, hang_timeout: str | float | None, write_event: Callable[..., None]
    ) -> None:
        self._world = world
        self._store = store
        self._hang_timeout = hang_timeout
        self._write_event = write_event
        self._watchdog: Watchdog | None = None

    def begin(self, attempt: int) -> None:
        """The attempt has its number, and a checkpoint is chosen next. Collective."""
        if self._world.is_main:
            for _, verdict in untold_hangs(self._store.root):
                self._write_event("hung", **verdict)
        patience = Patience.parse(self._hang_timeout)
        if patience is None:
            return
        rows = self._world.gather(astuple(Peer.of_this_process()), "where the ranks run")
        folder = HangFolder(self._store.root, attempt, self._world.rank)
        surroundings = Surroundings(
            rank=self._world.rank,
            world_size=self._world.world_size,
            attempt=attempt,
            shown=self._store.shown(os.path.join(HANGS, folder.path.name)),
            peers=[Peer(*row) for row in rows],
            leaves=self._world.world_size > 1 or launched.by_elastic() or launched.by_dist_train(),
        )
        self._watchdog = Watchdog(patience, folder, surroundings, self._write_event)
        self._watchdog.start()

    def open(self, run_dir: str, attempt: int, global_step: int, committed_step: int) -> None:
        """The run stands at `global_step`; its loop comes next."""
        phases.tell_step(global_step)
        if self._watchdog is not None:
            self._watchdog.loop_begins(global_step)
        phases.switch(Phase.OTHER)
        launched.note(
            begun=True, run_dir=run_dir, attempt=attempt, global_step=global_step, committed_step=committed_step
        )

    def close(self) -> None:
        """Nothing is watched any more."""
        if self._watchdog is not None:
            self._watchdog.close()
        phases.switch(Phase.OUTSIDE)
