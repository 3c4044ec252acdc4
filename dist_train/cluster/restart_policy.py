"""Whether a worker group that has ended is worth another attempt, and when. Pure: the clock is injected.

    ended well -> stop with 0 | asked not to restart (75, 93, 130, 2, a final error) -> stop with that code
    failed before the run was entered, in the first seconds -> stop with its code
    three attempts in a row that committed nothing new, or with the same error at the same step -> stop with 93
    else restart: at once after progress, later and later without; the budget refills when something new is committed

Invariant: it starts and stops nothing, and what it returns depends only on what it was told and on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from dist_train.errors import ExitCode

FIRST_SECONDS = 60.0
"""An error before the run was entered, so soon after the first start, is the script's: another start has it, too."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
NOT_RESTARTED: dict[int, str] = {
    ExitCode.DO_NOT_REQUEUE: "the run stopped for good",
    ExitCode.USAGE: "the script refused its arguments",
    ExitCode.INTERRUPTED: "it was interrupted",
    ExitCode.REQUEUE: "it stopped to be continued",
}
"""What a worker says with its exit code, and what that means: the strongest first, where workers disagree."""
SIGNAL_BASE = 128
"""A process that signal n ended has the exit code 128 + n, as a shell says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """How one worker ended that did not end well."""

    rank: int
    exit_code: int
    """As the operating system says it: negative for a signal."""
    error: str = ""
    """`ValueError: ...`, of the exception that ended it; "" where there was none."""
    traceback: str = ""
    step: int | None = None
    """The last optimizer update that it had done."""
    final: bool = False
    """Restarting cannot help: the error is in the settings."""
    secondary: bool = False
    """It failed because it had lost another worker."""
    stopped: bool = False
    """It was stopped (SIGSTOP) and did not answer."""
    node: str = ""

    @property
    def shell_code(self) -> int:
        """Never 0: a worker that left in the middle of its run with 0 has failed as well."""
        return self.exit_code or ExitCode.ERROR if self.exit_code >= 0 else SIGNAL_BASE - self.exit_code

    @property
    def was_signalled(self) -> bool:
        return self.exit_code < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one attempt of the whole worker group ended."""

    seconds: float
    """From its start to its end."""
    begun: bool
    """Whether any worker had entered the run."""
    committed_step: int | None
    """Newest durable step, -1 where nothing was committed; None where no worker tells (no `dist_train` in it)."""
    run_dirs: Sequence[str] = ()
    """Runs that it entered, the last one last: `committed_step` is that one's."""
    rolled_back_to: int | None = None
    """Step of the earliest checkpoint that the last run went back to by itself."""
    causes: Sequence[Cause] = ()
    """Of the workers that did not end well; the first is the first failure that was nobody else's."""
    membership: bool = False
    """A node came or left: no failure."""
    stop_asked: bool = False
    """The launcher was told to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    pause_seconds: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    exit_code: int
    why: str
    """"" where there is nothing to explain."""


class RestartPolicy:
    """Remembers what came of the attempts so far.

    Args:
        max_restarts: the budget: restarts without a committed step in between.
        give_up_after: attempts in a row that commit nothing new.
        clock: seconds, monotonic.
    """

    def __init__(self, max_restarts: int, *, give_up_after: int = 3, clock: Callable[[], float] = monotonic) -> None:
        self._max = max_restarts
        self._give_up_after = give_up_after
        self._clock = clock
        self._left = max_restarts
        self._attempts = 0
        self._pauses = 0
        self._furthest: dict[str, int] = {}
        self._former_end: tuple[str, int | None] | None = None
        self._at_same_step = 0
        self._last_failure: tuple[str, int | None] | None = None
        self._same_failures = 0
        self._healthy_since = clock()

    @property
    def left(self) -> int:
        """Restarts that are left until the committed step advances."""
        return self._left

    def started(self) -> None:
        """An attempt begins now."""
        self._healthy_since = self._clock()

    def decide(self, ended: Ended) -> Restart | Stop:
        self._attempts += 1
        if ended.stop_asked or not (ended.causes or ended.membership):
            return Stop(exit_code=_code_of(ended.causes), why="")
        progressed = self._note_progress(ended)
        if told := _what_was_told(ended.causes):
            return Stop(
                exit_code=told.shell_code, why=NOT_RESTARTED.get(told.exit_code, "starting it again cannot help")
            )
        if ended.membership:
            return Restart(pause_seconds=0.0, why="which costs nothing of the budget")
        first = ended.causes[0]
        if self._attempts == 1 and not ended.begun and ended.seconds < FIRST_SECONDS and not first.was_signalled:
            return Stop(exit_code=first.shell_code, why="it failed before the run began: starting it again cannot help")
        if self._is_stuck(ended):
            return Stop(exit_code=ExitCode.DO_NOT_REQUEUE, why=self._why_stuck(ended))
        if self._left < 1:
            return Stop(exit_code=first.shell_code, why=f"the budget of {self._max} restarts is used up")
        self._left -= 1
        return Restart(pause_seconds=self._next_pause(progressed), why=f"{self._left} of {self._max} restarts left")

    def _note_progress(self, ended: Ended) -> bool:
        progressed = self._has_progressed(ended)
        if progressed:
            self._left, self._pauses = self._max, 0
        self._at_same_step = 1 if progressed else self._at_same_step + (not ended.membership)
        failure = (ended.causes[0].error, ended.causes[0].step) if ended.causes and not ended.membership else None
        self._same_failures = self._same_failures + 1 if failure and failure == self._last_failure else 1
        self._last_failure = failure
        return progressed

    def _has_progressed(self, ended: Ended) -> bool:
        """Whether more is durable than when the former attempt ended: of the same run, whose step numbers may have gone
        down by a roll-back, or of one that the script went on to. One that only begins another run each time does not.
        """
        step, run = ended.committed_step, ended.run_dirs[-1] if ended.run_dirs else ""
        if step is None:
            return False
        former, self._former_end = self._former_end, (run, step)
        known = self._furthest.get(run)
        if known is None:
            goes_on = former is None or former[0] in ended.run_dirs
        else:
            base = known if ended.rolled_back_to is None else min(known, ended.rolled_back_to)
            goes_on, known = step > base and former != (run, step), base
        self._furthest[run] = step if known is None else max(step, known)
        return goes_on and step >= 0

    def _is_stuck(self, ended: Ended) -> bool:
        if ended.committed_step is None and not ended.begun:
            return False
        known_error = bool(ended.causes[0].error) and ended.causes[0].step is not None
        same = self._same_failures if known_error else 0
        return max(self._at_same_step, same) >= self._give_up_after

    def _why_stuck(self, ended: Ended) -> str:
        step = ended.committed_step
        where = f"at committed step {step}" if step is not None and step >= 0 else "before anything was committed"
        return f"{self._give_up_after} attempts in a row ended {where}: it would fail for ever"

    def _next_pause(self, progressed: bool) -> float:
        """None at first; doubled each time without progress, and shortened by the time that the attempt lived."""
        pauses, self._pauses = self._pauses, self._pauses + 1
        if progressed or not pauses:
            return 0.0
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (pauses - 1), LONGEST_PAUSE_SECONDS)
        return max(pause - (self._clock() - self._healthy_since), 0.0)


def _code_of(causes: Sequence[Cause]) -> int:
    """Of a launch that was told to end, or ended well."""
    if not causes:
        return ExitCode.OK
    told = _what_was_told(causes)
    return (told or causes[0]).shell_code


def _what_was_told(causes: Sequence[Cause]) -> Cause | None:
    """The worker whose exit code, or error, says that another attempt is not wanted."""
    for code in NOT_RESTARTED:
        for cause in causes:
            if cause.exit_code == code:
                return cause
    return next((cause for cause in causes if cause.final and not cause.was_signalled), None)
