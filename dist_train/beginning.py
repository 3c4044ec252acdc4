"""Where a run begins: at a checkpoint, of which every object takes its part, or afresh; and what is told of it.

Invariant: after `enter` each live object is as the checkpoint says, or nothing was changed and an error says why. The
random generators are put back last, when nothing that belongs to the start can draw from them any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train import differences, phases
from dist_train.agreement import require_alike
from dist_train.checkpoint.attached import compare_attached
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.checkpoint.manifest import WARM_START
from dist_train.checkpoint.restorer import Opened
from dist_train.checkpoint.resume import ResumeRequest, relabelled
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.warm_start import open_weights
from dist_train.console import ByteMeter, set_up_logging, tell_long_work
from dist_train.errors import StateMismatchError
from dist_train.phases import Phase
from dist_train.progress import RunProgress
from dist_train.reporter import Reporter
from dist_train.rng import restore_rng
from dist_train.state import LiveState
from dist_train.world import World

Json = Any


class Beginning:
    """The start of one attempt. Every method but `restore_rng` is collective."""

    def __init__(
        self,
        store: Store,
        world: World,
        checkpointer: Checkpointer,
        live: LiveState,
        progress: RunProgress,
        reporter: Reporter,
    ) -> None:
        self.opened: Opened | None = None
        """The checkpoint that the run goes on from; None is a fresh start."""
        self.on_attempt: Callable[[int], None] = lambda attempt: None
        """Told of the attempt's number, before a checkpoint is looked for; may be collective."""
        self.warm_start: str | None = None
        """What a fresh start takes its weights from; see `RunOptions`."""
        self._store = store
        self._world = world
        self._checkpointer = checkpointer
        self._live = live
        self._progress = progress
        self._reporter = reporter
        self._rng: Json = None
        self._again = ""
        self._told = differences.Differences()
        self._branches = False

    @property
    def resumed_from(self) -> str | None:
        return self.opened.path if self.opened else None

    @property
    def rank_states(self) -> list[Json]:
        """What the checkpoint holds of each rank."""
        return self.opened.manifest.rank_state if self.opened else []

    @property
    def health(self) -> Json:
        """What the checkpoint holds of gradients and the skip ledger, None where it holds nothing."""
        return self.opened.manifest.state.get("health") if self.opened else None

    @property
    def saved_step(self) -> int:
        """The step that this run directory holds already, -1 where there is none."""
        here = self.opened is not None and self.opened.origin is self._store
        return self._progress.now.global_step if here else -1

    @property
    def state_of(self) -> dict[str, Json]:
        """Whose state the attempt begins with: `attempt` (None: of none or of another directory) and `global_step`, and
        whether that begins a `branch`.
        """
        here = self.opened is not None and self.opened.origin is self._store
        attempt = self.opened.manifest.attempt if self.opened is not None and here else None
        return {"attempt": attempt, "global_step": self._progress.now.global_step, "branch": self._branches}

    @property
    def origin_of_run(self) -> Store | None:
        """Where the checkpoint lies that the run goes on from; None for a fresh start and for another run's."""
        if self.opened is None or self.opened.manifest.run_id != self._checkpointer.run_id:
            return None
        return self.opened.origin

    def enter(self, resume: str, environment: dict[str, Json], device: torch.device) -> None:
        """Takes the directory over and restores, or starts afresh."""
        self._checkpointer.open()
        attempt = self._checkpointer.attempt
        set_up_logging(self._world.rank, self._world.world_size, attempt)
        self._reporter.events.attempt = attempt
        self.on_attempt(attempt)
        self._again = relabelled(resume) if ResumeRequest.parse(resume).kind == "branch" else ""
        with phases.within(Phase.LOAD):
            self.opened = self._checkpointer.restore(resume)
            if self.opened:
                self._restore(self.opened, environment)
            elif self.warm_start is not None:
                self._start_warm(self.warm_start)
        if self.opened is None:
            self._progress.start_fresh(attempt)
            origin = {WARM_START: self._live.settings[WARM_START]} if self.warm_start is not None else {}
            self._reporter.events.write("started", world_size=self._world.world_size, environment=environment, **origin)
            differences.warn_of_inexact_device(device)
        self._reporter.problems(self._checkpointer.problems)
        is_new = self._checkpointer.settle_branch()
        # What a roll-back leaves behind is done again; what a person's branch does is not.
        self._branches = is_new and not self._checkpointer.skip_recorded
        if is_new:
            step = self._progress.now.global_step
            self._reporter.events.write("branched", path=self.resumed_from, global_step=step)

    def _restore(self, opened: Opened, environment: dict[str, Json]) -> None:
        manifest = opened.manifest
        name = os.path.basename(opened.path)
        meter = ByteMeter(self._bytes_to_load(opened), name=f"loading {name}", enabled=self._world.is_main)
        opened.reader.on_bytes = meter.add
        try:
            step = manifest.progress.global_step
            self._told = self._live.restore(manifest.state, manifest.settings, opened.reader, manifest.absent, step)
        except StateMismatchError as error:
            raise StateMismatchError(
                f"{opened.path} does not fit the objects of this script: {error}. Nothing was changed. Build the "
                f"model and optimizer as in the run that saved it, or give another run_dir to start a new run; with "
                f"warm_start={opened.path!r} that one takes the weights and nothing else.{error.hint}",
                opened.path,
            ) from error
        finally:
            opened.reader.on_bytes = lambda count: None  # what is registered later is small
            tell_long_work(f"Loaded {name}", meter)
        self._carry_origin(manifest.settings)
        for model in self._live.models.values():
            model.zero_grad()  # of a window that was interrupted in this very process, in a notebook
        self._rng = self._progress.restore(opened, self._checkpointer.attempt)
        is_main = self._world.is_main
        if changed := differences.warn_of_environment(manifest.environment, environment, is_main=is_main):
            self._reporter.events.write("environment_changed", differences=changed)

    def _start_warm(self, text: str) -> None:
        """A fresh start with weights and buffers from elsewhere; all else is as constructed."""
        weights = open_weights(text, self._store, self._world)
        path, step = weights.origin["path"], weights.origin.get("global_step")
        try:
            notes = self._live.restore_weights(weights.state, weights.settings, weights.source)
        except StateMismatchError as error:
            raise StateMismatchError(
                f"warm_start={text!r}: {path} does not fit the model of this script: {error}. Nothing was loaded."
                f"{error.hint}{weights.hint}",
                path,
            ) from error
        finally:
            weights.close()
        which = "" if step is None else f" (step {step})"
        self._told.notes = [
            f"Started with the weights of {path}{which}; everything else is new.",
            *weights.notes,
            *notes,
        ]
        if copies := [name for name, one in self._live.registered.items() if isinstance(one, nn.Module)]:
            self._told.notes.append(
                f"Registered before these weights were there: {', '.join(copies)}. A copy of the model (an average) is "
                f"to be made and registered inside of `with Run(...)`."
            )
        self._live.settings[WARM_START] = weights.origin

    def _carry_origin(self, settings: Mapping[str, Json]) -> None:
        """Where the run's weights were from stays known in all of its checkpoints."""
        origin = settings.get(WARM_START)
        if origin is not None:
            self._live.settings[WARM_START] = origin
        if self.warm_start is not None and self.warm_start != (origin or {}).get("requested"):
            then = "with weights of its own" if origin is None else f"with warm_start={origin['requested']!r}"
            self._told.notes.append(
                f"warm_start={self.warm_start!r} has no effect: the run started {then}, and goes on from its own "
                f"checkpoint. Give another run_dir to start anew."
            )

    def _bytes_to_load(self, opened: Opened) -> int:
        """What this rank reads; 0, nobody knows, where the tensors are sharded."""
        parameters = (parameter for model in self._live.models.values() for parameter in model.parameters())
        return 0 if any(isinstance(one, DTensor) for one in parameters) else opened.manifest.num_bytes

    def register(self, name: str) -> None:
        """The checkpoint's part of an object that was registered after the rest was restored."""
        if self.opened is not None:
            manifest = self.opened.manifest
            self._live.restore_registered(name, manifest.state, self.opened.reader, manifest.absent)
            if "user" in manifest.absent:
                self._told.tell_absent(["user"])

    def begin(self, config: Mapping[str, Json], notes: Sequence[str]) -> None:
        """Before the first epoch: everything is registered; what is not as it was is told, the files are let go.

        Args:
            config: the run's settings now, as manifests record them.
            notes: what else is to be told, one sentence each.

        Raises:
            ConfigError: the ranks would train for different numbers of epochs.
        """
        require_alike({"the number of epochs": config["epochs"]}, self._world, "how long to train")
        if self.opened is None:
            self._reporter.notes([*self._told.notes, *notes])
            return
        manifest, told = self.opened.manifest, self._told
        differences.warn_of_unregistered(self.opened.path, manifest.state, self._live.registered)
        in_mid_epoch = self._progress.now.samples_into_epoch > 0
        then, sizes = manifest.settings.get("config", {}), (manifest.world_size, self._world.world_size)
        told.changes |= differences.compare_config(then, config, sizes, in_mid_epoch)
        differences.warn_of_other_order(told.changes, in_mid_epoch)
        then_attached = {name: manifest.files[name].digest for name in manifest.attached}
        told.notes += [*notes, *compare_attached(then_attached, self._checkpointer.attached)]
        self._reporter.where_from(self.opened.path, self._progress.now, self._progress.best, self._again)
        self._reporter.resumed(self.opened.path, manifest, told)
        self.opened.reader.close()

    def restore_rng(self, *, for_good: bool) -> None:
        """The generators as the checkpoint has them; once for good."""
        if self._rng is not None:
            restore_rng(self._rng)
        if for_good:
            self._rng = None
