"""When a worker group is started again, after what pause, and when not at all."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.cluster.restart_policy import (
    FIRST_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Cause,
    Ended,
    Restart,
    RestartPolicy,
    Stop,
)
from dist_train.errors import ExitCode

KILLED = Cause(rank=1, exit_code=-9)


class Clock:
    """Seconds that a test turns on by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_policy(max_restarts: int = 10, give_up_after: int = 3, clock: Clock | None = None) -> RestartPolicy:
    return RestartPolicy(max_restarts, give_up_after=give_up_after, clock=clock or Clock())


def failed(step: int | None = None, error: str = "ValueError: no", committed: int | None = -1, **more: Any) -> Ended:
    settings = {"begun": True, "seconds": 10.0, "causes": [Cause(rank=0, exit_code=1, error=error, step=step)]}
    return Ended(committed_step=committed, **{**settings, **more})


def killed(committed: int | None, *run_dirs: str, back: int | None = None) -> Ended:
    where = {"run_dirs": run_dirs, "rolled_back_to": back}
    return Ended(seconds=10.0, begun=True, committed_step=committed, causes=[KILLED], **where)


def test_a_good_end_stops_with_0() -> None:
    assert make_policy().decide(Ended(seconds=1.0, begun=True, committed_step=5)) == Stop(exit_code=0, why="")


@pytest.mark.parametrize("code", [ExitCode.REQUEUE, ExitCode.DO_NOT_REQUEUE, ExitCode.INTERRUPTED, ExitCode.USAGE])
def test_a_code_that_says_so_is_not_restarted(code: ExitCode) -> None:
    causes = [Cause(rank=0, exit_code=1), Cause(rank=1, exit_code=code)]
    decision = make_policy().decide(Ended(seconds=900.0, begun=True, committed_step=5, causes=causes))
    assert isinstance(decision, Stop)
    assert decision.exit_code == code


def test_a_mistake_in_the_settings_is_not_restarted_in_any_attempt() -> None:
    policy = make_policy()
    assert isinstance(policy.decide(killed(5)), Restart)
    decision = policy.decide(failed(causes=[Cause(rank=0, exit_code=1, error="ConfigError: no", final=True)]))
    assert decision == Stop(exit_code=1, why="starting it again cannot help")


def test_an_error_of_the_first_seconds_stops_with_the_scripts_code() -> None:
    decision = make_policy().decide(failed(begun=False, committed=None, causes=[Cause(rank=0, exit_code=7)]))
    assert isinstance(decision, Stop)
    assert decision.exit_code == 7


def test_what_failed_late_or_after_a_first_attempt_is_restarted() -> None:
    assert isinstance(make_policy().decide(failed(begun=False, seconds=FIRST_SECONDS)), Restart)
    policy = make_policy()
    assert isinstance(policy.decide(killed(5)), Restart)
    assert isinstance(policy.decide(failed(begun=False, committed=None)), Restart)


def test_a_kill_in_the_first_seconds_is_restarted() -> None:
    decision = make_policy().decide(Ended(seconds=0.1, begun=False, committed_step=None, causes=[KILLED]))
    assert isinstance(decision, Restart)


@pytest.mark.parametrize("committed", [-1, 0, 48])
def test_three_attempts_at_the_same_committed_step_stop_with_93(committed: int) -> None:
    policy = make_policy()
    assert isinstance(policy.decide(killed(committed)), Restart)
    assert isinstance(policy.decide(killed(committed)), Restart)
    decision = policy.decide(killed(committed))
    assert isinstance(decision, Stop)
    assert decision.exit_code == ExitCode.DO_NOT_REQUEUE
    assert (f"step {committed}" if committed >= 0 else "before anything was committed") in decision.why


def test_the_same_error_at_the_same_step_three_times_stops_with_93_though_a_later_save_came_through() -> None:
    policy = make_policy()
    decisions = [policy.decide(failed(step=50, committed=committed)) for committed in (45, 48, 48)]
    assert [type(one) for one in decisions] == [Restart, Restart, Stop]


def test_progress_begins_the_count_anew() -> None:
    policy = make_policy()
    decisions = [policy.decide(killed(committed)) for committed in (3, 3, 6, 6, 9, 9, 9)]
    assert [type(one) for one in decisions] == [Restart] * 6 + [Stop]


def test_a_run_that_goes_on_after_a_roll_back_makes_progress_though_its_steps_went_down() -> None:
    policy = make_policy(max_restarts=1)
    ends = [killed(60), killed(50, back=45), killed(55), killed(60), killed(65)]
    assert [type(policy.decide(one)) for one in ends] == [Restart] * 5


def test_a_run_that_rolls_back_and_ends_where_it_did_before_is_stuck() -> None:
    policy = make_policy()
    decisions = [policy.decide(killed(50, back=45)) for _ in range(3)]
    assert [type(one) for one in decisions] == [Restart, Restart, Stop]


def test_the_next_run_of_a_script_makes_progress_of_its_own() -> None:
    policy = make_policy(max_restarts=1)
    ends = [killed(80, "a"), *(killed(step, "a", "b") for step in (10, 25, 40, 60, 60))]
    assert [type(policy.decide(one)) for one in ends] == [Restart] * 5 + [Stop]


def test_a_script_that_begins_another_run_each_time_is_stuck() -> None:
    policy = make_policy()
    decisions = [policy.decide(killed(40 + n, f"run-{n}")) for n in range(3)]
    assert [type(one) for one in decisions] == [Restart, Restart, Stop]


def test_the_budget_refills_when_the_committed_step_advances() -> None:
    policy = make_policy(max_restarts=1)
    for committed in range(1, 20):
        assert isinstance(policy.decide(killed(committed)), Restart)
    decision = policy.decide(killed(19))
    assert isinstance(decision, Stop)
    assert decision.exit_code == 128 + 9
    assert "budget of 1" in decision.why


def test_a_script_that_tells_nothing_has_the_budget_alone() -> None:
    policy = make_policy(max_restarts=4)
    ended = [failed(begun=False, committed=None, seconds=100.0 + n) for n in range(5)]
    assert [type(policy.decide(one)) for one in ended] == [Restart] * 4 + [Stop]


def test_pauses_double_without_progress_and_are_none_after_it() -> None:
    policy = make_policy(max_restarts=50, give_up_after=50)
    pauses = [policy.decide(killed(step)) for step in (3, 3, 3, 3, 3, 6, 6, 6)]
    assert [one.pause_seconds for one in pauses if isinstance(one, Restart)] == [0, 1, 2, 4, 8, 0, 1, 2]
    last = [policy.decide(killed(6)) for _ in range(20)][-1]
    assert isinstance(last, Restart)
    assert last.pause_seconds == LONGEST_PAUSE_SECONDS


def test_an_attempt_that_lived_long_is_not_paused_for() -> None:
    clock = Clock()
    policy = make_policy(clock=clock, give_up_after=9)
    policy.decide(killed(3))
    policy.decide(killed(3))
    policy.started()
    clock.now += 1.5
    decision = policy.decide(killed(3))
    assert isinstance(decision, Restart)
    assert decision.pause_seconds == 0.5


def test_nodes_that_come_and_leave_cost_nothing() -> None:
    policy = make_policy(max_restarts=2)
    change = Ended(seconds=10.0, begun=True, committed_step=5, causes=[KILLED], membership=True)
    for _ in range(20):
        assert isinstance(policy.decide(change), Restart)
    assert policy.left == 2


def test_who_was_told_to_end_is_not_restarted() -> None:
    asked = {"begun": True, "committed_step": 5, "seconds": 9.0, "stop_asked": True}
    assert make_policy().decide(Ended(**asked)) == Stop(exit_code=0, why="")
    deaf = Ended(**asked, causes=[Cause(rank=0, exit_code=-15)])
    assert make_policy().decide(deaf) == Stop(exit_code=128 + 15, why="")


def test_leaving_with_0_in_the_middle_of_a_run_is_a_failure() -> None:
    assert Cause(rank=0, exit_code=0).shell_code == 1
