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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from dist_train import differences
from dist_train.beginning import Beginning
from dist_train.boundary import Boundary, make_deadline
from dist_train.checkpoint.checkpointer import Checkpointer, Draft
from dist_train.checkpoint.policy import DEFAULT_POLICY, CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.writer import Committed, Event
from dist_train.data import describe_sampler, training_sampler
from dist_train.environment import describe_environment
from dist_train.errors import EXIT_CODES, ConfigError, RunInUseError, StopReason
from dist_train.feed import BatchFeed
from dist_train.metrics import EarlyStopping
from dist_train.progress import RunProgress
from dist_train.replicas import evaluating, fix_bucket_layout
from dist_train.reporter import Reporter
from dist_train.state import Capture, LiveState, Stateful
from dist_train.tracking import Tracking
from dist_train.tree import encode
from dist_train.world import World, current_world

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
    max_time: str | float | None = None
    """How long the session lasts, "11h30m" for instance: the run stops and saves by itself before it is over. Counted
    from DIST_TRAIN_SESSION_START (Unix time) where that is set, else from the start of the launcher."""
    time_reserve: str | float | None = None
    """Part of `max_time` to leave for what follows, packing for instance; None takes 2 %, 5 minutes at most."""
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
        self._tracking = Tracking(accelerator, self._store, enabled=self.world.is_main)
        self._checkpointer = Checkpointer(self._store, self.world, self._policy, search=self._options.search)
        self._checkpointer.on_wait = self._reporter.waiting
        self._feed = BatchFeed(accelerator, self.device, self.world.rank)
        self._beginning = Beginning(
            self._store, self.world, self._checkpointer, self._live, self._progress, self._reporter
        )
        self._boundary = Boundary(
            self.world,
            self._checkpointer,
            self._policy,
            self._progress,
            self._reporter,
            snapshot=self._snapshot,
            on_event=self._on_event,
            deadline=make_deadline(self._options.max_time, self._options.time_reserve, is_main=self.world.is_main),
            max_steps=self._options.max_steps,
        )

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
        return self._boundary.committed_step

    @property
    def resumed_from(self) -> str | None:
        """Path of the checkpoint that this attempt goes on from; None is a fresh start."""
        return self._beginning.resumed_from

    @property
    def should_stop(self) -> bool:
        """Agreed by all ranks at a step boundary."""
        return self._boundary.stop is not None

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
        precision = str(getattr(self.accelerator, "mixed_precision", "no"))
        self._environment = describe_environment(self.world.world_size, self.device, precision)
        for model in self._models.values():
            fix_bucket_layout(model)
        try:
            self._beginning.enter(self._resume, self._environment, self.device)
            self._tracking.start(
                self._checkpointer.run_id, self._progress.now, self._config, self._beginning.origin_of_run
            )
        except BaseException:
            self._checkpointer.close(failed=True)
            raise
        self._boundary.open(self._beginning.saved_step)
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
        self.reason = self.reason or self._boundary.stop or StopReason.DONE
        try:
            self._boundary.save_end(in_window=self._feed.in_window)
        except BaseException as error:
            self._leave_after(error)
            raise
        self._boundary.report(self._checkpointer.close())
        self._reporter.events.write("stopped", reason=self.reason, global_step=self.global_step)
        self._write_status(self.reason)
        if self._checkpointer.committed is not None:
            self._tracking.settle(self._checkpointer.committed, at_end=True)
        self._tracking.finish()
        if self.reason is StopReason.TIME_LIMIT:
            self._boundary.report_time_limit()

    def _leave_after(self, error: BaseException) -> None:
        """Finishes the save in flight, without waiting long for ranks that may be dead; the error goes on."""
        self.reason = StopReason.INTERRUPTED if isinstance(error, KeyboardInterrupt) else StopReason.ERROR
        lost = isinstance(error, RunInUseError)
        self._boundary.report(self._checkpointer.close(failed=True))
        if not lost:
            self._reporter.events.write(
                "stopped", reason=self.reason, global_step=self.global_step, error=_one_line(error)
            )
            self._write_status(self.reason, error=_one_line(error))
        self._tracking.finish()

    def _write_status(self, status: str, error: str = "") -> None:
        if self._checkpointer.is_lost:  # what becomes of an old attempt is no news of the run
            return
        code = None if status == "running" else self.exit_code
        self._reporter.status(status, code, self._progress.now, self._checkpointer.attempt, error)

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
        self._beginning.register(name)

    # The loop

    def epochs(self, count: int) -> Iterator[int]:
        """0-based epoch indices from where the run stands to `count`; ends early on a stop."""
        self._begin(count)
        while self._progress.now.epochs_completed < count and not self.should_stop:
            # Without a training loader of ours nobody but the loop knows when an epoch is over: at the body's end.
            self.epoch_is_complete = training_sampler(self._loader) is None
            self._beginning.restore_rng(for_good=self._progress.now.samples_into_epoch == 0)
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
        self._beginning.restore_rng(
            for_good=True
        )  # whatever the loop did at the top of the epoch was done before the kill, too
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
        self._reporter.step(self.epoch, self.global_step, self._feed.share_of_epoch, self._checkpointer.writing)
        self._reach_boundary(ends_epoch=micro.ends_epoch)

    def end_epoch(self, **metrics: float) -> None:
        """After the epoch's last batch and its evaluation. Does nothing when a stop cut the epoch short."""
        if not self.epoch_is_complete:
            return
        self.epoch_is_complete = False
        values = self._progress.end_epoch(metrics)
        self._tracking.add(self.global_step, values)
        self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)
        self._reporter.epoch(self.epochs_completed, self._progress.train_loss, self._progress.metrics)
        if self._progress.patience_is_over:
            self._boundary.stop = self._boundary.stop or StopReason.EARLY_STOPPED
        self._reach_boundary(ends_epoch=True, evaluated=True)

    def evaluation(self) -> AbstractContextManager[nn.Module]:
        """The only model, unwrapped, in eval mode, with the main rank's buffers and without gradients. Collective."""
        if len(self._models) != 1:
            raise ConfigError("run.evaluation() serves a run with one model; for several use model.eval() yourself.")
        (model,) = self._models.values()
        return evaluating(model, self.world)

    def stop(self, reason: StopReason = StopReason.DONE) -> None:
        """Asks all ranks to stop at the next agreement; may be called on any rank."""
        self._boundary.stop_wish = reason

    def save(self, *, wait: bool = False) -> None:
        """Saves now (all ranks call it), or at the end of the window in progress.

        Args:
            wait: go on only when the checkpoint is durable, or has failed and was reported; inside a window it is the
                `step` that ends it which waits.
        """
        if self._feed.in_window:
            self._boundary.request_save(wait=wait)
            return
        self._boundary.save("requested")
        if wait:
            self._boundary.wait_for_save()

    # Inside the loop

    _begun = False

    def _begin(self, count: int) -> None:
        self._reporter.epochs = count
        if self._begun:
            return
        self._begun = True
        differences.warn_of_foreign_loader(self._loader)
        self._beginning.begin(describe_sampler(self._loader))
        if self._progress.patience_is_over:
            self._boundary.stop = StopReason.EARLY_STOPPED
        elif self._boundary.reached_max_steps and self._progress.now.evaluation != "pending":
            self._boundary.stop = StopReason.DONE
        elif self._options.max_time is not None and self.epochs_completed < count:
            self._boundary.begin_session()
        self._checkpointer.dry_run(self._live.capture())

    def _log_step(self) -> None:
        rates = [group["lr"] for optimizer in self._live.optimizers.values() for group in optimizer.param_groups]
        values = self._progress.log_step(float(rates[0]) if rates else None)
        self._tracking.add(self.global_step, values)
        self._reporter.loss = values["loss"]
        self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)

    def _reach_boundary(self, *, ends_epoch: bool, evaluated: bool = False) -> None:
        """Agree, then save if it is due. Collective."""
        is_last = self.epochs_completed >= self._reporter.epochs
        evaluation_is_near = not self._feed.knows_epoch_end
        agreed = self._boundary.agree(
            ends_epoch=ends_epoch, evaluated=evaluated, is_last=is_last, evaluation_is_near=evaluation_is_near
        )
        if self._boundary.is_leaving and not evaluated:
            self.epoch_is_complete = False
        self._boundary.save_if_due(agreed, ends_epoch=ends_epoch, evaluated=evaluated)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Committed):
            self._tracking.settle(event.manifest.progress)

    def _snapshot(self, reason: str) -> tuple[Capture, Draft]:
        return self._live.capture(), self._progress.draft(reason, self._settings(), self._environment)

    def _settings(self) -> dict[str, Json]:
        """Each setting's value at construction, for the manifest."""
        config = {
            "policy": self._policy.to_json(),
            "user": self._config,
            "data": describe_sampler(self._loader),
        }
        return {**self._live.settings, "config": config}

    # Misuse, caught

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
