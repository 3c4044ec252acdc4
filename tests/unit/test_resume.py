"""Which checkpoint to resume from: a pure choice among what was found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.catalog import Found
from dist_train.checkpoint.resume import ResumeRequest, select_candidates
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


@pytest.mark.parametrize(
    ("text", "kind"),
    [("auto", "auto"), ("must", "must"), ("never", "never"), ("runs/x", "path"), ("step-00000001", "path")],
)
def test_requests_are_read(text: str, kind: str) -> None:
    request = ResumeRequest.parse(text)
    assert request.kind == kind
    assert request.path == (text if kind == "path" else "")


@pytest.mark.parametrize("text", ["", "atuo", "latest ", "True"])
def test_unknown_requests_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="'auto', 'must', 'never'"):
        ResumeRequest.parse(text)
