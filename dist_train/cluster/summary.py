"""What came of a launch, in a few lines for a person, or as JSON.

Invariant: says nothing that the attempts do not hold; what an attempt lost is what was done after its last commit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dist_train.cluster.attempts import describe
from dist_train.cluster.restart_policy import Ended
from dist_train.console import seconds_text
from dist_train.errors import ExitCode

Json = Any
NODES_CHANGED = "nodes came or left"
_GOES_ON = ("preempted", "time_limit", "interrupted")
_SAID: dict[int, str] = {
    ExitCode.OK: "ended well",
    ExitCode.REQUEUE: "stopped, to be continued by the same command",
    ExitCode.DO_NOT_REQUEUE: "stopped for good",
    ExitCode.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One life of the worker group."""

    number: int
    world_size: int
    ended: Ended
    step: int | None
    """The last optimizer update that was done."""
    why: str
    """Of the decision that followed."""

    @property
    def lost_steps(self) -> int:
        """Updates that the next attempt has to do again."""
        if self.step is None or self.ended.committed_step is None or not (self.ended.causes or self.ended.membership):
            return 0
        return max(self.step - max(self.ended.committed_step, 0), 0)


@dataclass(slots=True, kw_only=True)
class Conclusion:
    """What came of a launch."""

    exit_code: int = ExitCode.ERROR
    why: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    run_dir: str | None = None
    outcome: str | None = None
    """Why the run of the last attempt ended, as `StopReason` has it; None where no worker said it."""
    seconds: float = 0.0

    @property
    def lost_steps(self) -> int:
        return sum(attempt.lost_steps for attempt in self.attempts)


def summary_lines(conclusion: Conclusion, goodput: float | None = None) -> list[str]:
    """One line after a good end of the only attempt; else one an attempt, and the first failure's traceback.

    Args:
        goodput: of the whole run: the share of its wall-clock time that went into steps which were kept; None where
            nobody knows.
    """
    count = len(conclusion.attempts)
    end = _SAID.get(conclusion.exit_code, f"ended with exit code {conclusion.exit_code}")
    if conclusion.exit_code == ExitCode.OK and conclusion.outcome in _GOES_ON:
        end = f"saved and stopped ({conclusion.outcome}), the same command goes on,"
    known = f", goodput of the run {goodput:.0%}" if goodput is not None else ""
    lost = f", {_counted(conclusion.lost_steps, 'step')} done again or lost" if conclusion.lost_steps else ""
    head = f"{end} after {_counted(count, 'attempt')} in {seconds_text(conclusion.seconds)}{lost}{known}"
    lines = [f"{head}: {conclusion.why}" if conclusion.why else head]
    if count > 1 or conclusion.exit_code:
        lines += [f"  attempt {attempt.number}: {_line(attempt)}" for attempt in conclusion.attempts]
    return [*lines, *_traceback_lines(conclusion)]


def summary_json(conclusion: Conclusion) -> dict[str, Json]:
    attempts = [{**asdict(attempt), "lost_steps": attempt.lost_steps} for attempt in conclusion.attempts]
    return {**asdict(conclusion), "attempts": attempts, "lost_steps": conclusion.lost_steps}


def _line(attempt: Attempt) -> str:
    ended = attempt.ended
    parts = [describe(cause) for cause in ended.causes if not cause.secondary] or [
        describe(cause) for cause in ended.causes[:1]
    ]
    if ended.membership:
        parts = [NODES_CHANGED]
    what = "; ".join(parts) or ("told to end" if ended.stop_asked else "ended well")
    committed = ended.committed_step
    if committed is not None:
        what += f"; committed step {committed}" if committed >= 0 else "; nothing committed"
    ranks = _counted(attempt.world_size, "rank")
    return f"{seconds_text(ended.seconds)}, {ranks}: {what}"


def _traceback_lines(conclusion: Conclusion) -> list[str]:
    if not (conclusion.exit_code and conclusion.attempts and conclusion.attempts[-1].ended.causes):
        return []
    first = conclusion.attempts[-1].ended.causes[0]
    if not first.traceback:
        return []
    return [f"  rank {first.rank}:", *(f"    {line}" for line in first.traceback.rstrip().splitlines())]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
