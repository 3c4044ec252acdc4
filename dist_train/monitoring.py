"""What watches one attempt from its entry to its end, in one place: each part is opened, asked and closed here.

    open   the run was entered: the launcher is told of it
    close  the `with Run` block was left, however: nothing that watches outlives it

Invariant: what is open is closed, also after an error. It decides nothing: the boundary asks, and all ranks agree.
"""

from __future__ import annotations

from dist_train import launched, phases
from dist_train.health.preemption import Preemption
from dist_train.options import RunOptions
from dist_train.phases import Phase
from dist_train.units import parse_seconds
from dist_train.world import World


class Monitoring:
    """The watchers of one run."""

    def __init__(self, options: RunOptions, world: World) -> None:
        grace = None if options.grace is None else parse_seconds(options.grace)
        self.preemption = Preemption(grace_seconds=grace, several=world.world_size > 1)

    def open(self, run_dir: str, attempt: int, global_step: int, committed_step: int) -> None:
        """The run stands at `global_step`; its loop comes next."""
        phases.tell_step(global_step)
        phases.switch(Phase.OTHER)
        self.preemption.open()
        launched.note(
            begun=True, run_dir=run_dir, attempt=attempt, global_step=global_step, committed_step=committed_step
        )

    def close(self) -> None:
        """Nothing is watched any more."""
        self.preemption.close()
        phases.switch(Phase.OUTSIDE)
