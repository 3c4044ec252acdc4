"""What watches one attempt from its entry to its end, in one place: each part is opened, asked and closed here.

    open   the run was entered: the launcher is told of it
    close  the `with Run` block was left, however: nothing that watches outlives it

Invariant: what is open is closed, also after an error. It decides nothing: the boundary asks, and all ranks agree.
"""

from __future__ import annotations

from dist_train import launched, phases
from dist_train.phases import Phase


class Monitoring:
    """The watchers of one run."""

    def open(self, run_dir: str, attempt: int, global_step: int, committed_step: int) -> None:
        """The run stands at `global_step`; its loop comes next."""
        phases.tell_step(global_step)
        phases.switch(Phase.OTHER)
        launched.note(
            begun=True, run_dir=run_dir, attempt=attempt, global_step=global_step, committed_step=committed_step
        )

    def begun_again(self, attempt: int, global_step: int, committed_step: int) -> None:
        """The run has gone back to a checkpoint, as a new attempt in this process."""
        phases.tell_step(global_step)
        phases.switch(Phase.OTHER)
        launched.note(attempt=attempt, global_step=global_step, committed_step=committed_step)

    def close(self) -> None:
        """Nothing is watched any more."""
        phases.switch(Phase.OUTSIDE)
