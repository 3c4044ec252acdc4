"""Lines of run.jsonl that look right and are not: they count as none, and cost no attempt its end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dist_train import cli, phases, time_ledger
from dist_train.checkpoint.store import Store
from dist_train.errors import StopReason
from dist_train.goodput import MEASURED, fold_time, is_readable
from dist_train.phases import Phase
from dist_train.time_ledger import read_events, read_pulses
from tests.support.small_run import SmallRun, events_of

BUCKETS = dict.fromkeys(MEASURED, 1.0)
TIME = {
    "event": "time",
    "attempt": 1,
    "of_attempt": 1,
    "began": 5.0,
    "boot": "one",
    "uptime": 1.0,
    "buckets": BUCKETS,
    "global_step": 3,
    "resumed": {"attempt": None, "global_step": 0, "branch": False},
    "first_step": 0.5,
    "marks": [{"global_step": 2, "buckets": BUCKETS}],
}
COMMITTED = {"event": "committed", "attempt": 1, "global_step": 3, "stall_seconds": 0.1, "seconds": 1, "bytes": 7}
WRONG: list[Any] = [None, "soon", [], [1], {}, {"other": "x"}, 1e300, float("nan"), float("inf"), 10**400, True]


def variants(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """Each field wrong in each way, and missing."""
    found = [{**whole, name: wrong} for name in whole for wrong in WRONG]
    return [*found, *({key: value for key, value in whole.items() if key != name} for name in whole)]


def test_what_is_written_is_readable() -> None:
    assert all(map(is_readable, [TIME, COMMITTED, {**COMMITTED, "buckets": BUCKETS}]))


@pytest.mark.parametrize("whole", [TIME, {**COMMITTED, "buckets": BUCKETS}], ids=["time", "committed"])
def test_whatever_is_readable_can_be_added_up(whole: dict[str, Any], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for one in variants(whole):
        store.replace("run.jsonl", f"{json.dumps(TIME)}\n{json.dumps(one)}\n".encode(), durable=False)
        assert fold_time(read_events(store)) is not None


def test_a_pulse_with_wrong_types_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make_directory("attempts")
    for one in variants({key: value for key, value in TIME.items() if key not in ("event", "of_attempt")}):
        store.replace("attempts/pulse-000001.json", json.dumps(one).encode(), durable=False)
        fold_time([], read_pulses(store).values())


DAMAGED = [
    '{"event":"time"}',
    '{"event":"time","attempt":1,"time":1,"of_attempt":1,"began":"soon","buckets":{}}',
    '{"event":"committed","buckets":{"other":"x"},"attempt":1,"global_step":3,"time":1}',
    '{"event":"committed","buckets":null,"attempt":1,"global_step":3,"time":1}',
    '{"event":"stopped","attempt":1}',
    "[" * 100_000,
]


def test_a_run_whose_log_was_damaged_goes_on_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    SmallRun(run_dir=run_dir, epochs=1).train()
    with (run_dir / "run.jsonl").open("a") as file:
        file.write("\n".join(DAMAGED) + "\n")
    assert SmallRun(run_dir=run_dir, epochs=2).train().reason is StopReason.DONE
    capsys.readouterr()
    assert cli.main(["report", str(run_dir), "--json"]) == 0
    assert [row["attempt"] for row in json.loads(capsys.readouterr().out)["attempts"]] == [1, 2]


def test_an_account_that_cannot_be_drawn_up_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*records: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(time_ledger, "fold_time", fail)
    logging.getLogger("dist_train").addHandler(caplog.handler)
    run = SmallRun(run_dir=tmp_path / "run", epochs=1).train()
    logging.getLogger("dist_train").removeHandler(caplog.handler)
    assert run.reason is StopReason.DONE
    assert "could not be summed up from" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run/run.jsonl").read_text().splitlines()]
    assert [one["run"] for one in lines if one["event"] == "time"] == [None]


def test_what_watches_a_run_is_closed_whole_where_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ledger: Any, attempt: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(time_ledger.TimeLedger, "close", fail)
    with pytest.raises(ZeroDivisionError):
        SmallRun(run_dir=tmp_path / "run", epochs=1).train()
    assert phases.current() is Phase.OUTSIDE
    assert events_of(tmp_path / "run", "stopped")[-1]["reason"] == "done"
