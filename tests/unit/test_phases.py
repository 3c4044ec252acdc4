"""Where a process is in a run: one phase at a time, in the order in which a person would tell it."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from dist_train import launched, phases
from dist_train.errors import ConfigError, DeadlineError
from dist_train.health.leaving import Departure
from dist_train.phases import Phase, Point
from tests.support.small_run import UPDATES_PER_EPOCH, SmallRun


def test_a_run_goes_through_its_phases_one_at_a_time(tmp_path: Path) -> None:
    changes: list[tuple[Phase, Phase]] = []
    points: list[Point] = []
    stops = [phases.listen(lambda before, now: changes.append((before, now))), phases.on_reach(points.append)]
    SmallRun(run_dir=tmp_path / "run", epochs=2).train()
    for stop in stops:
        stop()
    assert all(one[1] is other[0] for one, other in pairwise(changes))
    seen = [now for _, now in changes]
    assert seen.count(Phase.STEP) == seen.count(Phase.DATA) == 2 * UPDATES_PER_EPOCH
    assert seen.count(Phase.EVALUATION) == 2
    assert seen[-1] is Phase.OUTSIDE
    assert Phase.LOAD in seen
    assert points.count(Point.STEP_DONE) == 2 * UPDATES_PER_EPOCH
    saves = seen.count(Phase.CAPTURE)
    assert saves >= 2
    order = [point for point in points if point is not Point.STEP_DONE]
    assert order == [Point.WRITING, Point.BEFORE_COMMIT, Point.AFTER_COMMIT, Point.RETENTION] * saves
    assert phases.global_step() == 2 * UPDATES_PER_EPOCH


def test_a_phase_within_another_ends_in_it_also_after_an_error() -> None:
    before = phases.current()
    with pytest.raises(ValueError, match="of the block"), phases.within(Phase.LOAD):
        raise ValueError("of the block")
    assert phases.current() is before


def test_a_listener_that_was_ended_hears_nothing() -> None:
    heard: list[Phase] = []
    stop = phases.listen(lambda before, now: heard.append(now))
    stop()
    with phases.within(Phase.LOAD):
        pass
    assert heard == []


def test_a_worker_s_notes_reach_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(launched, "_noted", {})
    launched.note(begun=True, committed_step=-1)
    launched.note(committed_step=40)
    launched.note_error(ConfigError("no such setting"))
    note = launched.read_notes(tmp_path)[3]
    assert (note["begun"], note["committed_step"], note["pid"]) == (True, 40, os.getpid())
    assert note["error"]["final"]
    assert not note["error"]["secondary"]
    launched.note_error(DeadlineError("lost them"))
    assert json.loads((tmp_path / "rank-3.json").read_text())["error"]["secondary"]


def test_a_further_run_in_a_process_is_not_ended_by_the_former_one_s_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path / "notes"))
    monkeypatch.setattr(launched, "_noted", {})
    (tmp_path / "notes").mkdir()
    seen: list[dict[str, object]] = []
    SmallRun(run_dir=tmp_path / "first", epochs=1).train()
    assert launched.read_notes(tmp_path / "notes")[0]["outcome"] == "done"

    def look(run: object) -> None:
        seen.append(launched.read_notes(tmp_path / "notes")[0])

    SmallRun(run_dir=tmp_path / "second", epochs=1, at_epoch=look).train()
    assert "outcome" not in seen[0]
    assert str(seen[0]["run_dir"]).endswith("second")


def test_nothing_is_noted_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launched.LAUNCH_DIR, raising=False)
    monkeypatch.chdir(tmp_path)
    launched.note(begun=True)
    assert list(tmp_path.iterdir()) == []
    assert launched.read_notes(tmp_path) == {}


def test_what_does_not_leave_in_time_is_ended_and_shows_its_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    departure = Departure(0.01, "the other ranks are gone", 1, leave=codes.append)
    departure._timer.join(20)
    assert codes == [1]
    told = capfd.readouterr().err
    assert "did not end within 0 s (the other ranks are gone)" in told
    assert "most recent call first" in told


def test_what_has_left_is_not_ended() -> None:
    codes: list[int] = []
    departure = Departure(60.0, "nothing", 1, leave=codes.append)
    departure.cancel()
    departure._timer.join(20)
    assert codes == []
