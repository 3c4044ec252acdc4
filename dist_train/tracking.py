"""Trackers (TensorBoard, wandb, Accelerate's others) as views of the run's history: one tracker run over all attempts.

Invariant: whatever a kill leaves behind, a tracker shows every step of the folded history once, with its values.
TensorBoard is told at once, and told at a restart to forget what a dead attempt wrote beyond its checkpoint. The others
cannot forget: they get a row when a committed checkpoint covers it. What a tracker lost is given again. A branch, or a
resume from before what a tracker was given, begins another tracker run, with the whole history.
It works on the main rank only, without collectives, and no failure of a tracker ends training.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint.branch import read_record
from dist_train.checkpoint.manifest import TRACKING_FILE, Progress
from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics, rows_by_step
from dist_train.wandb_file import last_step

logger = logging.getLogger(__name__)
Json = Any
NOTHING = -1
"""What a tracker was given whose rows begin at step 0."""
FOLDER = "tracker"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One tracker run: restarts continue it, a branch leaves it behind for the next number."""

    number: int
    run_id: str
    run_name: str
    """The project, or the folder of TensorBoard's files."""
    folder: str
    """Where a tracker writes that has no place of its own."""
    places: Sequence[str]
    """All folders in which earlier attempts may have left a tracker's files, `folder` included."""
    config: Mapping[str, Json]

    @property
    def id(self) -> str:
        return self._numbered(self.run_id)

    @property
    def name(self) -> str:
        return self._numbered(self.run_name)

    def _numbered(self, text: str) -> str:
        return text if self.number == 1 else f"{text}-{self.number}"


class View:
    """One tracker. This class knows nothing special of it: it continues its run by its own means, if it has any."""

    is_live = False
    """Whether it can forget: then a row need not wait for its checkpoint."""
    is_ours = True
    """Whether it was started here, and is finished here."""

    def __init__(self, accelerator: Any, kind: Any, line: Line) -> None:
        self.accelerator = accelerator
        self.kind = kind
        self.line = line
        self.tracker: Any = None
        self.given = NOTHING
        """It holds the rows of every step up to this one."""

    @property
    def name(self) -> str:
        """As Accelerate calls it; a tracker of the user's own has a name."""
        return str(getattr(self.kind, "value", None) or getattr(self.kind, "name", self.kind))

    def find_given(self, recorded: int) -> int:
        """What it was given, as far as one can tell before it is opened; `recorded` is what we wrote down."""
        return recorded

    def open(self) -> None:
        """Starts the tracker; rows after `given` will come."""
        self.start(self.line.name, {})

    def start(self, project: str, settings: dict[str, Any]) -> None:
        """As `Accelerator.init_trackers`, but alone: one that fails leaves the others."""
        accelerator = self.accelerator
        kept = accelerator.log_with, accelerator.trackers
        accelerator.log_with, accelerator.trackers = [self.kind], []
        try:
            accelerator.init_trackers(project, init_kwargs={self.name: settings})
            (self.tracker,) = accelerator.trackers
        finally:
            accelerator.log_with, accelerator.trackers = kept

    def give(self, step: int, row: Mapping[str, float]) -> None:
        self.tracker.log(dict(row), step=step)


class ForeignView(View):
    """Started by the script before the run began: told what happens, and otherwise the script's business."""

    is_live = True
    is_ours = False

    def open(self) -> None:
        self.tracker = self.kind


class TensorBoardView(View):
    """A mark in the files takes back, for readers, the steps that were written before it."""

    is_live = True

    def find_given(self, recorded: int) -> int:
        with suppress(OSError):
            if any(
                "tfevents" in name for name in os.listdir(os.path.join(self.accelerator.logging_dir, self.line.name))
            ):
                return recorded
        return NOTHING

    def open(self) -> None:
        self.start(self.line.name, {"purge_step": self.given + 1})


class WandbView(View):
    """Steps must rise, and a kill takes the rows of the last seconds along: wandb's files or server know which."""

    def find_given(self, recorded: int) -> int:
        places = [os.environ["WANDB_DIR"]] if "WANDB_DIR" in os.environ else self.line.places
        try:
            return last_step([os.path.join(place, "wandb") for place in places], self.line.id)
        except Exception as error:  # a format of tomorrow: better a gap than a step twice
            logger.warning("What wandb wrote down cannot be read (%s); rows that a kill took along stay lost.", error)
            return recorded

    def open(self) -> None:
        os.makedirs(self.line.folder, exist_ok=True)
        settings = {"id": self.line.id, "resume": "allow", "config": dict(self.line.config)}
        defaults = {"WANDB_DIR": ("dir", self.line.folder), "WANDB_NAME": ("name", self.line.name)}
        settings |= dict(value for variable, value in defaults.items() if variable not in os.environ)
        self.start(os.environ.get("WANDB_PROJECT", self.line.run_name), settings)
        self.given = max(self.given, self.tracker.run.starting_step - 1)  # online: what the server has

    def give(self, step: int, row: Mapping[str, float]) -> None:
        self.tracker.log(dict(row), step=step, commit=True)


_VIEWS: dict[str, type[View]] = {"tensorboard": TensorBoardView, "wandb": WandbView}


class Tracking:
    """All trackers of a run.

    Args:
        accelerator: those of its `log_with` are started here; those that the script has started are told as well.
        enabled: on the main rank.
    """

    def __init__(self, accelerator: Any | None, store: Store, *, enabled: bool) -> None:
        self._accelerator: Any = accelerator
        self._store = store
        self._is_wanted = enabled and accelerator is not None
        self._views: list[View] = []
        self._line = 1
        self._branch = 0
        self._given: dict[str, int] = {}
        """Of each tracker by name, as it is written down: of one that failed, as of its last success."""
        self._rows: dict[int, dict[str, float]] = {}
        """Not yet given to those that wait for a checkpoint; oldest first."""

    def start(self, run_id: str, progress: Progress, config: Mapping[str, Json], origin: Store | None) -> None:
        """Opens the trackers where the history stands, and gives them what they lack of it.

        Args:
            origin: where the checkpoint lies that the run resumed from, if that is this run's.
        """
        if not self._is_wanted or not (self._accelerator.log_with or self._accelerator.trackers):
            return
        places = [self._store, *([] if origin is None or origin.root == self._store.root else [origin])]
        record = _read_record(places)
        branch = read_record([self._store])
        self._branch = branch["attempt"] if branch else 0
        self._line = record["line"] + (record["branch"] != self._branch)
        self._given = record["given"] if self._line == record["line"] else {}
        self._open(progress, lambda number: self._make_line(number, run_id, config, places))
        rows = rows_by_step(read_metrics(self._store)[: progress.metric_records])
        for view in self._views:
            for step, row in rows.items():
                if view.is_ours and step > view.given and (view.is_live or step <= complete_step(progress)):
                    self._give(view, step, row)
        self._rows = {step: row for step, row in rows.items() if step > complete_step(progress)}
        self._settled(complete_step(progress))

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """What was measured at a step, of which a part may have come before."""
        row = {name: value for name, value in values.items() if value is not None}
        if any(not view.is_live for view in self._views):
            self._rows.setdefault(step, {}).update(row)
        for view in [one for one in self._views if one.is_live]:
            self._give(view, step, row)

    def settle(self, progress: Progress, *, at_end: bool = False) -> None:
        """A checkpoint is durable: nothing up to it will ever be measured again."""
        complete = complete_step(progress, at_end=at_end)
        ready = [step for step in self._rows if step <= complete]
        for step in ready:
            row = self._rows.pop(step)
            for view in [one for one in self._views if not one.is_live and step > one.given]:
                self._give(view, step, row)
        self._settled(complete)

    def finish(self) -> None:
        """Closes what was started here; without Accelerate's end_training(), which destroys the process group."""
        for view in [one for one in self._views if one.is_ours]:
            self._attempt(view, view.tracker.finish)
            with suppress(ValueError):
                self._accelerator.trackers.remove(view.tracker)
        self._views = []

    def _open(self, progress: Progress, make_line: Callable[[int], Line]) -> None:
        """Those that wait must not have been given more than the history holds, or they begin anew, all together."""
        started = [ForeignView(self._accelerator, one, make_line(0)) for one in self._accelerator.trackers]
        if started:
            _warn_of_started(started)
            kinds: list[Any] = []
        else:
            kinds = list(self._accelerator.log_with)
        while True:
            line = make_line(self._line)
            views = [_VIEWS.get(getattr(kind, "value", ""), View)(self._accelerator, kind, line) for kind in kinds]
            for view in views:
                view.given = view.find_given(self._given.get(view.name, NOTHING))
                if view.is_live:
                    view.given = min(view.given, complete_step(progress))
            if all(view.given <= progress.global_step for view in views):
                self._views = [view for view in [*views, *started] if self._attempt(view, view.open)]
                if all(view.given <= progress.global_step for view in self._views):
                    break
                self.finish()
            self._line, self._given = self._line + 1, {}
        self._accelerator.trackers = [view.tracker for view in self._views]

    def _make_line(self, number: int, run_id: str, config: Mapping[str, Json], places: Sequence[Store]) -> Line:
        return Line(
            number=number,
            run_id=run_id,
            run_name=self._store.root.name,
            folder=str(self._store.path(FOLDER)),
            places=[str(place.path(FOLDER)) for place in places],
            config=config,
        )

    def _give(self, view: View, step: int, row: Mapping[str, float]) -> None:
        if row and view in self._views and not self._attempt(view, lambda: view.give(step, row)):
            self._views.remove(view)

    def _attempt(self, view: View, work: Callable[[], None]) -> bool:
        """Whether it went well; a tracker that fails is left alone until the next start, which makes up for it."""
        try:
            work()
        except Exception as error:  # a tracker's own errors, a network's, a missing account's
            logger.warning(
                "The tracker %s failed and is left alone from here on: %s: %s. Training goes on and %s is written in "
                "any case; the next start of this run gives the tracker what it lacks.",
                view.name,
                type(error).__name__,
                " ".join(str(error).split()),
                self._store.shown("metrics.jsonl"),
            )
            return False
        return True

    def _settled(self, complete: int) -> None:
        """Writes down how far the trackers are; a line that is lost costs at most rows that are given again."""
        for view in self._views:
            view.given = max(view.given, complete)
        self._given |= {view.name: view.given for view in self._views if view.is_ours}
        if self._given:
            record = {"line": self._line, "branch": self._branch, "given": self._given}
            with suppress(OSError):
                self._store.replace(TRACKING_FILE, json.dumps(record).encode(), durable=False)


def complete_step(progress: Progress, *, at_end: bool = False) -> int:
    """The last step of which everything is measured: an epoch's values are added to its last step after a save."""
    is_complete = progress.evaluation == "done" or (at_end and progress.evaluation == "none")
    return progress.global_step if is_complete else progress.global_step - 1


def _read_record(places: Sequence[Store]) -> Json:
    """Which tracker run is the present one, and how far it is."""
    for place in places:
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(place.read(TRACKING_FILE))
            return {name: record[name] for name in ("line", "branch", "given")}
    branch = read_record(places)
    return {"line": 1, "branch": branch["attempt"] if branch else 0, "given": {}}


def _warn_of_started(views: Sequence[View]) -> None:
    logger.warning(
        "%s: init_trackers() was called before the run was entered, so that each restart begins another tracker run or "
        "shows steps twice. Leave the call out: the run starts what Accelerator(log_with=...) names, continues it over "
        "restarts and closes it at the end.",
        ", ".join(view.name for view in views),
    )
