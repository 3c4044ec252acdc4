"""What counts as hung, with an injected clock: deadlines, excuses, sleep, and what is left behind."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dist_train as dt
from dist_train import launched, phases
from dist_train.errors import ConfigError
from dist_train.health import stacks
from dist_train.health.hang_folder import HangFolder, untold_hangs
from dist_train.health.patience import BASE_SECONDS, LONG_SHARE, SHORT, Patience, Section, section_of
from dist_train.health.stacks import Peer
from dist_train.health.watchdog import AwakeClock, Place, Surroundings, Watchdog
from dist_train.phases import Phase
from tests.support.small_run import SmallRun, events_of

# Deadlines


def test_steps_and_waits_for_data_have_the_base_and_what_is_the_user_s_own_has_longer() -> None:
    for patience, base in ((Patience(), BASE_SECONDS), (Patience(10.0), 10.0)):
        for section in Section:
            assert patience.seconds(section) == (base if section in SHORT else LONG_SHARE * base)


def test_a_step_ten_times_slower_than_usual_is_within_the_deadline() -> None:
    patience = Patience()
    for _ in range(20):
        patience.observe(Section.STEP, 60.0)
    assert patience.seconds(Section.STEP) > 10 * 60.0
    assert patience.seconds(Section.DATA) == BASE_SECONDS


def test_a_compilation_makes_no_step_s_deadline_long() -> None:
    patience = Patience()
    patience.observe(Section.FIRST_STEP, 1500.0)
    assert patience.seconds(Section.STEP) > 1500.0  # it may be that all steps are so
    patience.observe(Section.STEP, 1.0)
    assert patience.seconds(Section.STEP) == BASE_SECONDS


def test_one_slow_step_does_not_make_the_usual_one_slow() -> None:
    patience = Patience()
    for seconds in (20.0, 20.0, 290.0, 20.0):
        patience.observe(Section.STEP, seconds)
    assert patience.seconds(Section.STEP) == 3 * 290.0


def test_what_the_user_says_holds_for_steps_exactly_and_what_was_seen_makes_the_rest_longer() -> None:
    patience = Patience(5.0)
    for section in (Section.STEP, Section.DATA, Section.AGREEMENT, Section.EVALUATION):
        patience.observe(section, 100.0)
    assert {patience.seconds(section) for section in SHORT} == {5.0}
    assert patience.seconds(Section.EVALUATION) == 300.0
    assert patience.seconds(Section.SAVE) == 30.0


@pytest.mark.parametrize(
    ("phase", "awaits", "has_stepped", "section"),
    [
        (Phase.STEP, False, False, Section.FIRST_STEP),
        (Phase.DATA, False, False, Section.FIRST_STEP),
        (Phase.STEP, False, True, Section.STEP),
        (Phase.DATA, False, True, Section.DATA),
        (Phase.CAPTURE, False, True, Section.SAVE),
        (Phase.SAVE_WAIT, True, True, Section.AGREEMENT),
        (Phase.OTHER, True, True, Section.AGREEMENT),
        (Phase.OTHER, False, True, Section.OTHER),
        (Phase.START, False, False, None),
        (Phase.OUTSIDE, True, True, None),
    ],
)
def test_where_a_rank_is_says_which_deadline_holds(
    phase: Phase, awaits: bool, has_stepped: bool, section: Section | None
) -> None:
    assert section_of(phase, awaits=awaits, has_stepped=has_stepped) is section


@pytest.mark.parametrize("value", ["soon", "0s", -1, 0.5, float("inf"), float("nan"), True])
def test_a_timeout_that_is_none_is_refused_where_it_is_written(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"RunOptions\.hang_timeout"):
        dt.RunOptions(hang_timeout=value)
    with pytest.raises(ConfigError, match=r"TrainConfig\.hang_timeout"):
        dt.TrainConfig(run_dir="run", epochs=1, global_batch_size=1, hang_timeout=value)


def test_a_timeout_may_be_a_time_or_auto_or_off() -> None:
    assert Patience.parse("off") is Patience.parse(None) is None
    assert [one.base_seconds for one in map(Patience.parse, ("auto", "10min", 90)) if one] == [300.0, 600.0, 90.0]


# One rank


class Watched:
    """A rank whose clock and place the test moves; what it would do to the process is written down."""

    def __init__(self, run_dir: Path, *, rank: int = 0, world_size: int = 1, leaves: bool = False, base: float = 10.0):
        self.now = 0.0
        self.place = Place(0, Phase.OTHER, "", 0)
        self.events: list[dict[str, Any]] = []
        self.codes: list[int] = []
        self.folder = HangFolder(run_dir, 7, rank)
        told = Surroundings(
            rank=rank, world_size=world_size, attempt=7, shown=str(self.folder.path), leaves=leaves,
            peers=[replace(Peer.of_this_process(), host=f"host-{one}") for one in range(world_size)],
        )  # fmt: skip
        self.dog = Watchdog(
            Patience(base),
            self.folder,
            told,
            self._note_event,
            clock=lambda: self.now,
            look=lambda: self.place,
            leave=self.codes.append,
        )
        self.dog.loop_begins(0)
        self.go(Phase.STEP, global_step=1)

    def _note_event(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def go(self, phase: Phase, *, awaited: str = "", global_step: int | None = None) -> None:
        step = self.place.global_step if global_step is None else global_step
        self.place = Place(self.place.beats + 1, phase, awaited, step)
        self.dog.poll()

    def pass_time(self, seconds: float) -> None:
        """As the thread would: a poll each tick."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.dog.tick_seconds
            self.dog.poll()

    @property
    def stacks(self) -> str:
        return "".join(path.read_text() for path in self.folder.path.glob("rank-*.txt"))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_step_past_its_deadline_is_told_with_its_stacks_and_then_more_and_more_rarely(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    watched.pass_time(9.0)
    assert watched.events == []
    watched.pass_time(2.0)
    (event,) = watched.events
    assert (event["rank"], event["global_step"], event["phase"], event["deadline"]) == (0, 1, "step", 10.0)
    assert 10.0 <= event["seconds"] <= 10.0 + 2.0
    told = capsys.readouterr().err
    assert "Rank 0 of 1 hangs at step 1: a step has taken 10." in told
    assert "Nobody would restart this process" in told
    assert "in test_a_step_past_its_deadline_is_told" in watched.stacks
    watched.pass_time(60.0)
    assert [round(event["seconds"]) for event in watched.events] == [10, 20, 40]
    assert watched.codes == []


def test_what_goes_on_after_all_is_said_and_watched_anew(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("dist_train").propagate = True
    watched.pass_time(12.0)
    watched.go(Phase.DATA)
    assert "Rank 0 goes on after 12 s." in caplog.text
    watched.pass_time(9.0)
    assert len(watched.events) == 1
    watched.pass_time(2.0)
    assert len(watched.events) == 2


@pytest.mark.parametrize("phase", [Phase.EVALUATION, Phase.SAVE_WAIT, Phase.OTHER, Phase.END, Phase.LOAD])
def test_what_may_take_long_may(watched: Watched, phase: Phase) -> None:
    watched.go(phase)
    watched.pass_time(59.0)
    assert watched.events == []
    watched.pass_time(2.0)
    assert len(watched.events) == 1


def test_an_evaluation_that_goes_from_batch_to_batch_takes_as_long_as_it_likes(watched: Watched) -> None:
    for _ in range(9):
        watched.go(Phase.EVALUATION)
        watched.pass_time(50.0)
    assert watched.events == []


def test_nobody_is_watched_outside_of_a_run(watched: Watched) -> None:
    watched.go(Phase.OUTSIDE)
    watched.pass_time(1000.0)
    assert watched.events == []


def test_time_in_which_the_process_did_not_run_is_no_time(watched: Watched) -> None:
    watched.pass_time(5.0)
    watched.now += 3600.0
    watched.dog.poll()
    watched.pass_time(4.0)
    assert watched.events == []
    watched.pass_time(2.0)
    assert len(watched.events) == 1


def test_polls_that_are_a_little_late_are_no_sleep() -> None:
    now = 0.0
    clock = AwakeClock(0.5, lambda: now)
    for _ in range(10):
        now += 2.0
        clock.read()
    assert clock.read() == 20.0


def test_the_first_step_may_compile(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.dog.loop_begins(1)
    watched.go(Phase.STEP)
    watched.pass_time(50.0)
    assert watched.events == []
    watched.go(Phase.OTHER, global_step=2)
    watched.go(Phase.STEP)
    watched.pass_time(11.0)
    assert len(watched.events) == 1


def test_where_somebody_restarts_it_a_hung_process_ends(tmp_path: Path) -> None:
    watched = Watched(tmp_path, leaves=True)
    watched.now += 0.5
    while not watched.codes:
        watched.pass_time(0.5)
        assert watched.now < 20
    assert watched.codes == [1]
    assert 10.0 <= watched.now <= 12.0
    assert watched.stacks
    assert (watched.folder.path / "told").exists()
    watched.dog.close()


def test_the_launcher_is_told_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.LAUNCH_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launched, "_noted", {})
    watched = Watched(tmp_path, leaves=True)
    watched.pass_time(10.5)
    note = launched.read_notes(tmp_path)[0]
    assert note["global_step"] == 1
    error = note["error"]
    assert (error["type"], error["phase"], error["secondary"], error["final"]) == ("Hang", "step", False, False)
    assert error["message"].startswith("hung at step 1: a step took 10.")
    assert "in test_the_launcher_is_told_where_it_was" in error["traceback"]


def test_a_folder_that_cannot_be_written_keeps_no_hung_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hangs").write_text("no folder")
    watched = Watched(tmp_path, leaves=True)
    watched.pass_time(10.5)
    assert watched.codes[0] == 1
    told = capsys.readouterr().err
    assert "could not be written" in told
    assert "in test_a_folder_that_cannot_be_written" in told


def test_a_process_in_a_debugger_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "is_debugged", lambda: True)
    watched = Watched(tmp_path, leaves=True)
    watched.pass_time(11.0)
    assert watched.codes == []
    assert len(watched.events) == 1


def test_nothing_watches_where_it_is_off(tmp_path: Path) -> None:
    def count(run: dt.Run) -> None:
        seen.append([thread.name for thread in threading.enumerate() if "watchdog" in thread.name])

    seen: list[list[str]] = []
    for hang_timeout in ("off", "auto"):
        SmallRun(run_dir=tmp_path / hang_timeout, epochs=1, hang_timeout=hang_timeout, at_epoch=count).train()
    assert seen == [[], ["dist_train-watchdog"]]


# Several ranks


def ranks(run_dir: Path, *phases_of: Phase) -> list[Watched]:
    """Ranks of one world on hosts of their own, each in a phase."""
    all_of_them = [
        Watched(run_dir, rank=rank, world_size=len(phases_of), leaves=True) for rank in range(len(phases_of))
    ]
    for one, phase in zip(all_of_them, phases_of, strict=True):
        one.go(phase)
    return all_of_them


def pass_time(all_of_them: list[Watched], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    for _ in range(round(seconds / all_of_them[0].dog.tick_seconds)):
        for one in all_of_them:
            if not one.codes:
                one.pass_time(one.dog.tick_seconds)
        if until():
            return


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.health.watchdog.GRACE_SECONDS", 0.0)


def test_who_waits_for_a_rank_at_work_is_not_hung(tmp_path: Path) -> None:
    waiting, evaluating = ranks(tmp_path, Phase.OTHER, Phase.EVALUATION)
    waiting.go(Phase.OTHER, awaited="the end of the epoch")
    pass_time([waiting, evaluating], 40.0)
    assert waiting.events == evaluating.events == []
    evaluating.go(Phase.OTHER)
    waiting.go(Phase.OTHER)
    pass_time([waiting, evaluating], 1.0)
    assert not (tmp_path / "hangs").exists()


def test_a_wait_that_was_excused_teaches_no_deadline(tmp_path: Path) -> None:
    waiting, working = ranks(tmp_path, Phase.STEP, Phase.OTHER)
    waiting.dog._patience = Patience()  # of the steps
    waiting.dog._patience.base_seconds = 10.0
    pass_time([waiting, working], 40.0)
    waiting.go(Phase.DATA)
    assert waiting.dog._patience.seconds(Section.STEP) == 10.0


@pytest.mark.usefixtures("no_grace")
def test_ranks_that_all_wait_are_hung_and_one_of_them_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ranks(tmp_path, Phase.STEP, Phase.STEP)
    pass_time(both, 13.0, until=lambda: all(one.codes for one in both))
    assert [one.codes for one in both] == [[1], [1]]
    assert sorted(path.name for path in both[0].folder.path.glob("rank-*")) == ["rank-0.txt", "rank-1.txt"]
    assert capsys.readouterr().err.count("hangs at step 1") == 1
    assert len(both[0].events) == 1
    assert both[1].events == []  # the main rank is there to write it


@pytest.mark.usefixtures("no_grace")
def test_a_rank_that_stops_renewing_its_word_is_an_excuse_no_longer(tmp_path: Path) -> None:
    waiting, stopped = ranks(tmp_path, Phase.STEP, Phase.EVALUATION)
    pass_time([waiting, stopped], 20.0)
    assert waiting.codes == []
    pass_time([waiting], 10.0)
    assert waiting.codes == [1]


@pytest.mark.usefixtures("no_grace")
def test_the_verdict_of_one_rank_holds_for_all(tmp_path: Path) -> None:
    hung, other = ranks(tmp_path, Phase.STEP, Phase.DATA)
    pass_time([hung], 11.0)
    assert hung.codes == [1]
    pass_time([other], 5.0)  # its own deadline is far
    assert other.codes == [1]
    assert other.folder.ranks_with_stacks(other.folder.names()) == {0, 1}


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize(("phase", "steps"), [(Phase.DATA, 0), (Phase.OUTSIDE, 1)])
def test_a_verdict_is_taken_back_by_the_rank_that_passed_it_when_it_goes_on_before_the_others_have_left(
    phase: Phase, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one held the interpreter's lock for a while, so that its watchdog could not say that it is at work; the
    run may be over by the time that the verdict would be carried out.
    """
    waiting, held = ranks(tmp_path, Phase.STEP, Phase.STEP)
    wait, seen = waiting.dog._wait_for_stacks, []

    def go_on_meanwhile() -> list[int]:
        seen.append(waiting.folder.verdict(waiting.folder.names()))
        beats, step = waiting.place.beats + 1, waiting.place.global_step + steps
        waiting.place = replace(waiting.place, beats=beats, phase=phase, global_step=step)
        return wait()

    monkeypatch.setattr(waiting.dog, "_wait_for_stacks", go_on_meanwhile)
    monkeypatch.setattr(waiting.dog, "_end_other", lambda rank: pytest.fail(f"rank {rank} was ended"))
    pass_time([waiting], 12.0)
    assert seen, "the verdict was passed"
    held.go(Phase.DATA)
    waiting.go(Phase.DATA)
    pass_time([waiting, held], 1.0)
    assert waiting.codes == held.codes == []
    assert waiting.events == []
    assert list(untold_hangs(tmp_path)) == []
    assert "Rank 0 is not ended: what hung goes on." in capsys.readouterr().err


@pytest.mark.usefixtures("no_grace")
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_rank_whose_verdict_is_taken_back_while_it_leaves_stays(
    goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = ranks(tmp_path, Phase.STEP, Phase.STEP, Phase.STEP)
    pass_time([first], 11.0)
    assert first.codes == [1]

    def take_back() -> list[int]:
        if goes_on:
            first.folder.take_back_verdict()
        return [2]

    monkeypatch.setattr(second.dog, "_wait_for_stacks", take_back)
    pass_time([second], 3.0)
    assert second.codes == ([] if goes_on else [1])


def test_ranks_that_do_well_leave_nothing(tmp_path: Path) -> None:
    both = ranks(tmp_path, Phase.STEP, Phase.STEP)
    for phase in (Phase.DATA, Phase.STEP) * 6:
        pass_time(both, 9.0)
        for one in both:
            one.go(phase)
    for one in both:
        one.dog.close()
    assert list(tmp_path.iterdir()) == []


# Files and words


def test_a_hang_that_nobody_could_write_down_is_told_by_the_next_attempt(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    SmallRun(run_dir=run_dir, epochs=1).train()
    verdict = {"attempt": 1, "rank": 1, "global_step": 3}
    assert HangFolder(run_dir, 1, 1).pass_verdict(verdict)
    assert not HangFolder(run_dir, 1, 0).pass_verdict({"attempt": 1, "rank": 0})
    SmallRun(run_dir=run_dir, epochs=2).train()
    SmallRun(run_dir=run_dir, epochs=3).train()
    (event,) = events_of(run_dir, "hung")
    assert event.items() >= verdict.items()
    assert list(untold_hangs(run_dir)) == []


def test_a_run_that_is_well_leaves_no_hangs_and_no_thread(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "run", epochs=1).train()
    assert not (tmp_path / "run" / "hangs").exists()
    assert [thread.name for thread in threading.enumerate() if "watchdog" in thread.name] == []


def test_a_verdict_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    folder = HangFolder(tmp_path, 1, 0)
    folder.ask()
    (folder.path / "hung.json").touch()
    assert folder.verdict(folder.names()) is None
    (folder.path / "hung.json").write_text(json.dumps({"rank": 1}))
    assert folder.verdict(folder.names()) == {"rank": 1}


def test_the_stacks_begin_with_the_main_thread_and_name_its_line() -> None:
    text = stacks.stacks_of_all_threads()
    assert text.startswith("Thread MainThread:")
    assert "in test_the_stacks_begin_with_the_main_thread_and_name_its_line" in text
    assert "test_watchdog.py" in stacks.line_of_the_script(stacks.main_stack())
    assert not stacks.waits_for_peers(stacks.main_stack())
    assert not stacks.is_debugged()


def test_an_agreement_says_what_it_is_on_and_is_over_after_an_error() -> None:
    before = phases.beats()
    with pytest.raises(ValueError, match="lost"), phases.awaiting("whether to stop"):
        assert phases.awaited() == "whether to stop"
        raise ValueError("lost")
    assert phases.awaited() == ""
    assert phases.beats() == before + 2
