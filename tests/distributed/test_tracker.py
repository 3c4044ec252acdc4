"""One tracker run over all attempts: each step once, with the values of the run's own history, whatever kills do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.checkpoint.store import Store
from dist_train.history import read_metrics, rows_by_step
from dist_train.wandb_file import rows_of
from tests.support.launch import ROOT, run_again_until_done, torchrun

pytestmark = pytest.mark.distributed
TRACKED = str(ROOT / "tests/support/tracked.py")
# A life dies before the first checkpoint; one when step 5 is saved and its evaluation was told, but not saved; the next
# goes on from there and ends at step 8 with an error, so that wandb's process writes down what it was given.
EPOCHS, UPDATES = 3, 15
RUNS = [
    pytest.param(("trainer", 2, "5-judged,8-error"), id="trainer-2-ranks"),
    pytest.param(("loop", 1, "2-kill,5-judged,8-error"), id="own-loop-1-rank", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=RUNS)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended too early a few times and is done."""
    kind, world_size, plan = request.param
    folder: Path = tmp_path_factory.mktemp("tracked") / "ultra"
    command = [TRACKED, kind, str(folder), plan]
    command = [sys.executable, *command] if world_size == 1 else torchrun(world_size, *command)
    lives = run_again_until_done(command, deadline_seconds=240.0, extra={"WANDB_MODE": "offline"})
    assert len(lives) - 1 == len(list(folder.parent.glob("fired-*"))) == len(plan.split(",")), lives[0].output
    return folder


@pytest.fixture(scope="module")
def expected(run_dir: Path) -> dict[int, dict[str, float]]:
    history = read_metrics(Store(run_dir))
    assert len(history) == UPDATES + EPOCHS
    return rows_by_step(history)


@pytest.fixture(scope="module")
def scalars(run_dir: Path) -> Callable[..., dict[str, list[Any]]]:
    """Tag -> events as TensorBoard shows them; as they lie in the files without `purge`."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def load(*, purge: bool = True) -> dict[str, list[Any]]:
        loaded = accumulators.EventAccumulator(str(run_dir / "tracker" / "ultra"), purge_orphaned_data=purge)
        loaded.Reload()
        return {tag: loaded.Scalars(tag) for tag in loaded.Tags()["scalars"]}

    return load


def test_there_is_one_tensorboard_run(run_dir: Path) -> None:
    folders = {path.parent for path in (run_dir / "tracker").rglob("events.out.tfevents.*")}
    assert folders == {run_dir / "tracker" / "ultra"}


def test_what_dead_attempts_wrote_is_still_in_tensorboards_files(scalars: Callable[..., dict[str, list[Any]]]) -> None:
    """Otherwise this file would prove nothing."""
    written = {tag: [event.step for event in events] for tag, events in scalars(purge=False).items()}
    assert written["loss"].count(8) == 2
    assert written["train_loss"].count(5) == 2


def test_tensorboard_shows_each_step_and_epoch_once_with_the_historys_values(
    expected: dict[int, dict[str, float]], scalars: Callable[..., dict[str, list[Any]]]
) -> None:
    shown: dict[int, dict[str, float]] = {}
    for tag, events in scalars().items():
        for event in events:
            row = shown.setdefault(event.step, {})
            assert tag not in row, f"{tag} is shown twice at step {event.step}"
            row[tag] = event.value
    single = {step: {tag: float(np.float32(value)) for tag, value in row.items()} for step, row in expected.items()}
    assert shown == single


def test_wandb_has_one_run_which_every_life_continues(run_dir: Path) -> None:
    """And writes down only what is missing."""
    files = sorted((run_dir / "tracker/wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1
    *_, ended, last = [[row["_step"] for row in rows_of(str(path))] for path in files]
    assert ended, "nothing was written down before the last life"
    assert last[0] == ended[-1] + 1


def test_wandb_has_each_step_once_and_rising_with_the_historys_values(
    run_dir: Path, expected: dict[int, dict[str, float]]
) -> None:
    files = sorted((run_dir / "tracker/wandb").glob("offline-run-*/*.wandb"))
    rows = [row for path in files for row in rows_of(str(path))]
    assert [row["_step"] for row in rows] == sorted(expected)
    for row in rows:
        logged = {name: value for name, value in row.items() if not name.startswith("_")}
        assert logged == expected[int(row["_step"])]
