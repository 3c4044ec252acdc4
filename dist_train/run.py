"""Run: what any training loop holds. It joins the loop to the checkpoint room: where to begin, when to save, when to
stop.

    with Run(...) as run:                    restore the newest good checkpoint, or start
        for epoch in run.epochs(20):         from where the checkpoint says
            for batch in run.batches(loader):    from the exact next sample
                ...; run.step(loss=loss)         counts, agrees, saves when due
            run.end_epoch(val_smape=...)         records, saves when due

Invariant: a checkpoint is made only at an optimizer update's end or an epoch's end, and what the loop does after it
depends on nothing that the checkpoint does not hold. It does no file operation itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from dist_train import differences
from dist_train.agreement import Agreed, Agreement
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.checkpoint.policy import DEFAULT_POLICY, CheckpointPolicy, Moment, should_save
from dist_train.checkpoint.restorer import Opened
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.writer import Event
from dist_train.console import set_up_logging
from dist_train.data import describe_sampler, training_sampler
from dist_train.environment import describe_environment
from dist_train.errors import (
    EXIT_CODES,
    ConfigError,
    LauncherLostError,
    RunInUseError,
    SaveFailedError,
    StateMismatchError,
    StopReason,
)
from dist_train.feed import BatchFeed
from dist_train.metrics import EarlyStopping
from dist_train.progress import RunProgress
from dist_train.replicas import evaluating, fix_bucket_layout
from dist_train.reporter import Reporter
from dist_train.rng import restore_rng
from dist_train.state import LiveState, Stateful
from dist_train.tree import encode
from dist_train.world import World, current_world, launcher_is_gone

logger = logging.getLogger(__name__)
Json = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What a run can be told besides its objects."""

    early_stopping: EarlyStopping | None = None
    max_steps: int | None = None
    """Stop as done after this many optimizer updates."""
    log_every_steps: int = 50
    """Optimizer updates between records of the training loss; reading it waits for the device."""
    config: Mapping[str, Json] | None = None
    """The user's own settings, recorded in every manifest."""
    search: Sequence[str] = ()
    """Read-only places with earlier checkpoints of this run, as patterns: `("/kaggle/input/*/*",)`."""
    open_store: Callable[[str], Store] = Store
    """Where the run directory lives."""


class Run:
    """One attempt of a run, as a context manager. Construction, entry and every method but properties are collective.

    Args:
        run_dir: the run's directory, the same on every restart and shared by all nodes.
        model: prepared (DDP, FSDP2, compiled) or plain; a mapping of names for several.
        optimizer: prepared or plain; a mapping of names for several.
        accelerator: None serves a plain loop on one device; `step` then counts one update a call.
        scheduler: not prepared by Accelerate; stepped once an optimizer update.
        loader: the training loader, from `dist_train.data_loader`; recorded with the run.
        policy: when to save and what to keep; every epoch and every 10 minutes, 3 and the best, by default.
        resume: `auto`, `must`, `never`; or `best`, `epoch:10`, `step:1200` or the path of a checkpoint, which starts a
            branch.

    Raises:
        ConfigError, StorageError, RunInUseError, NoCheckpointError, StateMismatchError: on entry; nothing was changed.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Any = (),
        accelerator: Any | None = None,
        scheduler: Any = (),
        loader: Any | None = None,
        policy: CheckpointPolicy | None = None,
        resume: str = "auto",
        options: RunOptions | None = None,
    ) -> None:
        self.run_dir = str(run_dir)
        self.accelerator = accelerator
        self.world: World = current_world()
        self.reason: StopReason | None = None
        self.resumed_from: str | None = None
        self.epoch_is_complete = False
        self._options = options or RunOptions()
        self._policy = policy or DEFAULT_POLICY
        self._resume = resume
        self._loader = loader
        self._models = _named(model)
        scaler = getattr(accelerator, "scaler", None)
        self._live = LiveState(
            models=self._models, optimizers=_named(optimizer), schedulers=_named(scheduler), scaler=scaler
        )
        self._config = encode(dict(self._options.config or {}), "config", {})
        self._require_one_world()
        self._store = self._options.open_store(self.run_dir)
        self._reporter = Reporter(self._store, is_main=self.world.is_main, run_dir=self.run_dir)
        self._progress = RunProgress(self._store, self.world, self._policy, self._options.early_stopping)
        self._agreement = Agreement(self.world)
        self._checkpointer = Checkpointer(self._store, self.world, self._policy, search=self._options.search)
        self._feed = BatchFeed(accelerator, self.device, self.world.rank)
        self._opened: Opened | None = None
        self._told = differences.Differences()
        self._rng: Json = None
        self._stop: StopReason | None = None
        self._save_requested = self._wait_requested = False
        self._last_saved_step = -1
        self._last_save_time = 0.0
        self._committed_step = -1

    # What a loop may ask

    @property
    def global_step(self) -> int:
        """Completed optimizer updates."""
        return self._progress.now.global_step

    @property
    def epoch(self) -> int:
        """0-based index of the pass in progress."""
        return self._progress.now.epoch

    @property
    def attempt(self) -> int:
        """Number of this life of the run, from 1."""
        return self._checkpointer.attempt

    @property
    def epochs_completed(self) -> int:
        """Passes finished."""
        return self._progress.now.epochs_completed

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation."""
        return dict(self._progress.metrics)

    @property
    def best(self) -> float | None:
        """Best value of the monitored metric so far."""
        return self._progress.best.value if self._progress.best else None

    @property
    def committed_step(self) -> int:
        """Step of the newest durable checkpoint, -1 before the first; as of the last agreement on other ranks."""
        return max(self._committed_step, self._checkpointer.committed_step)

    @property
    def should_stop(self) -> bool:
        """Agreed by all ranks at a step boundary."""
        return self._stop is not None

    @property
    def loss_weight(self) -> float:
        """Multiply the micro-batch's mean loss by it: 1 but for short windows and uneven shares."""
        return self._feed.micro.weight

    @property
    def exit_code(self) -> int:
        """For `sys.exit`."""
        return int(EXIT_CODES[self.reason]) if self.reason else 1

    @property
    def device(self) -> torch.device:
        """Where batches are moved to."""
        if self.accelerator is not None:
            return torch.device(self.accelerator.device)
        parameters = (p for model in self._models.values() for p in model.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    # Entering and leaving

    def __enter__(self) -> Self:
        self._environment = describe_environment(self.world.world_size, self.device)
        for model in self._models.values():
            fix_bucket_layout(model)
        try:
            self._checkpointer.open()
            set_up_logging(self.world.rank, self.world.world_size, self._checkpointer.attempt)
            self._reporter.events.attempt = self._checkpointer.attempt
            self._opened = self._checkpointer.restore(self._resume)
            self._restore() if self._opened else self._start_fresh()
            if self._checkpointer.settle_branch():
                self._reporter.events.write("branched", path=self.resumed_from, global_step=self.global_step)
        except BaseException:
            self._checkpointer.close(failed=True)
            raise
        self._last_save_time = time.monotonic()
        self._write_status("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reporter.console.end_live()
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave()
        else:
            self._leave_after(error)

    def _leave(self) -> None:
        self.reason = self.reason or self._stop or StopReason.DONE
        try:
            self._save_end()
        except BaseException as error:
            self._leave_after(error)
            raise
        self._report(self._checkpointer.close())
        self._reporter.events.write("stopped", reason=self.reason, global_step=self.global_step)
        self._write_status(self.reason)

    def _leave_after(self, error: BaseException) -> None:
        """Finishes the save in flight, without waiting long for ranks that may be dead; the error goes on."""
        self.reason = StopReason.INTERRUPTED if isinstance(error, KeyboardInterrupt) else StopReason.ERROR
        lost = isinstance(error, RunInUseError)
        self._report(self._checkpointer.close(failed=True))
        if not lost:
            self._reporter.events.write(
                "stopped", reason=self.reason, global_step=self.global_step, error=_one_line(error)
            )
            self._write_status(self.reason, error=_one_line(error))

    def _save_end(self) -> None:
        """The last state is durable when this returns; a failed save is tried once more. Collective."""
        for tries_left in (2, 1, 0):
            self._checkpointer.wait()
            self._report(self._checkpointer.poll())
            mine = [self._checkpointer.committed == self._progress.now, self._checkpointer.must_end]
            done, hopeless = self.world.broadcast(mine, "whether the end is saved")
            if done or not self._policy.at_end or self._feed.in_window:
                return
            if hopeless or not tries_left:
                break
            self._save("end")
        self._checkpointer.require_healthy()
        raise SaveFailedError(
            f"The end of the run (step {self.global_step}) could not be saved in {self.run_dir}; the newest checkpoint "
            f"is step {self.committed_step}. See the messages above; fix the cause and run the same command again."
        )

    # Restoring

    def _restore(self) -> None:
        assert self._opened is not None
        manifest, reader = self._opened.manifest, self._opened.reader
        try:
            self._told = self._live.restore(
                manifest.state, manifest.settings, reader, manifest.absent, manifest.progress.global_step
            )
        except StateMismatchError as error:
            raise StateMismatchError(
                f"{self._opened.path} does not fit the objects of this script: {error}. Nothing was changed. Build the "
                f"model and optimizer as in the run that saved it, or give another run_dir to start a new run.",
                self._opened.path,
            ) from error
        for model in self._models.values():
            model.zero_grad()  # of a window that was interrupted in this very process, in a notebook
        self.resumed_from = self._opened.path
        self._rng = self._progress.restore(self._opened, self._checkpointer.attempt)
        self._last_saved_step = self.global_step if self._opened.origin is self._store else -1
        if changed := differences.warn_of_environment(manifest.environment, self._environment):
            self._reporter.events.write("environment_changed", differences=changed)
        self._reporter.problems(self._checkpointer.problems)

    def _start_fresh(self) -> None:
        self._progress.start_fresh(self._checkpointer.attempt)
        self._reporter.events.write("started", world_size=self.world.world_size, environment=self._environment)
        self._reporter.problems(self._checkpointer.problems)
        differences.warn_of_inexact_device(self.device)

    def _say_what_is_not_exact(self) -> None:
        """Once, before the loop."""
        differences.warn_of_foreign_loader(self._loader)
        if self._opened is None:
            return
        manifest = self._opened.manifest
        differences.warn_of_unregistered(self._opened.path, manifest.state, self._live.registered)
        then, today = manifest.settings.get("config", {}), self._settings()["config"]
        changes = differences.compare_config(then, today, (manifest.world_size, self.world.world_size))
        differences.warn_of_other_order(changes, self._progress.now.samples_into_epoch > 0)
        self._told.changes |= changes
        if sampler := training_sampler(self._loader):
            self._told.notes += self._progress.fit_into(sampler.num_samples)
        self._reporter.where_from(self._opened.path, self._progress.now, self._progress.best)
        self._reporter.resumed(self._opened.path, manifest, self._told)

    def register(self, name: str, one: Stateful) -> None:
        """Saves and restores an object with `state_dict` and `load_state_dict`; before `epochs` is called.

        Raises:
            ConfigError: the name is taken, it is no such object, or `epochs` was called already.
            StateMismatchError: the checkpoint that is resumed from does not hold it.
        """
        if name in self._live.registered or not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
            raise ConfigError(
                f"run.register({name!r}, ...): give each object with state_dict and load_state_dict its own name."
            )
        if self._begun:
            raise ConfigError(f"run.register({name!r}, ...) came after run.epochs(); register it before the loop.")
        self._live.registered[name] = one
        if self._opened is not None:
            manifest = self._opened.manifest
            self._live.restore_registered(name, manifest.state, self._opened.reader, manifest.absent)
            if "user" in manifest.absent:
                self._told.tell_absent(["user"])

    # The loop

    def epochs(self, count: int) -> Iterator[int]:
        """0-based epoch indices from where the run stands to `count`; ends early on a stop."""
        self._begin(count)
        while self._progress.now.epochs_completed < count and not self.should_stop:
            # Without a training loader of ours nobody but the loop knows when an epoch is over: at the body's end.
            self.epoch_is_complete = training_sampler(self._loader) is None
            self._restore_rng(for_good=self._progress.now.samples_into_epoch == 0)
            before = self._progress.now
            yield self.epoch
            self.end_epoch()
            if self._progress.now == before and not self.should_stop:
                raise ConfigError(
                    f"Epoch {self.epoch + 1} trained nothing: iterate `run.batches(loader)` over the training loader "
                    f"that the Run was given, and call run.step() once a batch."
                )

    def batches(self, loader: Any) -> Iterator[Any]:
        """Batches on the device: of a training loader from the exact next sample; ends early on a stop."""
        sampler = training_sampler(loader)
        if sampler is None:
            yield from self._feed.plain_batches(loader, lambda: self.should_stop and not self.epoch_is_complete)
            return
        sampler.set_position(epoch=self.epoch, samples_into_epoch=self._progress.now.samples_into_epoch)
        self.epoch_is_complete = sampler.layout.num_micro_steps == 0
        batches = self._feed.training_batches(loader, sampler.layout, lambda: self.should_stop)
        self._restore_rng(for_good=True)  # whatever the loop did at the top of the epoch was done before the kill, too
        yield from batches

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """After each micro-batch. Counts; at an update's end agrees with the other ranks and saves when due.

        Args:
            loss: the micro-batch's mean loss before `loss_weight`, for the logs; never forces a device synchronisation.
        """
        micro = self._feed.consume()
        if loss is not None:
            self._progress.meter.add(loss, micro.num_samples)
        if not micro.ends_window:
            return
        skipped = self.accelerator is not None and self.accelerator.optimizer_step_was_skipped
        self._progress.count_update(micro, skipped=skipped)
        if self._feed.knows_epoch_end:
            self.epoch_is_complete = micro.ends_epoch
        if not skipped and self.global_step % self._options.log_every_steps == 0:
            self._log_step()
        self._reporter.step(self.epoch, self.global_step, self._feed.share_of_epoch)
        self._boundary(ends_epoch=micro.ends_epoch)

    def end_epoch(self, **metrics: float) -> None:
        """After the epoch's last batch and its evaluation. Does nothing when a stop cut the epoch short."""
        if not self.epoch_is_complete:
            return
        self.epoch_is_complete = False
        values = self._progress.end_epoch(metrics)
        self._track(values)
        self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)
        self._reporter.epoch(self.epochs_completed, self._progress.train_loss, self._progress.metrics)
        if self._progress.patience_is_over:
            self._stop = self._stop or StopReason.EARLY_STOPPED
        self._boundary(ends_epoch=True, evaluated=True)

    def evaluation(self) -> AbstractContextManager[nn.Module]:
        """The only model, unwrapped, in eval mode, with the main rank's buffers and without gradients. Collective."""
        if len(self._models) != 1:
            raise ConfigError("run.evaluation() serves a run with one model; for several use model.eval() yourself.")
        (model,) = self._models.values()
        return evaluating(model, self.world)

    def stop(self, reason: StopReason = StopReason.DONE) -> None:
        """Asks all ranks to stop at the next agreement; may be called on any rank."""
        self._stop_wish = reason

    def save(self, *, wait: bool = False) -> None:
        """Saves now (all ranks call it), or at the end of the window in progress.

        Args:
            wait: go on only when the checkpoint is durable, or has failed and was reported; inside a window it is the
                `step` that ends it which waits.
        """
        if self._feed.in_window:
            self._save_requested, self._wait_requested = True, wait or self._wait_requested
            return
        self._save("requested")
        if wait:
            self._wait_for_save()

    # Inside the loop

    @property
    def _reached_max_steps(self) -> bool:
        return self._options.max_steps is not None and self.global_step >= self._options.max_steps

    _stop_wish: StopReason | None = None
    _begun = False

    def _begin(self, count: int) -> None:
        self._reporter.epochs = count
        if self._begun:
            return
        self._begun = True
        self._say_what_is_not_exact()
        if self._opened is not None:
            self._opened.reader.close()
        if self._progress.patience_is_over:
            self._stop = StopReason.EARLY_STOPPED
        elif self._reached_max_steps and self._progress.now.evaluation != "pending":
            self._stop = StopReason.DONE
        self._checkpointer.dry_run(self._live.capture())

    def _restore_rng(self, *, for_good: bool) -> None:
        if self._rng is not None:
            restore_rng(self._rng)
        if for_good:
            self._rng = None

    def _log_step(self) -> None:
        rates = [group["lr"] for optimizer in self._live.optimizers.values() for group in optimizer.param_groups]
        values = self._progress.log_step(float(rates[0]) if rates else None)
        self._track(values)
        self._reporter.loss = values["loss"]
        self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)

    def _track(self, values: Mapping[str, float | None]) -> None:
        if self.accelerator is not None and self.accelerator.trackers:
            known = {name: value for name, value in values.items() if value is not None}
            self.accelerator.log(known, step=self.global_step)

    def _boundary(self, *, ends_epoch: bool, evaluated: bool = False) -> None:
        """Agree, then save if it is due. Collective."""
        self._report(self._checkpointer.poll())
        agreed = self._agree(force=ends_epoch or self._save_requested)
        self._raise_failures(agreed)
        if self._reached_max_steps:
            self._stop = self._stop or StopReason.DONE
        # Who is done may still evaluate; whoever is told to leave must not.
        leaving = self._stop not in (None, StopReason.DONE)
        if leaving and not evaluated:
            self.epoch_is_complete = False
        moment = Moment(
            global_step=self.global_step,
            last_saved_step=self._last_saved_step,
            ends_epoch=ends_epoch,
            evaluated=evaluated,
            epochs_completed=self.epochs_completed,
            time_is_up=agreed.time_is_up,
            stopping=leaving if ends_epoch else self.should_stop,
            requested=agreed.save_requested,
        )
        if reason := should_save(self._policy, moment):
            self._save(reason)
        if self._wait_requested:
            self._wait_requested = False
            self._wait_for_save()

    def _wait_for_save(self) -> None:
        self._checkpointer.wait()
        self._report(self._checkpointer.poll())

    def _agree(self, *, force: bool) -> Agreed:
        due = self._agreement.is_due()
        if not (due or force):
            return Agreed()
        agreed = self._agreement.exchange(
            Agreed(
                stop=self._stop_wish,
                save_requested=self._save_requested,
                time_is_up=self._time_is_up(),
                failed=self._checkpointer.must_end or launcher_is_gone(),
                committed_step=self._checkpointer.committed_step,
            )
        )
        self._stop = self._stop or agreed.stop
        self._committed_step = agreed.committed_step
        return agreed

    def _time_is_up(self) -> bool:
        every = self._policy.every_seconds
        return self.world.is_main and every is not None and time.monotonic() - self._last_save_time >= every

    def _save(self, reason: str) -> None:
        self._save_requested = False
        self._last_saved_step = self.global_step
        self._last_save_time = time.monotonic()
        draft = self._progress.draft(reason, self._settings(), self._environment)
        stall = self._checkpointer.save(self._live.capture(), draft)
        if stall is not None:
            self._reporter.note_stall(self.global_step, stall)

    def _settings(self) -> dict[str, Json]:
        """Each setting's value at construction, for the manifest."""
        config = {
            "policy": self._policy.to_json(),
            "user": self._config,
            "data": describe_sampler(self._loader),
            "epochs": self._reporter.epochs,
        }
        return {**self._live.settings, "config": config}

    # Telling

    def _report(self, events: list[Event]) -> None:
        keeper = self._checkpointer
        counts = {"failures": keeper.failures, "most_failures": self._policy.max_failed_saves}
        self._reporter.report(events, newest=keeper.committed_step, **counts)

    def _write_status(self, status: str, error: str = "") -> None:
        if self._checkpointer.is_lost:  # what becomes of an old attempt is no news of the run
            return
        code = None if status == "running" else self.exit_code
        self._reporter.status(status, code, self._progress.now, self._checkpointer.attempt, error)

    # Misuse, caught

    def _raise_failures(self, agreed: Agreed) -> None:
        if not agreed.failed:
            return
        self._checkpointer.require_healthy()
        if launcher_is_gone():
            raise LauncherLostError(
                f"Rank {self.world.rank}: the launcher died and left this worker behind; training ends at step "
                f"{self.global_step}. Run the same command again: it goes on from step {self.committed_step}."
            )
        raise SaveFailedError(f"Rank {self.world.rank}: another rank ended training; its message says why.")

    def _require_one_world(self) -> None:
        if self.accelerator is not None and self.accelerator.num_processes != self.world.world_size:
            raise ConfigError(
                f"{self.world.world_size} processes were launched, but the Accelerator believes in "
                f"{self.accelerator.num_processes}. Call dist_train.init_distributed() before Accelerator() is made "
                f"(on a machine without a GPU, Accelerator(cpu=True) does it too)."
            )


def _named(objects: Any) -> dict[str, Any]:
    """Objects by name; an only one has the name ""."""
    if objects is None or objects == ():
        return {}
    return dict(objects) if isinstance(objects, Mapping) else {"": objects}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", 1)[0]
