"""What watches one attempt from its entry to its end, in one place: each part is opened, asked and closed here.

    enter  the run directory is about to be taken over: time is measured from here, and from the process's start
    begin  the attempt has its number: from here on hangs are noticed
    open   the run was entered: the launcher is told of it
    close  the `with Run` block was left, however: nothing that watches outlives it

Invariant: what is open is closed, also after an error. It decides nothing: the boundary asks, and all ranks agree.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import astuple

from dist_train import launched, phases
from dist_train.beginning import Beginning
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.health.hang_folder import HANGS, HangFolder, untold_hangs
from dist_train.health.patience import Patience
from dist_train.health.preemption import Preemption
from dist_train.health.stacks import Peer
from dist_train.health.watchdog import Surroundings, Watchdog
from dist_train.options import RunOptions
from dist_train.phases import Phase
from dist_train.reporter import Reporter
from dist_train.time_ledger import TimeLedger
from dist_train.units import parse_seconds


class Monitoring:
    """The watchers of one run."""

    def __init__(self, options: RunOptions, checkpointer: Checkpointer, reporter: Reporter) -> None:
        world = checkpointer.world
        grace = None if options.grace is None else parse_seconds(options.grace)
        self.preemption = Preemption(grace_seconds=grace, several=world.world_size > 1)
        self._checkpointer = checkpointer
        self._reporter = reporter
        self._hang_timeout = options.hang_timeout
        self._watchdog: Watchdog | None = None
        self.ledger: TimeLedger | None = None
        """The account of this attempt's time; the main rank's."""
        if world.is_main:
            self._open_account()

    def _open_account(self) -> None:
        store, events, checkpointer = self._checkpointer.store, self._reporter.events, self._checkpointer
        self.ledger = TimeLedger(store, events, is_lost=lambda: checkpointer.is_lost)
        checkpointer.on_beat(self.ledger.beat)
        self._reporter.spent_at = self.ledger.committed

    def enter(self) -> None:
        """Before anything of the run directory is touched; a signal from here on is one to the run."""
        self.preemption.open()
        if self.ledger is not None:
            self.ledger.enter()

    def begin(self, attempt: int) -> None:
        """The attempt has its number, and a checkpoint is chosen next. Collective."""
        world, store = self._checkpointer.world, self._checkpointer.store
        if world.is_main:
            for _, verdict in untold_hangs(store.root):
                self._reporter.events.write("hung", **verdict)
        patience = Patience.parse(self._hang_timeout)
        if patience is None:
            return
        rows = world.gather(astuple(Peer.of_this_process()), "where the ranks run")
        folder = HangFolder(store.root, attempt, world.rank)
        surroundings = Surroundings(
            rank=world.rank,
            world_size=world.world_size,
            attempt=attempt,
            shown=store.shown(os.path.join(HANGS, folder.path.name)),
            peers=[Peer(*row) for row in rows],
            leaves=world.world_size > 1 or launched.by_elastic() or launched.by_dist_train(),
        )
        self._watchdog = Watchdog(patience, folder, surroundings, self._reporter.events.write)
        self._watchdog.start()

    def open(self, run_dir: str, attempt: int, beginning: Beginning) -> None:
        """The run's state is restored; its loop comes next."""
        state, committed_step = beginning.state_of, beginning.saved_step
        global_step = state["global_step"]
        phases.tell_step(global_step)
        if self._watchdog is not None:
            self._watchdog.loop_begins(global_step)
        phases.switch(Phase.OTHER)
        launched.forget_end()
        launched.note_run(run_dir, attempt=attempt, global_step=global_step, committed_step=committed_step)
        if self.ledger is not None:
            self.ledger.open(attempt, state)

    def end_attempt(self) -> None:
        """The run goes back to a checkpoint, as a new attempt in this process. The directory was given back."""
        self._end_watch()
        if self.ledger is not None:
            self.ledger.close(self._checkpointer.attempt)
            self._open_account()
            self.ledger.enter()

    def begin_attempt(self, attempt: int, beginning: Beginning) -> None:
        """It has: everything is restored, and its loop goes on."""
        phases.tell_step(beginning.state_of["global_step"])
        if self._watchdog is not None:
            self._watchdog.loop_begins(beginning.state_of["global_step"])
        phases.switch(Phase.OTHER)
        global_step = beginning.state_of["global_step"]
        launched.note_roll_back(beginning.saved_step, attempt=attempt, global_step=global_step)
        if self.ledger is not None:
            self.ledger.open(attempt, beginning.state_of)

    def close(self) -> None:
        """Nothing is watched any more; where one of the parts fails, the others are closed all the same."""
        with ExitStack() as last_first:
            last_first.callback(phases.switch, Phase.OUTSIDE)
            if self.ledger is not None:
                last_first.callback(self.ledger.close, self._checkpointer.attempt)
            last_first.callback(self.preemption.close)
            last_first.callback(self._end_watch)

    def _end_watch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
