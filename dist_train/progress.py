"""How far a run is and what it has measured: everything of a manifest that is neither a tensor nor a live object.

Invariant: restored from a checkpoint it goes on exactly where the saved one stood, so that progress, losses, metrics
and the folded history of a killed run equal the uninterrupted one's. It saves nothing, stops nothing and reads no
clock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dist_train.checkpoint.checkpointer import Draft
from dist_train.checkpoint.manifest import Best, Progress
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.restorer import Opened
from dist_train.checkpoint.store import Store
from dist_train.console import MetricsLog
from dist_train.errors import ConfigError
from dist_train.history import fold_metrics, read_lines
from dist_train.metrics import EarlyStopping, LossMeter, is_better
from dist_train.order import MicroBatch
from dist_train.places import Place, describe_ranks, row_like, row_of
from dist_train.world import World

logger = logging.getLogger(__name__)
Json = Any


class RunProgress:
    """Counts, losses, metrics and the best so far of one run, on every rank alike.

    Args:
        store: the run directory, for metrics.jsonl (written by the main rank).
        policy: which metric is monitored, and in which direction.
    """

    def __init__(
        self, store: Store, world: World, policy: CheckpointPolicy, early_stopping: EarlyStopping | None
    ) -> None:
        self.now = Progress()
        self.metrics: dict[str, float] = {}
        self.train_loss: float | None = None
        self.best: Best | None = None
        self.meter = LossMeter()
        self.place: Place | None = None
        """Which samples are this rank's, where that is not just its rank."""
        self._store = store
        self._world = world
        self._policy = policy
        self._early = early_stopping
        self._log = MetricsLog(store, enabled=world.is_main)
        self._told_of_metrics = False

    @property
    def patience_is_over(self) -> bool:
        return self._early is not None and self.now.stale_epochs >= self._early.patience

    def start_fresh(self, attempt: int) -> None:
        self._log.start(attempt, None, 0)

    def restore(self, opened: Opened, attempt: int) -> Json:
        """Takes over what a checkpoint says; returns this rank's RNG state, None where the checkpoint has none."""
        manifest = opened.manifest
        self.now = manifest.progress
        self.meter = LossMeter()
        self.best, self.metrics, self.train_loss = manifest.best, dict(manifest.metrics), manifest.train_loss
        self._continue_history(opened, attempt)
        rows = manifest.rank_state
        if not rows or "rng" in manifest.absent:  # imported: there were no ranks
            return None
        meters = [[float.fromhex(text) for text in row["loss"]] for row in rows]
        if len(rows) == self._world.world_size:
            self.meter.load(meters[self._world.rank])
        elif self._world.is_main:
            self.meter.load([math.fsum(column) for column in zip(*meters, strict=True)])
        place = self.place or Place(self._world.rank, self._world.world_size)
        if (own := row_of(rows, self._world.rank, self._world.world_size, place)) is not None:
            return rows[own].get("rng")
        if self._world.is_main:
            logger.warning(
                "The checkpoint was saved by %s and is continued by %s: samples, updates and learning rates are the "
                "same, random numbers drawn in training (dropout) are not.",
                describe_ranks(len(rows), rows[0].get("place")),
                describe_ranks(self._world.world_size, place.to_json().get("place")),
            )
        return rows[row_like(rows, place)].get("rng")

    def fit_into(self, num_samples: int) -> list[str]:
        """Ends the epoch in progress where the data has become shorter than the position in it; returns what to say."""
        consumed = self.now.samples_into_epoch
        if consumed <= num_samples:
            return []
        self.now = replace(self.now, samples_into_epoch=num_samples)
        return [
            f"{consumed} samples of epoch {self.now.epoch + 1} were used, and the data has {num_samples} now: that "
            f"epoch counts as complete."
        ]

    def count_update(self, micro: MicroBatch, *, skipped: bool) -> None:
        """One window is consumed; its update counts unless the GradScaler left it out."""
        self.now = replace(
            self.now,
            global_step=self.now.global_step + (not skipped),
            skipped_updates=self.now.skipped_updates + skipped,
            samples_into_epoch=self.now.samples_into_epoch + micro.window_samples,
            evaluation="pending" if micro.ends_epoch else "none",
        )

    def leave_out(self, micro: MicroBatch) -> None:
        """One window is consumed and not trained on."""
        self.now = replace(
            self.now,
            samples_into_epoch=self.now.samples_into_epoch + micro.window_samples,
            evaluation="pending" if micro.ends_epoch else "none",
        )

    def log_step(self, learning_rate: float | None) -> dict[str, float | None]:
        """Records the loss since the last record; returns what trackers get. Collective, waits for the device."""
        values = {"loss": self.meter.take_recent(self._world), "lr": learning_rate}
        self._log.write(kind="step", global_step=self.now.global_step, epoch=self.now.epoch, **values)
        self.now = replace(self.now, metric_records=self._log.count)
        return values

    def end_epoch(self, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """Records the epoch and judges it; returns what trackers get. Collective."""
        self.metrics = self._agree_on_metrics({name: float(value) for name, value in metrics.items()})
        self.train_loss = self.meter.take_epoch(self._world)
        values = {"train_loss": self.train_loss, **self.metrics}
        self._log.write(kind="epoch", global_step=self.now.global_step, epoch=self.now.epoch, **values)
        self.now = replace(
            self.now,
            epoch=self.now.epoch + 1,
            epochs_completed=self.now.epochs_completed + 1,
            samples_into_epoch=0,
            evaluation="done",
            metric_records=self._log.count,
        )
        self._judge()
        return values

    def draft(self, reason: str, settings: dict[str, Json], environment: dict[str, Json]) -> Draft:
        """What a manifest says of this moment. Collective."""
        self._log.flush()
        evaluated = self.now.evaluation == "done"
        return Draft(
            progress=self.now,
            reason=reason,
            settings=settings,
            environment=environment,
            metrics=self.metrics if evaluated else {},
            train_loss=self.train_loss if evaluated else self.meter.epoch_mean(self._world),
            best=self.best,
            rank_state={"loss": [float(value).hex() for value in self.meter.state()]},
        )

    def _agree_on_metrics(self, mine: dict[str, float]) -> dict[str, float]:
        """The main rank's, on all ranks: what they decide (to stop early, what is best) must be decided alike."""
        rows = self._world.gather({name: value.hex() for name, value in mine.items()}, "the epoch's metrics")
        first, *others = [{name: float.fromhex(text) for name, text in row.items()} for row in rows]
        apart = [(rank, name) for rank, row in enumerate(others, 1) for name in row if _differ(first, row, name)]
        if apart and self._world.is_main and not self._told_of_metrics:
            self._told_of_metrics = True
            rank, name = apart[0]
            logger.warning(
                "The metrics given to run.end_epoch differ between the ranks (%s is %s on rank 0 and %s on rank %d): "
                "those of rank 0 count. Reduce them over the ranks before, as dist_train's metrics do "
                "(metric.compute(run.world)).",
                name,
                first.get(name, "missing"),
                others[rank - 1][name],
                rank,
            )
        return first

    def _judge(self) -> None:
        """The best so far, and patience. Metrics are equal on all ranks, and so is the verdict."""
        inherited = self.best.monitor if self.best and self.best.monitor in self.metrics else None
        monitor = self._policy.monitor or inherited or next(iter(self.metrics), None)
        if monitor is None and self._early is not None:
            raise ConfigError(
                "early_stopping has no metric to judge by: call run.end_epoch(val_loss=...) after each evaluation."
            )
        if monitor is None:
            return
        if monitor not in self.metrics:
            known = ", ".join(self.metrics) or "none"
            raise ConfigError(f"monitor={monitor!r} is not among the metrics given to end_epoch ({known}).")
        value, mode = self.metrics[monitor], self._policy.mode
        best = self.best.value if self.best and self.best.monitor == monitor else None
        improved = is_better(value, best, mode, self._early.min_delta if self._early else 0.0)
        self.now = replace(self.now, stale_epochs=0 if improved else self.now.stale_epochs + 1)
        if is_better(value, best, mode):
            done, step = self.now.epochs_completed, self.now.global_step
            self.best = Best(monitor=monitor, mode=mode, value=value, global_step=step, epochs_completed=done)

    def _continue_history(self, opened: Opened, attempt: int) -> None:
        """The folded history goes on from the checkpoint's record; another run's is taken over."""
        if opened.origin is self._store:
            self._log.start(attempt, opened.manifest.attempt, self.now.metric_records)
            return
        inherited = fold_metrics(read_lines(opened.origin), opened.manifest.attempt)[: self.now.metric_records]
        self._log.start(attempt, None, 0, inherited)
        self.now = replace(self.now, metric_records=self._log.count)


def _differ(one: Mapping[str, float], other: Mapping[str, float], name: str) -> bool:
    """Beyond the order of a summation."""
    if name not in one:
        return True
    same = math.isnan(one[name]) and math.isnan(other[name])
    return not same and not math.isclose(one[name], other[name], rel_tol=1e-6)
