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

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from dist_train import launched, misuse, phases
from dist_train.beginning import Beginning
from dist_train.boundary import Boundary, make_deadline
from dist_train.callbacks import Callbacks
from dist_train.capture import Capture
from dist_train.checkpoint.checkpointer import Checkpointer, Draft
from dist_train.checkpoint.policy import DEFAULT_POLICY, CheckpointPolicy
from dist_train.checkpoint.writer import Committed
from dist_train.ending import Ending
from dist_train.environment import describe_environment
from dist_train.errors import ConfigError, StopReason
from dist_train.evaluation import Cut, EvaluationStart
from dist_train.feed import BatchFeed
from dist_train.fully_sharded import is_sharded
from dist_train.intake import Intake
from dist_train.monitoring import Monitoring
from dist_train.options import RunOptions
from dist_train.phases import Phase, Point
from dist_train.progress import RunProgress
from dist_train.rate_meter import RateMeter
from dist_train.recovery import Recovery
from dist_train.registering import Registering
from dist_train.replicas import evaluating, find_model, fix_bucket_layout
from dist_train.reporter import Reporter
from dist_train.state import LiveState, by_name
from dist_train.tracking import Tracking
from dist_train.tree import encode
from dist_train.world import World, current_world

Json = Any


class Run(Registering):
    """One attempt of a run, as a context manager. Construction, entry and every method but properties are collective.

    Args:
        run_dir: the run's directory, the same on every restart and shared by all nodes.
        model: prepared (DDP, FSDP2, compiled) or plain; a mapping of names for several.
        optimizer: prepared or plain; a mapping of names for several.
        accelerator: None serves a plain loop on one device; `updates_now` then says when the optimizer steps.
        scheduler: not prepared by Accelerate; stepped once an optimizer update.
        loader: the training loader, not prepared: from `dist_train.data_loader`, or your own (see `user_loader`).
        policy: when to save and what to keep; every epoch and every 10 minutes, 3 and the best, by default.
        resume: `auto`, `must`, `never`; or `best`, `epoch:10`, `step:1200` or the path of a checkpoint, which starts a
            branch; the same again goes on with it, and `epoch:10#b` (any label) starts another from there.

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
        self._options = options or RunOptions()
        self._policy = policy or DEFAULT_POLICY
        self._resume = resume
        self._models = by_name(model)
        misuse.refuse_prepared(by_name(scheduler), loader)
        self._live = LiveState(
            models=self._models,
            optimizers=by_name(optimizer),
            schedulers=by_name(scheduler),
            scaler=getattr(accelerator, "scaler", None),
            partial_load=self._options.partial_load,
            exclude=self._options.exclude,
        )
        self._rate = RateMeter(self._live.optimizers)
        self._config = encode(dict(self._options.config or {}), "config", {})
        self._watch = misuse.ParameterWatch(self._live.models, self._live.optimizers)
        self._schedules = misuse.SchedulerWatch(by_name(optimizer), by_name(scheduler), self._models, accelerator)
        misuse.require_one_world(accelerator, self.world)
        misuse.refuse_unsharded(accelerator, self._models, self.world)
        if not self._options.own_gradients:
            misuse.require_averaged(self._models, self._live.optimizers, self.world, loader)
        self._store = self._options.open_store(self.run_dir)
        self._reporter = Reporter(self._store, is_main=self.world.is_main, run_dir=self.run_dir)
        self._progress = RunProgress(self._store, self.world, self._policy, self._options.early_stopping)
        self._tracking = Tracking(accelerator, self._store, enabled=self.world.is_main)
        clean_steps = self._options.health.clean_steps if self._options.health.rolls_back else None
        self._checkpointer = Checkpointer(
            self._store, self.world, self._policy, search=self._options.search, clean_steps=clean_steps
        )
        self._checkpointer.on_wait = self._reporter.waiting
        self._feed = BatchFeed(accelerator, self.device, self.world.rank, self._models)
        self._monitoring = Monitoring(self._options, self._checkpointer, self._reporter)
        self._cut = Cut(several=self.world.world_size > 1)
        self._join_parts(loader)
        self._entered = self._begun = self._in_epoch = False

    def _join_parts(self, loader: Any | None) -> None:
        """What joins the parts: where batches come from, how the run begins, what is decided, how it ends."""
        self._callbacks = Callbacks(self)
        self._intake = Intake(
            self._feed,
            self._progress,
            should_stop=lambda: self.should_stop or self._recovery.is_rolling_back,
            stops_here=lambda: self._recovery.is_rolling_back or self._stops_here(),
            cut=self._cut,
            is_told=lambda: self._boundary.hear(),
            show_replay=self._reporter.replay,
            drop_window=self._live.drop_gradients,
        )
        self._intake.adopt(loader)
        self._intake.needs_all_ranks = self.world.world_size > 1 and any(map(is_sharded, self._models.values()))
        self._beginning = Beginning(
            self._store, self.world, self._checkpointer, self._live, self._progress, self._reporter
        )
        self._beginning.warm_start = self._options.warm_start
        self._beginning.on_attempt = self._monitoring.begin
        self._boundary = Boundary(
            self.world,
            self._checkpointer,
            self._policy,
            self._progress,
            self._reporter,
            snapshot=self._snapshot,
            deadline=make_deadline(self._options.max_time, self._options.time_reserve, is_main=self.world.is_main),
            preemption=self._monitoring.preemption,
            max_steps=self._options.max_steps,
            on_commit=self._on_commit,
        )
        self._recovery = Recovery(
            self._options.health,
            self.world,
            self._live,
            self._boundary,
            self._checkpointer,
            self._progress,
            self._reporter,
            self._intake,
            own_gradients=self._options.own_gradients,
        )
        self._boundary.is_sound = self._recovery.is_sound
        on_stop = self._callbacks.tell_of_stop
        self._ending = Ending(
            self._checkpointer,
            self._boundary,
            self._progress,
            self._reporter,
            self._tracking,
            on_stop,
            requeue_exit=self._options.requeue_exit,
        )

    # Entering and leaving

    def __enter__(self) -> Self:
        precision = str(getattr(self.accelerator, "mixed_precision", "no"))
        self._environment = describe_environment(self.world.world_size, self.device, precision)
        for model in self._models.values():
            fix_bucket_layout(model)
        self._monitoring.enter()
        try:
            self._take_up(self._resume)
        except BaseException as error:
            launched.note_error(error)
            self._checkpointer.close(failed=True)
            self._monitoring.close()
            raise
        self._place = misuse.note_open(self.run_dir, self)
        self._monitoring.open(self.run_dir, self.attempt, self._beginning)
        self._entered = True
        self._ending.write_status("running")
        return self

    def _take_up(self, resume: str) -> None:
        """The directory is this attempt's, and everything is as a checkpoint says. Collective."""
        self._beginning.enter(resume, self._environment, self.device)
        self._intake.restore(self._beginning.rank_states, self.world.rank, self.world.world_size)
        self._recovery.restore(self._beginning.health, self._checkpointer.skip_recorded)
        progress, origin = self._progress.now, self._beginning.origin_of_run
        self._tracking.start(self._checkpointer.run_id, progress, self._config, origin)
        self._boundary.open(self._beginning.saved_step)
        self._rate.open()
        self._recovery.open()

    def _roll_back(self) -> None:
        """Goes back to the checkpoint that was decided on, as a new attempt in this process. Collective."""
        self._recovery.close()
        self._rate.close()
        self._tracking.finish()
        self._boundary.report(self._checkpointer.close())
        self._reporter.events.write("stopped", reason="rolled_back", global_step=self.global_step)
        self._monitoring.end_attempt()
        self._intake.end_epoch()
        self._recovery.put_back()
        self._take_up("must")
        self._beginning.begin(self._settings()["config"], [])
        self._monitoring.begin_attempt(self.attempt, self._beginning)
        self._ending.write_status("running")
        self._callbacks.tell("resumed", path=self.resumed_from or "")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_epoch = False
        self._rate.close()
        self._recovery.close()
        phases.switch(Phase.END)
        try:
            self._ending.leave(error, in_window=self._feed.in_window)
        finally:
            self._monitoring.close()

    # The loop

    def epochs(self, count: int) -> Iterator[int]:
        """0-based epoch indices from where the run stands to `count`; ends early on a stop.

        May be called again after it has ended, with a higher count: a further phase of training.
        """
        misuse.require_used_right(entered=self._entered, call="run.epochs()")
        if self._in_epoch:
            raise ConfigError("run.epochs() was called inside its own loop; one loop goes over the epochs of a run.")
        self._begin(count)
        while self.epochs_completed < count and not self._stops_here():
            if self._recovery.is_rolling_back:
                self._roll_back()
            self._intake.begin_epoch()
            self._beginning.restore_rng(for_good=not self._intake.is_mid_epoch)
            before = self._progress.now
            self._in_epoch = True
            try:
                yield self.epoch
            finally:
                self._in_epoch = False
            if self._recovery.is_rolling_back:
                continue
            if self._progress.now == before and not (self._intake.has_ended or self.should_stop):
                raise ConfigError(
                    f"Epoch {self.epoch + 1} trained nothing: iterate `run.batches(loader)` over the training loader "
                    f"that the Run was given, and call run.step() once a batch."
                )
            self.end_epoch()

    def batches(self, loader: Any) -> Iterator[Any]:
        """Batches on the device: of a training loader from the exact next sample; ends early on a stop."""
        misuse.require_used_right(entered=self._entered, call="run.batches()")
        if not self._intake.is_training(loader):
            yield from self._intake.other_batches(loader)
            return
        misuse.require_used_right(entered=True, in_epoch=self._in_epoch, call="run.batches(training loader)")
        batches = self._intake.training_batches()
        # Whatever the loop did at the top of the epoch was done before the kill, too.
        self._beginning.restore_rng(for_good=True)
        yield from batches
        if self.epoch_is_complete:
            self._cut.begin(EvaluationStart(self._live))
        phases.switch(Phase.EVALUATION if self.epoch_is_complete else Phase.OTHER)

    def step(self, loss: torch.Tensor | float | None = None) -> None:
        """After each micro-batch. Counts; at an update's end agrees with the other ranks and saves when due.

        Args:
            loss: the micro-batch's mean loss before `loss_weight`, for the logs; never forces a device synchronisation.
        """
        misuse.require_used_right(entered=self._entered, in_epoch=self._in_epoch, call="run.step()")
        micro = self._feed.consume()
        if loss is not None:
            self._progress.meter.add(loss, micro.num_samples)
        if self._feed.in_window:
            return
        phases.switch(Phase.OTHER)
        skipped = self.accelerator is not None and self.accelerator.optimizer_step_was_skipped
        before = self._progress.now
        self._progress.count_update(micro, skipped=skipped)
        self._recovery.end_window(self._intake.window_since(before), by_scaler=skipped)
        self._recovery.judge(all_of_them=micro.ends_epoch)
        phases.tell_step(self.global_step)
        phases.reach(Point.STEP_DONE)
        if self._feed.knows_epoch_end:
            self._intake.epoch_is_complete = micro.ends_epoch
        if not skipped and self.global_step % self._options.log_every_steps == 0:
            self._log_step()
        self._reporter.step(self.epoch, self.global_step, self._feed.share_of_epoch, self._checkpointer.writing)
        self._callbacks.tell("step")
        self._reach_boundary(ends_epoch=micro.ends_epoch)
        phases.switch(Phase.OTHER if self._feed.needs_batch else Phase.STEP)

    def end_epoch(self, **metrics: float) -> None:
        """After the epoch's last batch and its evaluation. Does nothing when a stop cut the epoch short.

        Left out, `epochs` does it without metrics.
        """
        misuse.require_used_right(entered=self._entered, call="run.end_epoch()")
        if not self.epoch_is_complete:
            return
        if self._boundary.agree_on_cut(self._cut.is_made):
            self._give_evaluation_up()
            return
        self._cut.end()
        phases.switch(Phase.OTHER)
        values = self._progress.end_epoch(metrics)
        self._intake.end_epoch()
        self._tracking.add(self.global_step, values)
        self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)
        self._reporter.epoch(self.epochs_completed, self._progress.train_loss, self._progress.metrics)
        if self._progress.patience_is_over:
            self._boundary.stop = self._boundary.stop or StopReason.EARLY_STOPPED
        self._callbacks.tell("epoch_end", metrics=self.metrics)
        self._reach_boundary(ends_epoch=True, evaluated=True)

    def tell_norm(self, norm: torch.Tensor | float) -> None:
        """Before the optimizer steps, where the loop clips: the norm of its gradients before that.

        A spike is judged by it (see `HealthPolicy`); what clipping has left is never one.
        """
        self._recovery.guard.tell_norm(norm)

    def evaluation(self, name: str | None = None) -> AbstractContextManager[nn.Module]:
        """A model, unwrapped, in eval mode, with the main rank's buffers and without gradients. Collective.

        Args:
            name: of one of several models, or of a registered module (an average of the weights); None is the only
                model.
        """
        return evaluating(find_model(name, self._models, self._live.registered), self.world)

    def stop(self, reason: StopReason = StopReason.DONE) -> None:
        """Asks all ranks to stop at the next agreement; may be called on any rank."""
        self._boundary.stop_wish = reason

    def save(self, *, wait: bool = False) -> None:
        """Saves now (all ranks call it), or with the `step` that ends the update in progress.

        Args:
            wait: go on only when the checkpoint is durable, or has failed and was reported; inside a window it is the
                `step` that ends it which waits.
        """
        misuse.require_used_right(entered=self._entered, call="run.save()")
        if self._feed.must_wait(self.world):
            self._boundary.request_save(wait=wait)
            return
        self._boundary.save("requested")
        if wait:
            self._boundary.wait_for_save()

    # Inside the loop

    def _stops_here(self) -> bool:
        """Between two batches: agreed by all ranks; alone, as soon as it was told to and no window is half done."""
        return self.should_stop or (not self._feed.in_window and self._boundary.stop_alone())

    def _give_evaluation_up(self) -> None:
        """A signal has cut it short: it is saved as pending, and the next attempt evaluates."""
        if self._cut.start is not None:
            self._cut.start.put_back()
        self._cut.end()
        self._reach_boundary(ends_epoch=True)

    def _begin(self, count: int) -> None:
        self._reporter.epochs = count
        if self._begun:
            return
        self._begun = True
        notes = self._intake.fit(self.world)
        self._intake.prepare()
        self._beginning.begin(self._settings()["config"], notes)
        if self._progress.patience_is_over:
            self._boundary.stop = StopReason.EARLY_STOPPED
        elif self._boundary.reached_max_steps and self._progress.now.evaluation != "pending":
            self._boundary.stop = StopReason.DONE
        elif self._options.max_time is not None and self.epochs_completed < count:
            self._boundary.begin_session()
        self._watch.require_unchanged()
        capture = self._live.capture()
        self._watch.require_captured(capture, self._live.registered)
        self._schedules.warn_of_unsaved(self._live.registered)
        self._checkpointer.dry_run(capture)
        self._callbacks.tell("resumed" if self.resumed_from else "started", path=self.resumed_from or "")

    def _log_step(self) -> None:
        values = self._progress.log_step(self._rate.of_update())
        self._tracking.add(self.global_step, values)
        self._reporter.loss = values["loss"]
        if not self._boundary.saves_are_over:
            self._reporter.warn_of_not_finite(values, self.global_step, self.committed_step)

    def _reach_boundary(self, *, ends_epoch: bool, evaluated: bool = False) -> None:
        """Agree, then save if it is due. Collective."""
        misuse.require_newest(self._place, self)
        agreed = self._boundary.agree(
            ends_epoch=ends_epoch,
            evaluated=evaluated,
            is_last=self.epochs_completed >= self._reporter.epochs,
            evaluation_is_near=not self._feed.knows_epoch_end,
        )
        if (self._boundary.is_leaving or self._recovery.is_rolling_back) and not evaluated:
            self._intake.epoch_is_complete = False
        if self._boundary.stop is not None:
            self._callbacks.tell_of_stop(self._boundary.stop)
        self._boundary.save_if_due(agreed, ends_epoch=ends_epoch, evaluated=evaluated)

    def _on_commit(self, event: Committed, after_error: bool) -> None:
        self._tracking.settle(event.manifest.progress)
        if not after_error:
            self._callbacks.tell_of_commit(self._store.shown(event.path), event.manifest)

    def _snapshot(self, reason: str) -> tuple[Capture, Draft]:
        self._watch.require_unchanged()
        capture = self._live.capture()
        capture.rank_state.update(self._intake.capture())
        capture.state["health"] = self._recovery.capture()
        return capture, self._progress.draft(reason, self._settings(), self._environment)

    def _settings(self) -> dict[str, Json]:
        """Each setting's value at construction, for the manifest."""
        config = {
            "policy": self._policy.to_json(),
            "user": self._config,
            "data": self._intake.describe(),
            "epochs": self._reporter.epochs,
        }
        return {**self._live.settings, "config": config}
