"""The drill: a script uninterrupted, its twin, and the same with faults; then what differs, and why.

    conduct(order) -> Outcome       pass: all is equal; differ: with a diagnosis; cannot, unsafe: it says why

Invariant: the script is run as it is, in the directory of the user's, and what its Runs write does not touch its run
directories; a script that writes there by itself is not run again once that is seen. All of it, processes and scratch,
is gone when it is over, unless the scratch is asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from dist_train.drill.diagnosis import (
    Diagnosis,
    Difference,
    diagnose_resume,
    diagnose_twins,
    first_difference,
    unseeded_generators,
)
from dist_train.drill.fault_plan import FaultPlan
from dist_train.drill.faults import Fired
from dist_train.drill.lives import Ended, command_of, run_life
from dist_train.drill.records import RECORDS, Records, last_step, read_records, shown_names, slowest_step_seconds
from dist_train.drill.rehearsal import RUNS, Rehearsal, read_places
from dist_train.drill.scenario import NAMES, Course, plan_faults
from dist_train.drill.untouched import changed, is_own_output, listing
from dist_train.drill.uses import mentions_dist_train

Json = Any
FINISHED: Final = ("done", "early_stopped")
LOG: Final = "output.log"
SAVES_IN_ALL: Final = 10
_LEAST_STALL_SECONDS: Final = 30.0
_LEAST_START_SECONDS: Final = 60.0
_STOPPED_SECONDS: Final = 2.0
_SLOWER: Final = 10.0
"""How much slower than the slowest uninterrupted step a step may be before it counts as stuck."""
_SPARE_LIVES: Final = 5
_SHOW_SECONDS: Final = 0.3
_MOST_SHOWN: Final = 5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked for."""

    script: Sequence[str]
    kills: int = 6
    steps: int = 60
    processes: int = 1
    seed: int = 0
    patience_seconds: float = 600.0


@dataclass(slots=True, kw_only=True)
class Rehearsed:
    """One run of the script, from its first life to its last."""

    name: str
    folder: Path
    ended: list[Ended] = field(default_factory=list)
    records: Records = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.ended)

    @property
    def output(self) -> str:
        path = self.folder / LOG
        return path.read_text(errors="replace") if path.exists() else ""

    def run_dirs(self) -> dict[str, Path]:
        return {path.name: path for path in sorted((self.folder / RUNS).glob("*")) if path.is_dir()}

    def events(self) -> list[Json]:
        """Of all runs' run.jsonl, in order."""
        lines = [line for path in self.run_dirs().values() for line in _read_lines(path / "run.jsonl")]
        return sorted(lines, key=lambda line: float(line["time"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it."""

    verdict: Literal["pass", "differ", "cannot", "unsafe"]
    reason: str = ""
    """Why it cannot be drilled (safely), or what failed; several lines."""
    plain: Rehearsed | None = None
    twin: Rehearsed | None = None
    faulted: Rehearsed | None = None
    plan: FaultPlan | None = None
    fired: Sequence[Fired] = ()
    difference: Difference | None = None
    diagnosis: Diagnosis | None = None
    deviations: Sequence[str] = ()
    """What is not equal at the end, worst first."""
    compared: int = 0
    """Tensors of the newest checkpoints."""
    unseeded: Sequence[str] = ()
    """Random generators that the script leaves to chance and draws nothing from."""
    touched: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Run directories of the user's that are not as they were, with their files that changed."""
    places: Sequence[str] = ()
    changed: Sequence[str] = ()
    """Files below the working directory that changed meanwhile, whoever did it."""


class _CannotDrillError(Exception):
    """The script cannot be drilled; the message says why."""


class _UnsafeError(Exception):
    """Something writes into the user's run directories; the message says what and where."""


class _RestartFailedError(Exception):
    """A life ended with an error of its own, or there were too many; the message says which."""


class Drill:
    """One drill in one scratch folder.

    Args:
        show: the live line: what is going on.
        say: a line that stays: what has come of it.
    """

    def __init__(self, order: Order, scratch: Path, show: Say, say: Say) -> None:
        self._order = order
        self._scratch = scratch
        self._show = show
        self._say = say
        self._save_every = max(1, order.steps // SAVES_IN_ALL)

    def conduct(self) -> Outcome:
        """Runs it all."""
        script = Path(self._order.script[0])
        if self._order.script[0] != "-m" and script.suffix == ".py" and not mentions_dist_train(script.resolve()):
            return Outcome(verdict="cannot", reason=f"{script} does not use dist_train")
        before = listing(Path.cwd(), contents=False)
        try:
            outcome = self._rehearse()
        except _CannotDrillError as error:
            outcome = Outcome(verdict="cannot", reason=str(error))
        except _UnsafeError as error:
            outcome = Outcome(verdict="unsafe", reason=str(error))
        return self._with_the_users_files(outcome, before)

    def _rehearse(self) -> Outcome:
        plain = self._uninterrupted("uninterrupted", "plain")
        twin = self._uninterrupted("once more", "twin")
        if outcome := _judge_twins(plain, twin):
            return outcome
        course = Course(
            last_step=last_step(plain.records),
            save_every=self._save_every,
            saves_within_epochs=_saves_within_epochs(plain),
        )
        plan = plan_faults(self._scratch / "faults", count=self._order.kills, seed=self._order.seed, course=course)
        faulted = self._folder("faults", "faulted")
        try:
            self._suffer(faulted, plan, plain)
        except _RestartFailedError as error:
            return Outcome(verdict="differ", reason=str(error), plain=plain, twin=twin, faulted=faulted, plan=plan,
                           fired=plan.fired())  # fmt: skip
        return _judge_faulted(plain, twin, faulted, plan)

    # Running

    def _folder(self, name: str, folder: str) -> Rehearsed:
        path = self._scratch / folder
        path.mkdir(parents=True)
        return Rehearsed(name=name, folder=path)

    def _uninterrupted(self, name: str, folder: str) -> Rehearsed:
        run = self._folder(name, folder)
        ended = self._live(run, {}, lambda: self._order.patience_seconds, name)
        run.records = read_records(run.folder)
        if ended.given_up:
            raise _CannotDrillError(
                f"the uninterrupted run made no step for {self._order.patience_seconds:.0f} s and was ended "
                f"(--patience).\n{_tail(run.output)}"
            )
        if ended.code != 0:
            raise _CannotDrillError(f"the uninterrupted run ended with {_code(ended)}:\n{_tail(run.output)}")
        if not run.run_dirs():
            raise _CannotDrillError("never entered a Run")
        if not last_step(run.records):
            raise _CannotDrillError("the run made no step: there is nothing to interrupt")
        if unfinished := [name for name, status in _statuses(run).items() if status not in FINISHED]:
            raise _CannotDrillError(f"the uninterrupted run did not finish {', '.join(unfinished)}")
        if touched := touched_directories(self._scratch / "plain"):
            raise _UnsafeError(_why_unsafe(touched))
        self._say(f"  {name:<15} {last_step(run.records)} steps, {_saves(run)} saves, {run.seconds:.1f} s")
        return run

    def _suffer(self, run: Rehearsed, plan: FaultPlan, plain: Rehearsed) -> None:
        """The same command until it ends well, as a person or a launcher would start it."""
        while True:
            came, said = len(plan.fired()), len(run.output)
            number = len(run.ended) + 1
            patience = self._patience(run, plan, plain, came)
            ended = self._live(run, plan.environment(), patience, f"with faults, life {number}")
            fired = plan.fired()[came:]
            finished = len(run.run_dirs()) >= len(plain.run_dirs()) and all(
                status in FINISHED for status in _statuses(run).values()
            )
            is_over = ended.code == 0 and finished
            self._say_life(number, fired, is_over=is_over)
            if is_over:
                break
            if not fired:
                why = f"Life {number} ended with {_code(ended)}, though no fault had come in it:"
                raise _RestartFailedError(f"{why}\n{_tail(run.output[said:])}")
            if number >= len(plan.faults) + _SPARE_LIVES:
                raise _RestartFailedError(f"{number} lives were not enough:\n{_tail(run.output[said:])}")
        run.records = read_records(run.folder)

    def _patience(self, run: Rehearsed, plan: FaultPlan, plain: Rehearsed, came: int) -> Callable[[], float]:
        """How long the life that is about to begin may do nothing: what is stopped is not waited for."""
        slow_step = _SLOWER * slowest_step_seconds(plain.records)
        number = len(run.ended) + 1

        def seconds() -> float:
            if any(one.kind == "stop" for one in plan.fired()[came:]):
                return _STOPPED_SECONDS + slow_step
            if not _has_stepped(run, number):
                return _LEAST_START_SECONDS + _SLOWER * plain.ended[0].seconds
            return _LEAST_STALL_SECONDS + slow_step

        return seconds

    def _live(self, run: Rehearsed, environment: dict[str, str], patience: Callable[[], float], what: str) -> Ended:
        order = self._order
        rehearsal = Rehearsal(
            folder=str(run.folder),
            max_steps=order.steps,
            save_every=self._save_every,
            log_every=max(1, order.steps // 20),
        )
        started = shown = time.monotonic()

        def show() -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < _SHOW_SECONDS:
                return
            shown, seconds = now, now - started
            self._show(f"  {what}: step {_progress(run.folder)}/{order.steps}, {seconds:.0f} s")

        ended = run_life(
            command_of(order.script, order.processes),
            run.folder / LOG,
            {**rehearsal.environment(), **environment},
            patience=patience,
            activity=lambda: _activity(run.folder),
            on_poll=show,
        )
        run.ended.append(ended)
        return ended

    def _say_life(self, number: int, fired: Sequence[Fired], *, is_over: bool) -> None:
        came = [f"{NAMES.get(one.kind, one.kind)} at step {one.global_step}" for one in fired]
        self._say(f"  life {number:<10} {', '.join([*came, *['to the end'] * is_over])}")

    def _with_the_users_files(self, outcome: Outcome, before: dict[str, str]) -> Outcome:
        """What became of the user's directories meanwhile."""
        plain, scratch = self._scratch / "plain", self._scratch.resolve()
        names = [
            name
            for name in changed(before, listing(Path.cwd(), contents=False))
            if not Path(name).resolve().is_relative_to(scratch) and not is_own_output(name)
        ]
        touched = touched_directories(plain)
        if touched and outcome.verdict == "pass":
            outcome = replace(outcome, verdict="unsafe", reason=_why_unsafe(touched))
        return replace(
            outcome, touched=touched, places=[place["original"] for place in read_places(plain)], changed=names
        )


# Judging


def _judge_twins(plain: Rehearsed, twin: Rehearsed) -> Outcome | None:
    """Whether two uninterrupted runs differ: then nothing can be said of an interrupted one."""
    difference = first_difference(plain.records, twin.records)
    deviations, compared = _deviations(plain, twin, unseeded_generators(plain.records, twin.records))
    if difference is None and not deviations:
        return None
    diagnosis = diagnose_twins(difference) if difference else Diagnosis(
        cause="evaluation",
        sentence=f"Two uninterrupted runs train the same, but end apart: {deviations[0]}.",
        advice="Let the evaluation draw nothing that is not seeded, and measure no time.",
    )  # fmt: skip
    return Outcome(verdict="differ", plain=plain, twin=twin, difference=difference, diagnosis=diagnosis,
                   deviations=deviations, compared=compared)  # fmt: skip


def _judge_faulted(plain: Rehearsed, twin: Rehearsed, faulted: Rehearsed, plan: FaultPlan) -> Outcome:
    difference = first_difference(plain.records, faulted.records, twin=twin.records)
    unseeded = unseeded_generators(plain.records, twin.records)
    deviations, compared = _deviations(plain, faulted, unseeded)
    diagnosis = None
    if difference is not None:
        diagnosis = diagnose_resume(difference)
    elif deviations:
        diagnosis = Diagnosis(
            cause="state outside the checkpoint",
            sentence=f"Every step is the same, but the runs end apart: {deviations[0]}. That depends on something that "
            "no checkpoint holds.",
            advice="Give it to the Run: run.register(name, object with state_dict and load_state_dict).",
        )
    return Outcome(
        verdict="differ" if diagnosis else "pass",
        plain=plain,
        twin=twin,
        faulted=faulted,
        plan=plan,
        fired=plan.fired(),
        difference=difference,
        diagnosis=diagnosis,
        deviations=deviations,
        compared=compared,
        unseeded=unseeded,
    )


def _deviations(one: Rehearsed, other: Rehearsed, unseeded: Sequence[str]) -> tuple[list[str], int]:
    """Of the newest checkpoints and histories of all runs; how many tensors were compared."""
    from dist_train.drill.twins import differences_of_runs

    found, compared, others, shown = [], 0, other.run_dirs(), shown_names(one.records)
    for name, run_dir in one.run_dirs().items():
        if name not in others:
            found.append(f"{shown.get(name, name)}: there is no such run")
            continue
        prefix = f"{shown.get(name, name)}: " if len(others) > 1 else ""
        differences, count = differences_of_runs(run_dir, others[name], unseeded=unseeded)
        compared += count
        found += [f"{prefix}{line}" for line in differences]
    return found, compared


# Reading what a run left


def touched_directories(folder: Path) -> dict[str, list[str]]:
    """Run directories that are not as they were when a rehearsal first asked for them, and what of them changed."""
    found = {
        place["original"]: changed(place["files"], listing(Path(place["original"]))) for place in read_places(folder)
    }
    return {original: names for original, names in found.items() if names}


def _why_unsafe(touched: Mapping[str, Sequence[str]]) -> str:
    places = [f"{', '.join(names[:_MOST_SHOWN])} in {original}" for original, names in touched.items()]
    return (
        f"its run directory was written to past the Run: {'; '.join(places)}. The drill redirects what a Run "
        "writes and nothing else, so that the script itself (or another process, which trains there) did that, and "
        "every life would do it again. Let the script write below run.run_dir, which is scratch in a drill, or drill "
        "it with another run directory."
    )


def _read_lines(path: Path) -> list[Json]:
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def _statuses(run: Rehearsed) -> dict[str, str]:
    """Run -> how it stands, as it says itself."""
    found = {}
    for name, path in run.run_dirs().items():
        try:
            found[name] = str(json.loads((path / "status.json").read_text())["status"])
        except (OSError, ValueError, KeyError):
            found[name] = "unknown"
    return found


def _saves(run: Rehearsed) -> int:
    return sum(event["event"] == "committed" for event in run.events())


def _saves_within_epochs(run: Rehearsed) -> list[int]:
    """Steps of saves that another step of the same epoch followed."""
    epochs = {
        step: line["epoch"] for lives in run.records.values() for one in lives for step, line in one.steps.items()
    }
    saved = sorted({event["global_step"] for event in run.events() if event["event"] == "committed"})
    return [step for step in saved if step in epochs and epochs.get(step + 1) == epochs[step]]


def _activity(folder: Path) -> list[tuple[str, int]]:
    """What grows while a run steps or says something."""
    paths = [*folder.glob(f"{RECORDS}/*/*.jsonl"), folder / LOG]
    return [(path.name, path.stat().st_size) for path in paths if path.exists()]


def _has_stepped(run: Rehearsed, number: int) -> bool:
    """Whether the present life has made a step; each is an attempt of its own once it has entered a run."""
    attempts = {
        path.name.partition("-")[0] for path in run.folder.glob(f"{RECORDS}/*/*-r0.jsonl") if path.stat().st_size
    }
    return len(attempts) >= number


def _progress(folder: Path) -> int:
    """The newest step on the main rank, read from the end of its newest record."""
    paths = sorted(folder.glob(f"{RECORDS}/*/*-r0.jsonl"), key=lambda path: path.stat().st_mtime)
    if not paths:
        return 0
    lines = _read_lines(paths[-1])
    return int(lines[-1]["step"]) if lines else 0


def _tail(output: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-lines:])


def _code(ended: Ended) -> str:
    if ended.given_up:
        return "nothing happening any more"
    return f"exit code {ended.code}" if ended.code >= 0 else f"signal {-ended.code}"
