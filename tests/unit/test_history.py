"""The metrics history: what kills and branches leave in metrics.jsonl, folded to the run that was never interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import dist_train as dt
from dist_train.checkpoint.store import Store
from dist_train.console import MetricsLog
from dist_train.errors import StorageError
from dist_train.history import fold_metrics, read_metrics, rows_by_step


def log_of(tmp_path: Path, attempt: int, parent: int | None, keep: int, losses: list[float]) -> MetricsLog:
    log = MetricsLog(Store(tmp_path))
    log.start(attempt, parent, keep)
    for loss in losses:
        log.write(kind="step", loss=loss)
    return log


def losses_of(tmp_path: Path, attempt: int | None = None) -> list[float]:
    lines = (tmp_path / "metrics.jsonl").read_bytes().decode(errors="replace").splitlines()
    return [record["loss"] for record in fold_metrics(lines, attempt)]


def test_without_a_log_there_is_no_history(tmp_path: Path) -> None:
    assert read_metrics(Store(tmp_path)) == []
    assert fold_metrics([]) == []


def test_the_history_of_one_attempt_is_what_it_wrote(tmp_path: Path) -> None:
    assert log_of(tmp_path, 1, None, 0, [5, 4, 3]).count == 3
    assert read_metrics(Store(tmp_path)) == [{"kind": "step", "loss": loss} for loss in (5, 4, 3)]


def test_a_resume_keeps_the_parents_records_up_to_the_checkpoint(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4, 3, 2])
    assert log_of(tmp_path, 2, 1, 2, [30, 20, 10]).count == 5
    assert losses_of(tmp_path) == [5, 4, 30, 20, 10]


def test_a_chain_of_attempts_is_folded_to_one_history(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [1.0, 1.1, 1.2, 1.3])
    log_of(tmp_path, 2, 1, 3, [2.3, 2.4, 2.5])
    log_of(tmp_path, 3, 2, 4, [3.4])
    log_of(tmp_path, 4, 3, 2, [4.2, 4.3])  # its checkpoint is older than those of attempts 2 and 3
    log_of(tmp_path, 5, 4, 4, [])
    assert losses_of(tmp_path) == [1.0, 1.1, 4.2, 4.3]
    assert losses_of(tmp_path, 3) == [1.0, 1.1, 1.2, 2.3, 3.4]
    assert losses_of(tmp_path, 1) == [1.0, 1.1, 1.2, 1.3]


def test_an_attempt_that_died_at_once_hands_its_parents_history_on(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4])
    log_of(tmp_path, 2, 1, 2, [])
    log_of(tmp_path, 3, 1, 2, [3])
    assert losses_of(tmp_path) == [5, 4, 3]


def test_a_fresh_start_forgets_what_dead_attempts_recorded(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4])
    log_of(tmp_path, 2, None, 0, [50])
    assert losses_of(tmp_path) == [50]


def test_a_branch_leaves_the_other_branchs_records_out(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [1.0, 1.1, 1.2])
    log_of(tmp_path, 2, 1, 3, [2.3, 2.4])
    log_of(tmp_path, 3, 1, 1, [3.1, 3.2])  # a branch of attempt 1's first checkpoint
    log_of(tmp_path, 4, 3, 3, [4.3])
    assert losses_of(tmp_path) == [1.0, 3.1, 3.2, 4.3]
    assert losses_of(tmp_path, 2) == [1.0, 1.1, 1.2, 2.3, 2.4]


def test_a_branch_of_another_run_begins_with_what_it_inherits(tmp_path: Path) -> None:
    log = MetricsLog(Store(tmp_path))
    log.start(1, None, 0, [{"kind": "step", "loss": 9.0}, {"kind": "step", "loss": 8.0}])
    log.write(kind="step", loss=7.0)
    assert log.count == 3
    assert losses_of(tmp_path) == [9.0, 8.0, 7.0]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_torn_by_a_kill_is_left_out_and_the_next_one_is_whole(cut: int, tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: -min(cut, last)])
    kept = [5, 4, 3] if cut == 1 else [5, 4]  # a cut of 1 takes the newline only
    assert losses_of(tmp_path) == kept
    log_of(tmp_path, 2, 1, 2, [30])
    assert losses_of(tmp_path) == [5, 4, 30]


@pytest.mark.parametrize("rubbish", ["", "{", "[]", "7", "null", '{"kind": "step"}', '{"attempt": "one"}', "\x00\x00"])
def test_lines_that_are_no_records_are_left_out(rubbish: str, tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rubbish + "\n")
    log_of(tmp_path, 2, 1, 1, [4])
    assert losses_of(tmp_path) == [5, 4]


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x80 rubbish\n")
    assert [record["loss"] for record in read_metrics(Store(tmp_path))] == [5]


def test_a_record_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    log_of(tmp_path, 2, 1, 2, [3])
    assert losses_of(tmp_path) == [5, 4, 3]


def test_records_hold_no_attempt_after_folding(tmp_path: Path) -> None:
    """So that the histories of a killed and an uninterrupted run can be equal."""
    log_of(tmp_path, 1, None, 0, [5])
    log_of(tmp_path, 2, 1, 1, [4])
    assert read_metrics(Store(tmp_path)) == [{"kind": "step", "loss": 5}, {"kind": "step", "loss": 4}]


# What a person reads


def a_run(tmp_path: Path) -> MetricsLog:
    """A run directory with one attempt that has recorded nothing."""
    (tmp_path / "checkpoints").mkdir()
    return log_of(tmp_path, 1, None, 0, [])


def test_the_public_name_reads_a_path(tmp_path: Path) -> None:
    a_run(tmp_path).write(kind="step", global_step=1, epoch=0, loss=2.5, lr=None)
    expected = [{"kind": "step", "global_step": 1, "epoch": 0, "loss": 2.5, "lr": None}]
    assert dt.read_metrics(tmp_path) == dt.read_metrics(str(tmp_path)) == expected


def test_floats_that_json_lacks_come_back_as_floats(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    log.write(kind="epoch", global_step=5, epoch=0, train_loss=math.nan, val=math.inf, other=-math.inf)
    assert '"nan"' in (tmp_path / "metrics.jsonl").read_text()
    (record,) = read_metrics(tmp_path)
    assert record["kind"] == "epoch"
    assert math.isnan(record["train_loss"])
    assert (record["val"], record["other"]) == (math.inf, -math.inf)


def test_every_value_is_a_plain_number_or_a_word(tmp_path: Path) -> None:
    """So that a table of them has number columns."""
    log = a_run(tmp_path)
    log.write(kind="step", global_step=1, epoch=0, loss=math.nan, lr=0.1)
    log.write(kind="epoch", global_step=1, epoch=0, train_loss=1.5, val=2.0)
    kinds = {key: {type(one[key]) for one in read_metrics(tmp_path) if key in one} for key in ("kind", "loss", "val")}
    assert kinds == {"kind": {str}, "loss": {float}, "val": {float}}


def test_pandas_makes_a_table_of_it(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    log = a_run(tmp_path)
    log.write(kind="step", global_step=1, epoch=0, loss=math.nan, lr=0.1)
    log.write(kind="epoch", global_step=1, epoch=0, train_loss=1.5)
    table = pandas.DataFrame(read_metrics(tmp_path))
    assert list(table.columns) == ["kind", "global_step", "epoch", "loss", "lr", "train_loss"]
    assert table["loss"].dtype == float


def test_a_run_that_has_measured_nothing_yet_has_an_empty_history(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert read_metrics(tmp_path) == []


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such directory"):
        read_metrics(tmp_path / "missing")
    with pytest.raises(StorageError, match="is not a run directory"):
        read_metrics(tmp_path)


def test_a_run_without_the_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "r"}))
    with pytest.raises(StorageError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_what_was_measured_at_one_step_is_one_row(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    log.write(kind="step", global_step=4, epoch=0, loss=3.0, lr=None)
    log.write(kind="step", global_step=5, epoch=0, loss=2.0, lr=0.1)
    log.write(kind="epoch", global_step=5, epoch=0, train_loss=2.5, val=7.0)
    assert rows_by_step(read_metrics(tmp_path)) == {
        4: {"loss": 3.0},
        5: {"loss": 2.0, "lr": 0.1, "train_loss": 2.5, "val": 7.0},
    }


def test_numbers_of_attempts_that_came_again_end_the_chain(tmp_path: Path) -> None:
    log_of(tmp_path, 1, None, 0, [5, 4])
    log_of(tmp_path, 2, 1, 2, [3])
    log_of(tmp_path, 1, 2, 3, [2])
    assert losses_of(tmp_path, 1)
