"""When to save: the truth table, and the settings that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.policy import CheckpointPolicy, Moment, should_save
from dist_train.errors import ConfigError
from dist_train.units import parse_bytes, parse_seconds

STEPS = CheckpointPolicy(every_steps=10)
EPOCHS = CheckpointPolicy(every_epochs=2)
TIMED = CheckpointPolicy(every="10min")
NOTHING = CheckpointPolicy()
SILENT = CheckpointPolicy(every_steps=10, at_end=False)


def moment(step: int, *, saved: int = -1, ends_epoch: bool = False, **fields: Any) -> Moment:
    return Moment(global_step=step, last_saved_step=saved, ends_epoch=ends_epoch, **fields)


EPOCH_END = {"ends_epoch": True}
EVALUATED = {"ends_epoch": True, "evaluated": True}


@pytest.mark.parametrize(
    ("policy", "at", "reason"),
    [
        (STEPS, moment(9), None),
        (STEPS, moment(10), "every_steps"),
        (STEPS, moment(10, saved=10), None),
        (STEPS, moment(11, saved=10), None),
        (NOTHING, moment(10), None),
        (NOTHING, moment(10, time_is_up=True), "every"),
        (TIMED, moment(3, time_is_up=True), "every"),
        (TIMED, moment(3, saved=3, time_is_up=True), None),
        (TIMED, moment(3), None),
        # At an epoch's last update everything waits for the evaluation ...
        (STEPS, moment(10, **EPOCH_END), None),
        (TIMED, moment(3, time_is_up=True, **EPOCH_END), None),
        (EPOCHS, moment(10, epochs_completed=1, **EPOCH_END), None),
        (NOTHING, moment(10, finished=True, **EPOCH_END), None),
        # ... and is saved with its metrics.
        (STEPS, moment(10, **EVALUATED), "every_steps"),
        (TIMED, moment(3, time_is_up=True, **EVALUATED), "every"),
        (EPOCHS, moment(10, epochs_completed=2, **EVALUATED), "every_epochs"),
        (EPOCHS, moment(10, epochs_completed=1, **EVALUATED), None),
        (EPOCHS, moment(15, epochs_completed=3, **EVALUATED), None),
        # The evaluation changes the state without a step: a save before it is out of date.
        (EPOCHS, moment(10, saved=10, epochs_completed=2, **EVALUATED), "every_epochs"),
        (NOTHING, moment(10, saved=10, finished=True, **EVALUATED), "end"),
        # A stop and a request do not wait.
        (EPOCHS, moment(10, stopping=True, **EPOCH_END), "end"),
        (STEPS, moment(10, requested=True, **EPOCH_END), "requested"),
        (NOTHING, moment(7, requested=True), "requested"),
        (NOTHING, moment(7, saved=7, requested=True), "requested"),
        # At the end once, unless that very step is saved.
        (NOTHING, moment(7, stopping=True), "end"),
        (NOTHING, moment(7, saved=7, stopping=True), None),
        (NOTHING, moment(7, finished=True, **EVALUATED), "end"),
        (NOTHING, moment(7, saved=7, stopping=True, **EPOCH_END), None),
        (SILENT, moment(7, stopping=True), None),
        (SILENT, moment(7, finished=True, **EVALUATED), None),
        (EPOCHS, moment(10, epochs_completed=2, finished=True, **EVALUATED), "every_epochs"),
    ],
)
def test_truth_table(policy: CheckpointPolicy, at: Moment, reason: str | None) -> None:
    assert should_save(policy, at) == reason


moments = st.builds(
    Moment,
    global_step=st.integers(0, 30),
    last_saved_step=st.integers(-1, 30),
    ends_epoch=st.booleans(),
    evaluated=st.booleans(),
    epochs_completed=st.integers(0, 5),
    time_is_up=st.booleans(),
    stopping=st.booleans(),
    requested=st.booleans(),
    finished=st.booleans(),
)


@given(moments)
def test_without_any_trigger_only_the_end_and_a_request_save(at: Moment) -> None:
    reason = should_save(NOTHING, at)
    assert reason in (None, "end", "requested", "every")
    assert (reason == "requested") == at.requested
    assert reason != "every" or at.time_is_up


@given(moments)
def test_the_same_state_is_never_saved_twice_unasked(at: Moment) -> None:
    again = at.last_saved_step == at.global_step and not at.evaluated and not at.requested
    assert not (again and should_save(STEPS, at))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10min", 600),
        ("10m", 600),
        ("11h30m", 41400),
        ("1d 2h", 93600),
        ("1.5h", 5400),
        (90, 90),
        (0.5, 0.5),
        ("30sec", 30),
        ("2 min", 120),
    ],
)
def test_durations_are_read(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "ten minutes", "10x", "-5s", "1e3s", "10min!", "10mins", "min", True, None, "nan", float("nan")]
)
def test_what_is_no_duration_is_refused_by_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_seconds(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"every_steps": 0},
        {"every_steps": 2.5},
        {"every_steps": True},
        {"every_epochs": -1},
        {"keep_last": 0},
        {"keep_last": None},
        {"max_failed_saves": 0},
        {"keep_best": -1},
        {"keep_best": 1.5},
        {"mode": "lowest"},
        {"every": 0},
        {"every": "-3s"},
        {"every": "soon"},
        {"keep_every_epochs": 0},
        {"keep_every_steps": 1.5},
        {"keep_optimizer": 0},
        {"max_bytes": 0},
        {"max_bytes": "much"},
        {"max_bytes": True},
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CheckpointPolicy(**settings)


def test_settings_round_trip_and_unknown_ones_are_errors() -> None:
    policy = CheckpointPolicy(every_steps=5, every="1h", keep_last=2, monitor="val", mode="max")
    assert CheckpointPolicy.from_json(policy.to_json()) == policy
    with pytest.raises(ConfigError, match="every_stepz"):
        CheckpointPolicy.from_json({"every_stepz": 5})


def test_a_policy_that_was_recorded_before_a_setting_existed_is_read() -> None:
    recorded = {"every_steps": 6, "every_epochs": 1, "every": None, "at_end": True, "keep_last": 9, "keep_best": 1}
    recorded |= {"monitor": "val", "mode": "min", "max_failed_saves": 5}
    policy = CheckpointPolicy.from_json(recorded)
    assert (policy.keep_last, policy.keep_every_epochs, policy.keep_optimizer, policy.budget) == (9, None, None, None)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("18GB", 18 * 10**9),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("2GiB", 2 << 30),
        ("1.5kB", 1500),
        ("1TiB", 1 << 40),
        ("7B", 7),
        (1000000, 1000000),
        (2.5e9, 2500000000),
    ],
)
def test_sizes_are_read(text: str | float, count: int) -> None:
    assert parse_bytes(text) == count
    assert CheckpointPolicy(max_bytes=text).budget == count


@pytest.mark.parametrize("text", ["", "18", "GB", "18G", "-1GB", "1e9B", "18GB!", "ib", True, None, float("nan")])
def test_what_is_no_size_is_refused_by_name(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every_epochs": 1, "keep_every_epochs": 5}, None),
        ({"every_steps": 500, "keep_every_steps": 1000, "every": "10min"}, None),
        ({"every_steps": 500, "keep_every_epochs": 5}, "no every_epochs saves there"),
        ({"every": "10min", "keep_every_steps": 1000}, "no every_steps saves there"),
        ({"every_epochs": 2, "keep_every_epochs": 5}, "keeps only epochs 10, 20, 30"),
    ],
)
def test_a_setting_without_effect_is_told_of(settings: dict[str, Any], told: str | None) -> None:
    sentences = CheckpointPolicy(**settings).settings_without_effect()
    assert [told in one for one in sentences] == ([True] if told else []), sentences
