"""How an attempt ends: its last state durable, its directory given back, and why it ended told.

Invariant: whatever ends the loop, the save in flight is finished or given up before the directory is given back; an
error is told and goes on. Where a newer attempt owns the directory, nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from dist_train import launched
from dist_train.boundary import Boundary
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.errors import ExitCode, RunInUseError, StopReason
from dist_train.health.leaving import leave_by
from dist_train.lost import has_lost_peers
from dist_train.progress import RunProgress
from dist_train.reporter import Reporter
from dist_train.tracking import Tracking

LONELY_SECONDS = 20.0
"""For a rank that has lost the others: its own end, a save that is complete finished; then it must not hang."""


class Ending:
    """The end of one attempt.

    Args:
        on_stop: told of the reason, before the last save.
        requeue_exit: a run that only ran out of time ends with 75.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        boundary: Boundary,
        progress: RunProgress,
        reporter: Reporter,
        tracking: Tracking,
        on_stop: Callable[[StopReason], None],
        *,
        requeue_exit: bool = False,
    ) -> None:
        self.reason: StopReason | None = None
        """Why the attempt ended, None while it lives."""
        self._checkpointer = checkpointer
        self._boundary = boundary
        self._progress = progress
        self._reporter = reporter
        self._tracking = tracking
        self._on_stop = on_stop
        self._requeue_exit = requeue_exit

    @property
    def exit_code(self) -> int:
        """For `sys.exit`."""
        return launched.exit_code(self.reason, requeue=self._requeue_exit) if self.reason else 1

    def leave(self, error: BaseException | None, *, in_window: bool) -> None:
        """Collective, unless there is an error."""
        self._reporter.console.end_live()
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave_well(in_window)
        else:
            self._leave_after(error)

    def _leave_well(self, in_window: bool) -> None:
        self.reason = self._boundary.stop or StopReason.DONE
        try:
            self._on_stop(self.reason)
            self._boundary.save_end(in_window=in_window)
            if self._boundary.stop is StopReason.DIVERGED:  # the last save was refused
                self.reason = StopReason.DIVERGED
        except BaseException as error:
            self._leave_after(error)
            raise
        self._boundary.report(self._checkpointer.close())
        self._tell_launcher()
        self._reporter.events.write("stopped", reason=self.reason, global_step=self._progress.now.global_step)
        self.write_status(self.reason, error=self._boundary.why)
        if self._checkpointer.committed is not None:
            self._tracking.settle(self._checkpointer.committed, at_end=True)
        self._tracking.finish()
        if self.reason is StopReason.TIME_LIMIT:
            self._boundary.report_time_limit()
        if self.reason in (StopReason.PREEMPTED, StopReason.INTERRUPTED):
            self._boundary.report_signal()

    def _leave_after(self, error: BaseException) -> None:
        """Finishes the save in flight, without waiting long for ranks that may be dead; the error goes on."""
        self.reason = StopReason.INTERRUPTED if isinstance(error, KeyboardInterrupt) else StopReason.ERROR
        lonely = has_lost_peers(error)
        launched.note_error(error, secondary=lonely)
        if lonely and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave_by(LONELY_SECONDS, "it has lost the other ranks", int(ExitCode.ERROR))
        self._boundary.report(self._checkpointer.close(failed=True), after_error=True)
        self._tell_launcher()
        # A rank 0 that was cut off, or stood still, wakes up beside the attempt that goes on without it.
        if not (isinstance(error, RunInUseError) or self._checkpointer.is_lost):
            step = self._progress.now.global_step
            told = {"error": _one_line(error), "lost_peers": lonely}
            self._reporter.events.write("stopped", reason=self.reason, global_step=step, **told)
            self.write_status(self.reason, error=_one_line(error))
        self._tracking.finish()

    def _tell_launcher(self) -> None:
        step, committed = self._progress.now.global_step, self._boundary.committed_step
        launched.note(outcome=self.reason, global_step=step, committed_step=committed)

    def write_status(self, status: str, error: str = "") -> None:
        """status.json: `running`, or the reason of the end."""
        if self._checkpointer.is_lost:  # what becomes of an old attempt is no news of the run
            return
        code = None if status == "running" else self.exit_code
        self._reporter.status(status, code, self._progress.now, self._checkpointer.attempt, error)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0].removesuffix(": ")
