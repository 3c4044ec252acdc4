"""Which checkpoint to resume from: a pure choice among what was found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.catalog import Found
from dist_train.checkpoint.resume import ResumeRequest, Selector, not_found_message, select_candidates, select_named
from dist_train.errors import CheckpointError, ConfigError, NoCheckpointError
from tests.support.manifests import found

TORN = Found("checkpoints/step-00000009", None, CheckpointError("step-00000009: the manifest is not JSON.", "x"))


def select(kind: str, *those: Found) -> list[str]:
    return [one.path[-1] for one in select_candidates(ResumeRequest.parse(kind), those, "runs/x")]


@given(st.permutations([1, 2, 3, 4]), st.randoms(use_true_random=False))
def test_newest_is_the_highest_sequence_never_the_highest_step(order: list[int], chance: random.Random) -> None:
    steps = {sequence: chance.randrange(100) for sequence in order}
    those = [found(sequence, step=steps[sequence]) for sequence in order]
    assert select("auto", *those) == ["4", "3", "2", "1"]


def test_torn_checkpoint_is_never_selected() -> None:
    assert select("auto", TORN) == []
    assert select("auto", found(1), TORN, found(2)) == ["2", "1"]
    assert select("must", found(1), TORN) == ["1"]


def test_auto_without_any_checkpoint_is_a_fresh_start() -> None:
    assert select("auto") == []


def test_must_without_a_usable_checkpoint_says_why() -> None:
    with pytest.raises(NoCheckpointError, match="runs/x"):
        select("must")
    with pytest.raises(NoCheckpointError, match="the manifest is not JSON"):
        select("must", TORN)


def test_never_refuses_a_directory_with_checkpoints_readable_or_not() -> None:
    assert select("never") == []
    for those in ([found(1)], [TORN]):
        with pytest.raises(ConfigError, match="resume='auto'"):
            select("never", *those)


@pytest.mark.parametrize("text", ["auto", "must", "never"])
def test_requests_without_a_checkpoint_are_read(text: str) -> None:
    assert ResumeRequest.parse(text) == ResumeRequest(text, text)


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("best", Selector("best")),
        ("epoch:10", Selector("epoch", 10)),
        ("step:1200", Selector("step", 1200)),
        ("runs/x", Selector("path", path="runs/x")),
        ("step-00000001", Selector("path", path="step-00000001")),
        ("epoch:10#warmer", Selector("epoch", 10)),
    ],
)
def test_requests_for_a_branch_are_read(text: str, selector: Selector) -> None:
    assert ResumeRequest.parse(text) == ResumeRequest("branch", text, selector)


@pytest.mark.parametrize("text", ["", "atuo", "latest", "True", "#"])
def test_unknown_requests_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"'auto', 'must' or 'never'.*'best', 'epoch:10', 'step:1200'"):
        ResumeRequest.parse(text)


@pytest.mark.parametrize("text", ["epoch:", "epoch:ten", "step:-1", "epoch:1.5"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text}' is no checkpoint"):
        ResumeRequest.parse(text)


def named(text: str, *those: Found) -> str | None:
    one = select_named(Selector.parse(text), those)
    return one.path[-1] if one else None


def test_an_epoch_is_that_many_epochs_completed_never_in_the_middle_of_the_next() -> None:
    done, later = found(2, step=20, epochs=2), found(3, step=25, epochs=2, samples=40)
    assert named("epoch:2", found(1, step=10, epochs=1), done, later) == "2"
    assert named("epoch:3", done, later) is None


def test_a_step_that_was_saved_twice_is_the_newer_one() -> None:
    assert named("step:20", found(5, step=20), found(2, step=20), found(9, step=30)) == "5"


def test_a_step_whose_manifest_is_torn_is_named_with_its_problem() -> None:
    assert select_named(Selector("step", 9), [found(1, step=1), TORN]) is TORN
    assert select_named(Selector("latest"), [TORN]) is None


def test_best_follows_the_newest_checkpoint_s_monitor_and_an_equal_one_the_older() -> None:
    those = [found(n, metrics={"val_smape": value}) for n, value in enumerate([3.0, 1.0, 1.0, 2.0], 1)]
    assert named("best", *those) == "2"


@pytest.mark.parametrize(
    ("text", "says"),
    [("epoch:7", "those after epoch 1, 2"), ("step:7", "those of step 10, 20"), ("best", "no monitored metric")],
)
def test_what_is_not_there_is_told_with_what_is(text: str, says: str) -> None:
    those = [found(1, step=10, epochs=1), found(2, step=20, epochs=2)]
    assert says in not_found_message(text, Selector.parse(text), "runs/x", those)
    assert "no checkpoint yet" in not_found_message(text, Selector.parse(text), "runs/x", [])
