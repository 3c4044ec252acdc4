"""Tells people what a run does: terminal, run.jsonl, status.json. On ranks other than the main one it says nothing.

Invariant: "Checkpoint saved" is said only of what is durable. It decides nothing and raises nothing.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dist_train.checkpoint.manifest import STATUS_FILE, Best, Manifest, Progress
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.writer import Committed, Event, Pruned, SaveFailed, Stripped, Writing
from dist_train.console import (
    LONG_WORK_SECONDS,
    Console,
    EventLog,
    bytes_text,
    metric_label,
    metric_text,
    part_text,
    seconds_text,
)
from dist_train.differences import Differences
from dist_train.health.deadline import Deadline
from dist_train.ledger import Window
from dist_train.tree import shown

logger = logging.getLogger(__name__)
Json = Any
LIVE_SECONDS = 0.25
_GROUP = re.compile(r"\[(\d+)\]")
"""The number of a parameter group in a setting's name."""


class Reporter:
    """The main rank's voice."""

    def __init__(
        self, store: Store, *, is_main: bool, run_dir: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = Console(enabled=is_main)
        self.events = EventLog(store, enabled=is_main)
        self.epochs = 0
        """Epochs that the run was asked for; for "13/20"."""
        self._store = store
        self._is_main = is_main
        self._run_dir = run_dir
        self.loss: float | None = None
        """Training loss as of the last record."""
        self.spent_at: Callable[[int], Mapping[str, float] | None] = lambda global_step: None
        """What the attempt had spent its time on when it took the state of a checkpoint that is durable now."""
        self._stalls: dict[int, float] = {}
        self._clock = clock
        self._shown_at = float("-inf")
        self._shown_step = 0
        self._warned_of_not_finite = False

    def note_stall(self, global_step: int, seconds: float) -> None:
        """How long training waited for a save that is now in flight."""
        self._stalls[global_step] = seconds

    def stall_of(self, event: Committed) -> float:
        """How long training waited for that save."""
        return self._stalls.get(event.manifest.progress.global_step, 0.0)

    def report(self, events: Sequence[Event], *, failures: int = 0, most_failures: int = 0, newest: int = -1) -> None:
        """What the writer has done."""
        if events:  # a live line that tells of a save in flight is out of date
            self.console.end_live()
        for event in events:
            if isinstance(event, Committed):
                self._report_commit(event)
            elif isinstance(event, (Pruned, Stripped)):
                name = "pruned" if isinstance(event, Pruned) else "stripped"
                self.events.write(name, path=event.path, reason=event.reason, bytes=event.num_bytes)
            else:
                self._report_failure(event, failures, most_failures, newest)

    def resumed(self, path: str, manifest: Manifest, told: Differences) -> None:
        """What this attempt continues, and a table of what the user writes now and the checkpoint had otherwise."""
        step = manifest.progress.global_step
        changes = {setting: (shown(then), shown(today)) for setting, (then, today) in told.changes.items()}
        self.events.write(
            "resumed", path=path, global_step=step, digest=manifest.digest, changes=changes, notes=told.notes
        )
        if changes:
            self.console.say("Settings changed since the checkpoint:")
        for line in _table(changes):
            self.console.say(line)
        for note in told.notes:
            self.console.say(note)

    def notes(self, notes: Sequence[str]) -> None:
        """What people should know of a fresh start, one sentence each; that of a resume is told with it."""
        if notes:
            self.events.write("noted", notes=list(notes))
        for note in notes:
            self.console.say(note)

    def problems(self, problems: Sequence[str]) -> None:
        """Checkpoints that could not be used."""
        for problem in problems if self._is_main else ():
            logger.warning("%s", problem)
            self.events.write("skipped_checkpoint", problem=problem)

    def where_from(self, path: str, progress: Progress, best: Best | None, again: str = "") -> None:
        """
        Args:
            again: how a branch that is complete is started once more; "" for what is none.
        """
        done = f"epoch {progress.epochs_completed} of {max(self.epochs, progress.epochs_completed)} done"
        shown = f", best {best.monitor} {metric_text(best.monitor, best.value).rstrip('%')}" if best else ""
        self.console.say(f"Resuming from {path} ({done}{shown})")
        if progress.epochs_completed >= self.epochs:
            anew = f" To branch there again: resume={again!r}." if again else ""
            self.console.say(f"Nothing is left to do; give more epochs to go on.{anew}")

    def step(self, epoch: int, global_step: int, share: float | None, writing: Writing | None = None) -> None:
        """The live line: at most a few times a second, from what is known without asking the device."""
        now = self._clock()
        if now - self._shown_at < LIVE_SECONDS or not self.console.is_live:
            return
        pace = (global_step - self._shown_step) / (now - self._shown_at) if self._shown_step else 0.0
        self._shown_at, self._shown_step = now, global_step
        parts = [f"Epoch {epoch + 1}/{self.epochs}", f"step {global_step}"]
        parts += [f"{share:.0%} of the epoch"] if share is not None else []
        parts += [f"{pace:.1f} steps/s"] if pace else []
        parts += [f"Train Loss: {self.loss:.4f}"] if self.loss is not None else []
        parts += _writing_parts(writing, time.monotonic())
        self.console.show(" - ".join(parts))

    def replay(self, done: int, total: int) -> None:
        """The live line while a loader's consumed batches are gone through again."""
        now = self._clock()
        if done == total:
            self.console.end_live()
        elif self.console.is_live and now - self._shown_at >= LIVE_SECONDS:
            self._shown_at = now
            self.console.show(f"Finding the place in the training loader: batch {done} of {total} ({done / total:.0%})")

    def waiting(self, writing: Writing | None) -> None:
        """The live line while training waits for a save."""
        if parts := _writing_parts(writing, time.monotonic()):
            self.console.show(parts[0])

    def epoch(self, completed: int, train_loss: float | None, metrics: Mapping[str, float]) -> None:
        self.console.end_live()
        loss = "" if train_loss is None else f" - Train Loss: {train_loss:.4f}"
        shown = "".join(f" - {metric_label(name)}: {metric_text(name, value)}" for name, value in metrics.items())
        self.console.say(f"Epoch {completed}/{self.epochs}{loss}{shown}")

    def warn_of_not_finite(self, values: Mapping[str, float | None], global_step: int, committed_step: int) -> None:
        """Once a run: training goes on, but what it saves from here on is probably worth nothing."""
        wrong = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if wrong and not self._warned_of_not_finite:
            self._warned_of_not_finite = True
            kept = "there is no checkpoint yet"
            if committed_step >= 0:
                kept = f"the newest checkpoint is step {committed_step}. Keep a good one with `dist-train pin "
                kept += f"{self._run_dir} step:N` before newer ones replace it"
            logger.warning(
                "%s %s not finite at step %d. Training goes on; %s. Look at the learning rate and the data.",
                ", ".join(wrong),
                "are" if len(wrong) > 1 else "is",
                global_step,
                kept,
            )
            self.events.write("not_finite", global_step=global_step, names=wrong)

    def bad_update(self, kind: str, global_step: int, what: str, action: str, where: Mapping[str, Json]) -> None:
        """An update whose gradient is not finite, or a spike, and what is done about it."""
        self.console.end_live()
        self.events.write(kind, global_step=global_step, action=action, **where)
        if action == "skip" and self._is_main:
            logger.warning("%s%s. The update was left out; training goes on.", what[0].upper(), what[1:])

    def rolls_back(self, path: str, what: str, where: Mapping[str, Json]) -> None:
        """The run goes back to a checkpoint; it is recorded by now, and nothing was moved yet."""
        self.console.end_live()
        self.events.write("rolled_back", path=path, **where)
        if self._is_main:
            logger.warning(
                "%s%s. The run goes back to %s, and on from there without them.", what[0].upper(), what[1:], path
            )

    def left_out(self, window: Window) -> None:
        """A window of the skip ledger was taken from the loader."""
        place = {"first": window.first, "last": window.last, "unit": window.unit}
        self.events.write("skipped_window", global_step=window.global_step, epoch=window.epoch, **place)

    def diverged(self, why: str) -> None:
        """The run ends as diverged."""
        self.console.end_live()
        if self._is_main:
            logger.error("%s", why)

    def status(self, status: str, exit_code: int | None, progress: Progress, attempt: int, error: str = "") -> None:
        """status.json: how the run stands or ended."""
        if not self._is_main:
            return
        body = {"status": status, "exit_code": exit_code, "global_step": progress.global_step, "attempt": attempt}
        body |= {"epochs_completed": progress.epochs_completed, "error": error}
        try:
            self._store.replace(STATUS_FILE, json.dumps(body).encode())
        except OSError as failure:
            logger.warning("%s was not written: %s", self._store.path(STATUS_FILE), failure)

    def time_limit(self, deadline: Deadline, committed_step: int, *, evaluation_pending: bool) -> None:
        """Why the run stopped before its end, what is saved, and how it goes on."""
        advice = "" if deadline.has_stepped else " There was no time for a single step: give max_time more of it."
        self.console.say(
            f"Time limit: {deadline.why}. {self._how_to_go_on(committed_step, evaluation_pending)}{advice}"
        )

    def told_to_leave(self, name: str) -> None:
        """At once, as far as the main thread can; `name` is the signal's."""
        self.console.end_live()
        self.console.say(f"{name}: saving at the next step boundary and stopping.")

    def left_early(self, name: str, global_step: int, committed_step: int, *, evaluation_pending: bool) -> None:
        """As `time_limit`, after a signal."""
        after = self._how_to_go_on(committed_step, evaluation_pending)
        self.console.say(f"Stopped by {name} after step {global_step}. {after}")

    def _how_to_go_on(self, committed_step: int, evaluation_pending: bool) -> str:
        saved = f"the newest checkpoint is step {committed_step}" if committed_step >= 0 else "nothing is saved yet"
        first = ", which begins with the evaluation that is pending" if evaluation_pending else ""
        return f"In {self._run_dir} {saved}. Run the same command (or notebook) again to go on from there{first}."

    def _report_commit(self, event: Committed) -> None:
        manifest, progress = event.manifest, event.manifest.progress
        stall = self._stalls.pop(progress.global_step, 0.0)
        done = progress.evaluation == "done"
        title = f"epoch {progress.epochs_completed}" if done else f"in epoch {progress.epoch + 1}"
        where = f"step {progress.global_step}, {bytes_text(manifest.num_bytes)}, stall {stall * 1e3:.0f} ms"
        if event.seconds >= LONG_WORK_SECONDS:
            speed = bytes_text(manifest.num_bytes / event.seconds)
            where += f", durable after {seconds_text(event.seconds)} ({speed}/s)"
        self.console.say(f"Checkpoint saved: {title} ({where})")
        self.events.write(
            "committed",
            path=event.path,
            global_step=progress.global_step,
            bytes=manifest.num_bytes,
            reason=manifest.reason,
            stall_seconds=stall,
            seconds=event.seconds,
            **({} if (spent := self.spent_at(progress.global_step)) is None else {"buckets": spent}),
        )
        best = manifest.best
        if best is not None and manifest.metrics and best.epochs_completed == progress.epochs_completed:
            self.console.say(f"Best model so far: {metric_label(best.monitor)} {metric_text(best.monitor, best.value)}")

    def _report_failure(self, event: SaveFailed, failures: int, most_failures: int, newest: int) -> None:
        cause = "no space: " if event.out_of_space else ""
        fields = {"global_step": event.global_step, "message": cause + event.message}
        self.events.write("failed", out_of_space=event.out_of_space, **fields)
        if event.fatal is not None:
            return  # it is raised, with all that there is to say
        ends = failures > most_failures
        logger.error(
            "The checkpoint of step %d was not saved in %s: %s%s. Training %s (failure %d %s in a row); older "
            "checkpoints are whole, %s.",
            event.global_step,
            self._run_dir,
            cause,
            event.message.rstrip("."),
            "ends" if ends else "goes on and tries again",
            failures,
            f"where {most_failures} are allowed" if ends else f"of at most {most_failures}",
            f"the newest is step {newest}" if newest >= 0 else "there is none yet",
        )


def _table(changes: Mapping[str, tuple[Json, Json]]) -> list[str]:
    """Aligned columns; parameter groups with equal changes share a line."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for setting, (then, today) in changes.items():
        group = _GROUP.search(setting)
        name = setting.replace(group[0], "[*]") if group else setting
        rows.setdefault((name, _short(then), _short(today)), []).append(group[1] if group else "")
    lines = [("setting", "was", "now")]
    for (name, then_text, today_text), groups in rows.items():
        lines.append((name.replace("[*]", f"[{', '.join(groups)}]"), then_text, today_text))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return [f"  {name:<{widths[0]}}  {then:<{widths[1]}}  {today}".rstrip() for name, then, today in lines if changes]


def _writing_parts(writing: Writing | None, now: float) -> list[str]:
    """`saving step 1200: 3.1 of 12.4 GB, 1.9 GB/s`, once a save takes long enough to be read."""
    if writing is None or (seconds := now - writing.started) < LIVE_SECONDS:
        return []
    done = min(writing.done, writing.total)
    speed = f"{bytes_text(done / seconds)}/s" if done < writing.total else "committing"
    return [f"saving step {writing.global_step}: {part_text(done, writing.total)}, {speed}"]


def _short(value: Json) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
