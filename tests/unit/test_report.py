"""`dist-train report`: what a person reads of where a run's time went, and why it was restarted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.cli import main
from dist_train.commands.launch import _goodput
from dist_train.errors import DeadlineError
from dist_train.run import Run
from dist_train.time_ledger import read_pulses
from tests.support.small_run import SmallRun, events_of

EVERY_FOUR = CheckpointPolicy(every_steps=4)


def fail_at(step: int) -> Any:
    def at_step(run: Run) -> None:
        if run.global_step == step:
            raise RuntimeError("the cable was pulled")

    return at_step


@pytest.fixture
def failed_once(tmp_path: Path) -> Path:
    """Twelve updates, the last one again after an error."""
    attempt = SmallRun(run_dir=tmp_path / "run", policy=EVERY_FOUR, max_steps=12)
    with pytest.raises(RuntimeError):
        replace(attempt, at_step=fail_at(10)).train()
    attempt.train()
    return tmp_path / "run"


def test_it_says_where_the_time_went_and_why(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", str(failed_once), "--attempts"]) == 0
    told = capsys.readouterr().out
    for part in (
        "done at step 12",
        "in 2 attempts",
        "productive",
        "goodput",
        "1, ended by an error (RuntimeError: the cable was pulled)",
        "2 steps had to be done again",
        "3 durable",
        "0 to 10",
        "8 to 12",
    ):
        assert part in " ".join(told.split()), told


def test_its_numbers_add_up(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", str(failed_once), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert round(sum(facts["buckets"].values()) * 1e6) == round(facts["seconds"] * 1e6)
    assert facts["seconds"] == pytest.approx(facts["ended"] - facts["began"], abs=1e-5)
    assert facts["goodput"] == pytest.approx(facts["buckets"]["productive"] / facts["seconds"])
    (restart,) = facts["restarts"]
    assert (restart["cause"], restart["at_step"], restart["lost_steps"]) == ("error", 10, 2)
    assert restart["seconds_to_first_step"] > restart["down_seconds"] >= 0
    assert facts["saves"]["committed"] == len(facts["saves"]["stall_seconds_each"]) == 3
    assert read_pulses(Store(failed_once)) == {}
    last = events_of(failed_once, "time")[-1]
    assert last["run"]["goodput"] == pytest.approx(facts["goodput"], abs=1e-5)


def test_a_rank_that_lost_the_others_is_not_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(run: Run) -> None:
        raise DeadlineError("Rank 0 lost them")

    with pytest.raises(DeadlineError):
        SmallRun(run_dir=tmp_path / "run", at_step=lose).train()
    SmallRun(run_dir=tmp_path / "run", max_steps=1).train()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "1, lost another rank" in " ".join(capsys.readouterr().out.split())


def test_a_hang_is_told_with_its_place(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = failed_once / "run.jsonl"
    hung = {"time": 1.0, "attempt": 1, "event": "hung", "rank": 1, "section": "step", "line": "train.py:40"}
    log.write_text(json.dumps(hung) + "\n" + log.read_text())
    capsys.readouterr()
    assert main(["report", str(failed_once)]) == 0
    assert "1, hung (rank 1 in step, train.py:40)" in " ".join(capsys.readouterr().out.split())


def test_a_run_in_progress_is_told_by_its_pulse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = {}

    def look(run: Run) -> None:
        if run.global_step == 8 and not facts:
            capsys.readouterr()
            assert main(["report", str(tmp_path / "run"), "--json"]) == 0
            facts.update(json.loads(capsys.readouterr().out))

    SmallRun(run_dir=tmp_path / "run", policy=EVERY_FOUR, at_batch=look).train()
    assert (facts["status"], len(facts["attempts"])) == ("running", 1)
    assert facts["global_step"] == 8, "of the pulse that the save has made"
    assert facts["restarts"] == []


def test_a_run_that_kept_no_record_is_told_so(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = failed_once / "run.jsonl"
    old = [line for line in log.read_text().splitlines() if json.loads(line)["event"] != "time"]
    log.write_text("\n".join(old) + "\n")
    capsys.readouterr()
    assert main(["report", str(failed_once)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "holds no record of where its time went" in told.err


def test_an_attempt_that_failed_to_begin_is_counted(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="epoch:77"):
        SmallRun(run_dir=failed_once, resume="epoch:77").train()
    SmallRun(run_dir=failed_once, policy=EVERY_FOUR, max_steps=13).train()
    capsys.readouterr()
    assert main(["report", str(failed_once), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["resumed_step"] for one in facts["attempts"]] == [0, 8, None, 12]
    assert facts["lost_steps"] == 2


def test_the_launcher_tells_the_same_goodput(failed_once: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", str(failed_once), "--json"]) == 0
    assert _goodput(str(failed_once)) == json.loads(capsys.readouterr().out)["goodput"]
    assert _goodput(None) is None
    assert _goodput(str(failed_once.parent / "elsewhere")) is None
