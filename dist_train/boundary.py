"""Where an update or an epoch ends: the ranks agree, a checkpoint is saved when it is due, and all learn of a stop.

    reach:    agree (when due) -> raise what failed -> decide (policy) -> save
    save_end: until the last state is durable, or it is hopeless

Invariant: what is decided here is equal on all ranks, and a checkpoint is begun only between two updates. When to save
is `policy`'s decision and how is the checkpointer's; it knows no loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from signal import Signals

from dist_train import launched, phases
from dist_train.agreement import Agreed, Agreement, require_alike, strongest
from dist_train.capture import Capture
from dist_train.checkpoint.checkpointer import Checkpointer, Draft
from dist_train.checkpoint.policy import CheckpointPolicy, Moment, should_save
from dist_train.checkpoint.writer import Committed, Event, SaveFailed
from dist_train.each_rank import UnlikeWatch
from dist_train.errors import LauncherLostError, SaveFailedError, StopReason
from dist_train.health.deadline import Deadline, session_start
from dist_train.health.preemption import Preemption
from dist_train.lost import launcher_is_gone
from dist_train.phases import Phase
from dist_train.progress import RunProgress
from dist_train.reporter import Reporter
from dist_train.units import parse_seconds
from dist_train.world import World

_LEAVING = (StopReason.PREEMPTED, StopReason.INTERRUPTED)
Snapshot = Callable[[str], tuple[Capture, Draft]]


class Boundary:
    """Agreement, saves and the stop of one run.

    Args:
        snapshot: what to save now, given the reason; collective.
        deadline: of the session; only the main rank's has a limit.
        preemption: whether this rank was told to leave.
        max_steps: stop as done after this many optimizer updates.
        on_commit: told of each durable checkpoint, and whether an error is ending the run; on the main rank.
    """

    def __init__(
        self,
        world: World,
        checkpointer: Checkpointer,
        policy: CheckpointPolicy,
        progress: RunProgress,
        reporter: Reporter,
        *,
        snapshot: Snapshot,
        deadline: Deadline,
        preemption: Preemption,
        max_steps: int | None,
        on_commit: Callable[[Committed, bool], None],
    ) -> None:
        self.stop: StopReason | None = None
        """Agreed by all ranks."""
        self.stop_wish: StopReason | None = None
        """Of this rank, for the next agreement."""
        self.why = ""
        """Of a stop that needs words: a run that has diverged."""
        self.saves_are_over = False
        """What is in memory is not to be saved: the run has diverged, or goes back to a checkpoint."""
        self.is_sound: Callable[[], bool] = lambda: True
        """Asked before each save; where it is not, `saves_are_over` is set. Collective."""
        self._last_saved_step = -1
        self._last_save_time = 0.0
        self._world = world
        self._checkpointer = checkpointer
        self._policy = policy
        self._progress = progress
        self._reporter = reporter
        self._snapshot = snapshot
        self._unlike = UnlikeWatch()
        self._deadline = deadline
        self._preemption = preemption
        self._told_of_signal = ""
        self._max_steps = max_steps
        self._on_commit = on_commit
        self._agreement = Agreement(world)
        self._save_requested = self._wait_requested = False
        self._committed_step = -1

    @property
    def committed_step(self) -> int:
        """Step of the newest durable checkpoint, -1 before the first; as of the last agreement on other ranks."""
        return max(self._committed_step, self._checkpointer.committed_step)

    @property
    def reached_max_steps(self) -> bool:
        return self._max_steps is not None and self._step >= self._max_steps

    @property
    def is_leaving(self) -> bool:
        """Who is done may still evaluate; whoever is told to leave must not."""
        return self.stop not in (None, StopReason.DONE)

    @property
    def _step(self) -> int:
        return self._progress.now.global_step

    def open(self, saved_step: int) -> None:
        """Time counts from here; `saved_step` is in this directory already, -1 for none. Collective.

        Raises:
            ConfigError: the ranks would save or stop at different steps.
        """
        require_alike({**self._policy.to_json(), "max_steps": self._max_steps}, self._world, "when to save and to stop")
        self.saves_are_over = False
        self._committed_step = -1
        self._deadline.begin()
        self._last_saved_step = saved_step
        self._last_save_time = time.monotonic()

    def begin_session(self) -> None:
        """A session that has no time for a single step ends here. Collective."""
        self._deadline.begin()
        if self._world.broadcast(self._deadline.is_over(), "whether there is time to train"):
            self.stop = StopReason.TIME_LIMIT

    def agree(self, *, ends_epoch: bool, evaluated: bool, is_last: bool, evaluation_is_near: bool) -> Agreed:
        """Exchanges what the ranks wish, where it is due; afterwards `stop` is what holds. Collective.

        Args:
            is_last: no epoch follows.
            evaluation_is_near: nobody knows where the epoch ends, so that its evaluation may come with the next step.
        """
        self.report(self._checkpointer.poll())
        self._deadline.evaluation_done() if evaluated else self._deadline.step_done()
        evaluation_is_next = ends_epoch and not evaluated
        nothing_follows = is_last or (self.reached_max_steps and not evaluation_is_next)
        steps = 0 if evaluation_is_next else self._agreement.interval
        evaluation = evaluation_is_next or evaluation_is_near
        over = not nothing_follows and self._deadline.is_over(steps=steps, evaluation=evaluation)
        told = not nothing_follows and self.hear()
        wish = strongest(self.stop_wish, self._preemption.reason if told else None)
        wish = wish or (StopReason.TIME_LIMIT if over else None)
        agreed = self._exchange(wish, force=ends_epoch or self._save_requested)
        self._raise_failures(agreed)
        if self.reached_max_steps and not self.saves_are_over:  # a run that goes back takes steps off
            self.stop = self.stop or StopReason.DONE
        return agreed

    def hear(self) -> bool:
        """Whether this rank was told to leave; the first to ask has it said."""
        if self._preemption.signal is None:
            return False
        if not self._told_of_signal:
            self._told_of_signal = self._preemption.signal.name
            self._reporter.told_to_leave(self._told_of_signal)
        return True

    def stop_alone(self) -> bool:
        """Between two updates: a single process that was told to leave need not train on to its next boundary."""
        if self._world.world_size == 1 and self.hear() and self.stop is None:
            self.stop = strongest(self.stop_wish, self._preemption.reason)
            self._settle(self._told_of_signal)
        return self.stop is not None

    def agree_on_cut(self, is_cut: bool) -> bool:
        """Whether a signal has ended the evaluation early on any rank; then it counts for nothing. Collective."""
        cut = bool(self._world.max([is_cut], "whether the evaluation is complete")[0])
        if cut and self.stop is StopReason.DONE:
            self.stop = None  # without its evaluation the run is not done
        return cut

    def _settle(self, name: str) -> None:
        """The ranks stop because one of them was told to."""
        self._preemption.settle()
        if not self._told_of_signal:
            self._told_of_signal = name
            self._reporter.told_to_leave(name)
        self._reporter.events.write("preempted", signal=name, global_step=self._step)

    def save_if_due(self, agreed: Agreed, *, ends_epoch: bool, evaluated: bool) -> None:
        """What the policy says of this moment. Collective."""
        moment = Moment(
            global_step=self._step,
            last_saved_step=self._last_saved_step,
            ends_epoch=ends_epoch,
            evaluated=evaluated,
            epochs_completed=self._progress.now.epochs_completed,
            time_is_up=agreed.time_is_up,
            stopping=self.is_leaving if ends_epoch else self.stop is not None,
            requested=agreed.save_requested,
        )
        if reason := should_save(self._policy, moment):
            self.save(reason)
        if self._wait_requested:
            self._wait_requested = False
            self.wait_for_save()

    def request_save(self, *, wait: bool) -> None:
        """At the next boundary."""
        self._save_requested, self._wait_requested = True, wait or self._wait_requested

    def save(self, reason: str) -> None:
        """Begins a save now, unless what would be saved is not sound. Collective."""
        self._save_requested = False
        if self.saves_are_over or not self.is_sound():
            return
        self._last_saved_step = self._step
        self._last_save_time = time.monotonic()
        self._deadline.save_begun()
        with phases.within(Phase.CAPTURE):
            capture, draft = self._snapshot(reason)
            self._unlike.warn_of(capture, self._world)
            stall = self._checkpointer.save(capture, draft)
        if stall is not None:
            self._reporter.note_stall(self._step, stall)

    def wait_for_save(self) -> None:
        with phases.within(Phase.SAVE_WAIT):
            self._checkpointer.wait()
        self.report(self._checkpointer.poll())

    def save_end(self, *, in_window: bool) -> None:
        """The last state is durable when this returns; a failed save is tried once more. Collective."""
        for tries_left in (2, 1, 0):
            self.wait_for_save()
            mine = [self._checkpointer.committed == self._progress.now, self._checkpointer.must_end]
            done, hopeless = self._world.broadcast(mine, "whether the end is saved")
            if done or not self._policy.at_end or in_window or self.saves_are_over:
                return
            if hopeless or not tries_left:
                break
            self.save("end")
        self._checkpointer.require_healthy()
        raise SaveFailedError(
            f"The end of the run (step {self._step}) could not be saved in {self._checkpointer.store.root}; the newest "
            f"checkpoint is step {self.committed_step}. See the messages above; fix the cause and run the same command "
            f"again."
        )

    def report(self, events: list[Event], *, after_error: bool = False) -> None:
        """Tells people and the run what the writer has done."""
        for event in events:
            if isinstance(event, Committed):
                seconds = self._reporter.stall_of(event) + event.seconds
                self._deadline.save_ended(seconds)
                launched.note(save_seconds=seconds)
            elif isinstance(event, SaveFailed):
                self._deadline.save_ended()
        keeper = self._checkpointer
        counts = {"failures": keeper.failures, "most_failures": self._policy.max_failed_saves}
        self._reporter.report(events, newest=keeper.committed_step, **counts)
        for event in events:
            if isinstance(event, Committed):
                self._on_commit(event, after_error)

    def report_time_limit(self) -> None:
        """Why the run stopped before its end."""
        pending = self._progress.now.evaluation == "pending"
        self._reporter.time_limit(self._deadline, self.committed_step, evaluation_pending=pending)

    def report_signal(self) -> None:
        """Why the run stopped before its end, if a signal was why."""
        if self._told_of_signal:
            pending = self._progress.now.evaluation == "pending"
            step, committed = self._step, self.committed_step
            self._reporter.left_early(self._told_of_signal, step, committed, evaluation_pending=pending)

    def _exchange(self, stop: StopReason | None, *, force: bool) -> Agreed:
        due = self._agreement.is_due()
        if not (due or force):
            return Agreed()
        agreed = self._agreement.exchange(
            Agreed(
                stop=stop,
                save_requested=self._save_requested,
                time_is_up=self._time_is_up(),
                failed=self._checkpointer.must_end or launcher_is_gone(),
                committed_step=self._checkpointer.committed_step,
                signal=int(self._preemption.signal or 0) if stop in _LEAVING else 0,
            )
        )
        if agreed.signal and self.stop is None and agreed.stop in _LEAVING:
            self._settle(Signals(agreed.signal).name)
        self.stop = self.stop or agreed.stop
        self._committed_step = agreed.committed_step
        launched.note_progress(self._step, self.committed_step, self._deadline.longest_seconds)
        return agreed

    def _time_is_up(self) -> bool:
        every = self._policy.every_seconds
        return self._world.is_main and every is not None and time.monotonic() - self._last_save_time >= every

    def _raise_failures(self, agreed: Agreed) -> None:
        if not agreed.failed:
            return
        self._checkpointer.require_healthy()
        if launcher_is_gone():
            raise LauncherLostError(
                f"Rank {self._world.rank}: the launcher died and left this worker behind; training ends at step "
                f"{self._step}. Run the same command again: it goes on from step {self.committed_step}."
            )
        raise SaveFailedError(f"Rank {self._world.rank}: another rank ended training; its message says why.")


def make_deadline(max_time: str | float | None, time_reserve: str | float | None, *, is_main: bool) -> Deadline:
    """The end of the session; the clock is the main rank's. `RunOptions` has checked the times."""
    reserve = None if time_reserve is None else parse_seconds(time_reserve)
    seconds = None if max_time is None else parse_seconds(max_time)
    if seconds is None or not is_main:
        return Deadline()
    return Deadline(seconds, age_seconds=time.time() - session_start(), reserve_seconds=reserve)
