"""One tracker run over all attempts: TensorBoard shows each step once, with the values of the run's own history."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics
from tests.support.launch import ROOT, run_again_until_done, torchrun

pytestmark = pytest.mark.distributed
TRACKED = str(ROOT / "tests/support/tracked.py")
KILLS = "2,8"  # before the first checkpoint, and between those of steps 6 and 9
EPOCHS, UPDATES = 3, 15


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed twice in mid-epoch and is done."""
    folder: Path = tmp_path_factory.mktemp("tracked") / "run"
    command = [TRACKED, str(folder), KILLS]
    command = [sys.executable, *command] if request.param == 1 else torchrun(2, *command)
    lives = run_again_until_done(command, deadline_seconds=240.0, extra={})
    assert len(lives) == 3
    assert len(list(folder.parent.glob("fired-*"))) == 2
    return folder


@pytest.fixture(scope="module")
def scalars(run_dir: Path) -> Callable[..., dict[str, list[Any]]]:
    """Tag -> events as TensorBoard shows them; as they lie in the files without `purge`."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def load(*, purge: bool = True) -> dict[str, list[Any]]:
        loaded = accumulators.EventAccumulator(str(run_dir / "tracker" / "run"), purge_orphaned_data=purge)
        loaded.Reload()
        return {tag: loaded.Scalars(tag) for tag in loaded.Tags()["scalars"]}

    return load


def test_there_is_one_tracker_run(run_dir: Path) -> None:
    folders = {path.parent for path in (run_dir / "tracker").rglob("events.out.tfevents.*")}
    assert folders == {run_dir / "tracker" / "run"}


def test_what_dead_attempts_wrote_is_still_in_the_files(scalars: Callable[..., dict[str, list[Any]]]) -> None:
    """Otherwise this file would prove nothing."""
    steps = [event.step for event in scalars(purge=False)["loss"]]
    assert steps.count(1) == 2
    assert steps.count(8) == 2
    assert len(steps) > UPDATES


def test_each_step_and_epoch_is_shown_once(scalars: Callable[..., dict[str, list[Any]]]) -> None:
    shown = {tag: [event.step for event in events] for tag, events in scalars().items()}
    each_step, each_epoch = list(range(1, UPDATES + 1)), [5, 10, 15]
    assert shown == {"loss": each_step, "lr": each_step, "train_loss": each_epoch, "val_loss": each_epoch}


def test_the_values_shown_are_those_of_the_runs_history(
    run_dir: Path, scalars: Callable[..., dict[str, list[Any]]]
) -> None:
    history = read_metrics(Store(run_dir))
    assert len(history) == UPDATES + EPOCHS
    for tag, events in scalars().items():
        kind = "step" if tag in ("loss", "lr") else "epoch"
        recorded = {
            record["global_step"]: float(np.float32(record[tag])) for record in history if record["kind"] == kind
        }
        assert {event.step: event.value for event in events} == recorded
