"""RunProgress: counts, losses, metrics and the best so far, and how they go on from a checkpoint."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.checkpointer import Opened
from dist_train.checkpoint.manifest import Best, Manifest, Progress
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.console import MetricsLog
from dist_train.errors import ConfigError
from dist_train.history import read_metrics
from dist_train.metrics import EarlyStopping
from dist_train.order import EpochLayout
from dist_train.progress import RunProgress
from dist_train.world import SoloWorld
from tests.support.manifests import manifest

LAYOUT = EpochLayout(num_samples=10, global_batch_size=4, micro_batch_size=4, world_size=1)
RNG = {"python": "a"}


class RankOf(SoloWorld):
    """One rank of several, without the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


def progress_of(
    path: Path, *, early: EarlyStopping | None = None, world: SoloWorld | None = None, **policy: Any
) -> RunProgress:
    return RunProgress(Store(path), world or SoloWorld(), CheckpointPolicy(**policy), early)


def fresh(path: Path, **options: Any) -> RunProgress:
    one = progress_of(path, **options)
    one.start_fresh(1)
    return one


def train_epoch(one: RunProgress, loss: float = 1.0, *, skipped: tuple[int, ...] = ()) -> None:
    for window in range(3):
        micro = LAYOUT.micro_batch(window, 0)
        one.meter.add(loss, micro.num_samples)
        one.count_update(micro, skipped=window in skipped)


def opened(found: Manifest, origin: Store) -> Opened:
    return Opened(path="there", manifest=found, reader=None, origin=origin)  # type: ignore[arg-type]


def row(epoch: float = 0.0, epoch_samples: float = 0, recent: float = 0.0, recent_samples: float = 0) -> dict[str, Any]:
    return {"rng": RNG, "loss": [float(value).hex() for value in (epoch, epoch_samples, recent, recent_samples)]}


def test_an_update_moves_step_and_position(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    seen = []
    for window in range(3):
        one.count_update(LAYOUT.micro_batch(window, 0), skipped=False)
        seen.append((one.now.global_step, one.now.samples_into_epoch, one.now.evaluation))
    assert seen == [(1, 4, "none"), (2, 8, "none"), (3, 10, "pending")]


def test_a_skipped_update_moves_the_position_only(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    train_epoch(one, skipped=(0, 2))
    assert one.now == Progress(global_step=1, samples_into_epoch=10, evaluation="pending", skipped_updates=2)


def test_the_end_of_an_epoch_begins_the_next(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    train_epoch(one, loss=0.5)
    assert one.end_epoch({"val": 2}) == {"train_loss": 0.5, "val": 2.0}
    assert one.now == Progress(
        global_step=3, epoch=1, epochs_completed=1, samples_into_epoch=0, evaluation="done", metric_records=1
    )
    (record,) = read_metrics(Store(tmp_path))
    assert record == {"kind": "epoch", "global_step": 3, "epoch": 0, "train_loss": 0.5, "val": 2.0}


def test_a_record_of_a_step_holds_the_loss_since_the_last_one(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    for loss, learning_rate in ((3.0, 0.1), (1.0, None)):
        one.meter.add(loss, 4)
        one.log_step(learning_rate)
    assert [(record["loss"], record["lr"]) for record in read_metrics(Store(tmp_path))] == [(3.0, 0.1), (1.0, None)]
    assert one.now.metric_records == 2
    assert one.meter.epoch_mean(SoloWorld()) == 2.0


@pytest.mark.parametrize(("mode", "values", "best"), [("min", [3, 1, 2], 1), ("max", [3, 1, 4], 4), ("max", [-1], -1)])
def test_the_best_follows_the_direction(mode: str, values: list[float], best: float, tmp_path: Path) -> None:
    one = fresh(tmp_path, monitor="val", mode=mode)
    for value in values:
        train_epoch(one)
        one.end_epoch({"other": 0.0, "val": value})
    assert one.best is not None
    assert one.best.value == best
    assert one.best.epochs_completed == values.index(best) + 1
    assert one.best.global_step == 3 * one.best.epochs_completed


def test_without_a_monitor_the_first_metric_is_it(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    one.end_epoch({"first": 1.0, "second": 0.0})
    one.end_epoch({"second": -5.0, "first": 2.0})
    assert one.best is not None
    assert (one.best.monitor, one.best.value) == ("first", 1.0)


def test_an_epoch_without_metrics_judges_nothing(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    one.end_epoch({})
    assert one.best is None
    assert not one.patience_is_over


def test_early_stopping_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping has no metric to judge by"):
        fresh(tmp_path, early=EarlyStopping(patience=1)).end_epoch({})


def test_a_missing_monitor_names_what_was_measured(tmp_path: Path) -> None:
    one = fresh(tmp_path, monitor="val_smape")
    with pytest.raises(ConfigError, match=r"monitor='val_smape' is not among .* \(val, other\)\."):
        one.end_epoch({"val": 1.0, "other": 2.0})
    with pytest.raises(ConfigError, match=r"\(none\)"):
        one.end_epoch({})


def test_nan_is_never_an_improvement(tmp_path: Path) -> None:
    one = fresh(tmp_path, early=EarlyStopping(patience=2))
    for value, stale in ((math.nan, 1), (2.0, 0), (math.nan, 1), (math.nan, 2)):
        one.end_epoch({"val": value})
        assert one.now.stale_epochs == stale
    assert one.best is not None
    assert one.best.value == 2.0
    assert one.patience_is_over


def test_a_change_below_min_delta_costs_patience_and_is_still_the_best(tmp_path: Path) -> None:
    one = fresh(tmp_path, early=EarlyStopping(patience=2, min_delta=0.5))
    for value, stale in ((3.0, 0), (2.8, 1), (2.7, 2)):
        one.end_epoch({"val": value})
        assert one.now.stale_epochs == stale
    assert one.best is not None
    assert one.best.value == 2.7
    assert one.patience_is_over


def test_without_early_stopping_patience_never_ends(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    for value in range(50):
        one.end_epoch({"val": float(value)})
    assert one.now.stale_epochs == 49
    assert not one.patience_is_over


def test_everything_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    first = fresh(tmp_path)
    train_epoch(first)
    first.end_epoch({"val": 2.0})
    first.meter.add(0.1 + 0.2, 3)
    first.log_step(0.5)
    draft = first.draft("every_steps", {}, {})
    found = replace(
        manifest(1),
        progress=draft.progress,
        best=draft.best,
        metrics={"val": 2.0},
        train_loss=draft.train_loss,
        rank_state=[{"rng": RNG, **draft.rank_state}],
    )
    first.log_step(0.4)  # after the checkpoint: cut off
    second = progress_of(tmp_path)
    assert second.restore(opened(found, second._store), 2) == RNG
    assert (second.now, second.best, second.metrics) == (draft.progress, first.best, {"val": 2.0})
    assert [value.hex() for value in map(float, second.meter.state())] == draft.rank_state["loss"]
    second.log_step(0.3)
    assert [record.get("lr") for record in read_metrics(Store(tmp_path))] == [None, 0.5, 0.3]


def test_a_draft_has_metrics_only_once_they_are_measured(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    train_epoch(one, loss=4.0)
    one.end_epoch({"val": 2.0})
    evaluated = one.draft("every_epochs", {}, {})
    assert (evaluated.metrics, evaluated.train_loss) == ({"val": 2.0}, 4.0)
    micro = LAYOUT.micro_batch(0, 0)
    one.meter.add(1.0, 4)
    one.count_update(micro, skipped=False)
    midway = one.draft("every_steps", {"a": 1}, {"b": 2})
    assert (midway.metrics, midway.train_loss) == ({}, 1.0)
    assert (midway.settings, midway.environment, midway.reason) == ({"a": 1}, {"b": 2}, "every_steps")


def test_loss_sums_survive_bit_for_bit_even_when_they_are_not_finite(tmp_path: Path) -> None:
    one = fresh(tmp_path)
    one.meter.add(math.inf, 1)
    state = one.draft("", {}, {}).rank_state["loss"]
    other = progress_of(tmp_path)
    other.restore(opened(replace(manifest(1), rank_state=[{"rng": RNG, "loss": state}]), other._store), 2)
    assert other.meter.state() == [math.inf, 1, math.inf, 1]


def test_each_rank_takes_its_own_sums_and_generators(tmp_path: Path) -> None:
    rows = [{**row(1, 2, 3, 4), "rng": {"rank": 0}}, {**row(5, 6, 7, 8), "rng": {"rank": 1}}]
    for rank, sums in ((0, [1, 2, 3, 4]), (1, [5, 6, 7, 8])):
        one = progress_of(tmp_path, world=RankOf(rank, 2))
        assert one.restore(opened(replace(manifest(1), rank_state=rows), one._store), 2) == {"rank": rank}
        assert one.meter.state() == sums


@pytest.mark.parametrize(("rank", "sums"), [(0, [6, 8, 10, 12]), (1, [0, 0, 0, 0]), (2, [0, 0, 0, 0])])
def test_at_another_world_size_the_main_rank_takes_all_sums_and_says_so_alone(
    rank: int, sums: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row(1, 2, 3, 4), "rng": {"rank": 0}}, {**row(5, 6, 7, 8), "rng": {"rank": 1}}]
    one = progress_of(tmp_path, world=RankOf(rank, 3))
    package = logging.getLogger("dist_train")
    kept, package.propagate = package.propagate, True
    try:
        with caplog.at_level(logging.WARNING, "dist_train"):
            rng = one.restore(opened(replace(manifest(1), rank_state=rows), one._store), 2)
    finally:
        package.propagate = kept
    assert rng == {"rank": min(rank, 1)}
    assert one.meter.state() == sums
    assert ("saved by 2 ranks and is continued by 3" in caplog.text) is (rank == 0)


def test_the_history_of_another_run_is_taken_over_up_to_its_checkpoint(tmp_path: Path) -> None:
    origin = Store(tmp_path / "origin")
    origin.make_directory("")
    log = MetricsLog(origin)
    log.start(7, None, 0)
    for loss in (3.0, 2.0, 1.0):
        log.write(kind="step", loss=loss)
    Store(tmp_path / "here").make_directory("")
    one = progress_of(tmp_path / "here")
    found = replace(manifest(1), attempt=7, progress=Progress(global_step=2, metric_records=2), rank_state=[row()])
    one.restore(opened(found, origin), 1)
    one.log_step(0.1)
    assert [record["loss"] for record in read_metrics(one._store)] == [3.0, 2.0, None]
    assert one.now.metric_records == 3


def test_another_run_without_a_log_is_no_error(tmp_path: Path) -> None:
    """A checkpoint folder that was copied alone."""
    Store(tmp_path / "here").make_directory("")
    one = progress_of(tmp_path / "here")
    found = replace(manifest(1), progress=Progress(global_step=2, metric_records=5), rank_state=[row()])
    one.restore(opened(found, Store(tmp_path / "nowhere")), 1)
    assert one.now.metric_records == 0


def test_a_best_of_another_monitor_is_not_compared_with(tmp_path: Path) -> None:
    one = progress_of(tmp_path, monitor="accuracy", mode="max")
    best = Best(monitor="loss", mode="min", value=99.0, global_step=1, epochs_completed=1)
    one.restore(opened(replace(manifest(1), best=best, rank_state=[row()]), one._store), 2)
    one.end_epoch({"accuracy": 0.5, "loss": 1.0})
    assert one.best is not None
    assert (one.best.monitor, one.best.value, one.best.mode) == ("accuracy", 0.5, "max")


class Answering(RankOf):
    """The others give what it is told."""

    def __init__(self, rank: int, rows: list[dict[str, float]]) -> None:
        super().__init__(rank, len(rows))
        self.rows = rows

    def gather(self, value: Any, what: str) -> list[Any]:
        if what != "the epoch's metrics":
            return [value]
        assert value == {name: one.hex() for name, one in self.rows[self.rank].items()}
        return [{name: one.hex() for name, one in row.items()} for row in self.rows]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_measured_apart_decide_by_the_main_ranks_metrics(
    rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"val": 1.0, "other": math.nan}, {"val": 3.0, "other": math.nan}]
    one = fresh(tmp_path, early=EarlyStopping(patience=2), world=Answering(rank, rows), monitor="val")
    for _ in range(2):
        train_epoch(one)
        one.end_epoch(rows[rank])
    assert one.metrics["val"] == 1.0
    assert one.best is not None
    assert one.best.value == 1.0
    assert one.now.stale_epochs == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (rank == 0)
    assert all("(val is 1.0 on rank 0 and 3.0 on rank 1): those of rank 0 count" in text for text in told)


def test_a_rank_that_measured_nothing_has_the_main_ranks_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = fresh(tmp_path, world=Answering(1, [{"val": 1.0}, {}]))
    train_epoch(one)
    one.end_epoch({})
    assert one.metrics == {"val": 1.0}
    assert not caplog.records
