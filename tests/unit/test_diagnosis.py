"""Where two runs went apart first, and what is said of it, from records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.drill.diagnosis import (
    AUGMENTATION,
    KERNEL,
    ORDER,
    OUTSIDE,
    RATE,
    SEED,
    diagnose_resume,
    diagnose_twins,
    first_difference,
    unseeded_generators,
)
from dist_train.drill.records import Life, Records, shown_names

Json = Any


def rng(number: int, **other: str) -> dict[str, str]:
    return {"python": f"p{number}", "torch": f"t{number}", **other}


def step(number: int, batch: Json = None, **other: Json) -> Json:
    """What step `number` used and did, as in every run but for what is given."""
    samples = [str(number * 2), str(number * 2 + 1)]
    usual = {
        "samples": f"s{number}",
        "shown": samples,
        "content": f"c{number}",
        "rng": rng(number),
        "loss": f"0.{number}",
    }
    line = {"step": number, "epoch": 0, "lr": [0.1], "weights": {"a": f"a{number}", "b": f"b{number}"}, "around": {}}
    line["rng"] = rng(number)
    batches = [{**usual, "sampler": "RandomSampler", "around": {"count": str(number), "time": "1"}, **(batch or {})}]
    return {**line, "batches": batches, **other}


def life(first: int, last: int, attempt: int = 1, changed: dict[int, Json] | None = None, **begin: Json) -> Life:
    """Steps first to last, begun after a checkpoint of the step before."""
    weights = {"a": f"a{first - 1}", "b": f"b{first - 1}"}
    line = {"step": first - 1, "weights": weights, "loader": True, "optimizers": 1, "around": {}, "lr": [0.1], **begin}
    steps = {number: step(number) for number in range(first, last + 1)}
    return Life(attempt, 0, line, {**steps, **(changed or {})})


def plain() -> Records:
    return {"run": [life(1, 9)]}


def resumed(changed: dict[int, Json], **begin: Json) -> Records:
    return {"run": [life(1, 5), life(4, 9, attempt=2, changed=changed, **begin)]}


def test_runs_that_train_the_same_have_no_difference() -> None:
    assert first_difference(plain(), plain()) is None
    assert first_difference(plain(), resumed({})) is None


def test_a_cause_is_named_before_its_consequences() -> None:
    changed = {
        number: step(number, {"content": "x", "loss": "9"}, weights={"a": "x", "b": "x"}) for number in (6, 7, 8, 9)
    }
    found = first_difference(plain(), resumed(changed))
    assert found is not None
    assert (found.attempt, found.step, found.what, found.resumed_at) == (2, 6, "content", 3)


def test_the_earliest_life_that_differs_counts() -> None:
    other = {
        "run": [life(1, 9, changed={8: step(8, {"loss": "9"})}), life(4, 9, 2, changed={4: step(4, {"loss": "9"})})]
    }
    found = first_difference(plain(), other)
    assert found is not None
    assert (found.attempt, found.step) == (1, 8)


def test_steps_that_were_never_made_are_a_difference() -> None:
    found = first_difference(plain(), {"run": [life(1, 7)]})
    assert found is not None
    assert (found.what, found.expected, found.found) == ("steps", 9, 7)
    more = first_difference(plain(), {"run": [life(1, 11)]})
    assert more is not None
    assert (more.what, more.step) == ("steps", 10)


@pytest.mark.parametrize(
    ("changed", "cause", "words"),
    [
        ({3: step(3, {"samples": "x", "shown": ["8", "1"]})}, ORDER, "samples at step 3: 8, 1 instead of 6, 7"),
        ({3: step(3, {"content": "x"})}, AUGMENTATION, "same samples, but other bytes of them at step 3"),
        ({3: step(3, {"rng": rng(3, torch="x"), "loss": "9"})}, SEED, "The random generator of torch stands elsewhere"),
        ({3: step(3, {"loss": "0.7"})}, KERNEL, "another loss (0.7 instead of 0.3) at step 3 from the same batch"),
        ({3: step(3, weights={"a": "a3", "b": "x"})}, KERNEL, "another value of b at step 3"),
        ({3: step(3, lr=[0.5], weights={"a": "x"})}, RATE, "at step 3, 0.5 instead of 0.1, though all before it is"),
        ({3: step(3, lr=[0.10000000000123])}, RATE, "at step 3, 0.10000000000123 instead of 0.1, though"),
    ],
)
def test_twins_that_differ_are_told_why(changed: dict[int, Json], cause: str, words: str) -> None:
    found = first_difference(plain(), {"run": [life(1, 9, changed=changed)]})
    assert found is not None
    diagnosis = diagnose_twins(found)
    assert diagnosis.cause == cause
    assert words in diagnosis.sentence


def test_twins_that_begin_with_other_weights_lack_a_seed() -> None:
    found = first_difference(plain(), {"run": [life(1, 9, weights={"a": "a0", "b": "x"})]})
    assert found is not None
    assert diagnose_twins(found).cause == SEED
    assert "b differs at step 0" in diagnose_twins(found).sentence


@pytest.mark.parametrize(
    ("changed", "begin", "cause", "words"),
    [
        (
            {4: step(4, {"samples": "x", "shown": ["1", "2"]})},
            {"loader": False},
            ORDER,
            "RandomSampler that the Run was not",
        ),
        (
            {4: step(4, {"samples": "x", "shown": ["1", "2"]})},
            {},
            ORDER,
            "the first step after a resume at step 3, the samples",
        ),
        ({4: step(4, {"content": "x"})}, {}, AUGMENTATION, "though its samples are the same"),
        (
            {5: step(5, {"rng": rng(1), "loss": "9"})},
            {},
            SEED,
            "At step 5 the random generators of python and torch stand",
        ),
        ({4: step(4, lr=[0.5])}, {}, OUTSIDE, "the learning rate is 0.5 instead of 0.1"),
        ({4: step(4, {"loss": "0.9"})}, {}, OUTSIDE, "the loss depends on something that no checkpoint holds"),
        ({4: step(4, weights={"a": "x", "b": "b4"})}, {"optimizers": 0}, OUTSIDE, "The Run was given no optimizer"),
        ({}, {"weights": {"a": "x", "b": "b3"}}, OUTSIDE, "a is not what it was when the checkpoint of step 3"),
    ],
)
def test_a_resume_that_differs_is_told_why(changed: dict[int, Json], begin: Json, cause: str, words: str) -> None:
    found = first_difference(plain(), resumed(changed, **begin))
    assert found is not None
    diagnosis = diagnose_resume(found)
    assert diagnosis.cause == cause
    assert words in diagnosis.sentence
    assert diagnosis.advice


def test_a_loop_over_batches_of_its_own_is_told_that_it_has_no_place() -> None:
    unseen: Json = {"samples": None, "shown": None, "content": None}
    before = {"run": [life(1, 9, changed={4: step(4, unseen)})]}
    found = first_difference(before, {"run": [life(4, 9, 2, {4: step(4, {**unseen, "loss": "9"})}, loader=False)]})
    assert found is not None
    assert diagnose_resume(found).cause == ORDER
    assert "The loop iterates batches of its own, whose place nobody knows" in diagnose_resume(found).sentence


def test_a_generator_that_nothing_draws_from_is_no_difference() -> None:
    changed = {number: step(number, {"rng": rng(number, python="x")}, rng=rng(number, python="x")) for number in (4, 5)}
    twin = {"run": [life(1, 9, changed=changed)]}
    assert first_difference(plain(), twin) is None
    assert unseeded_generators(plain(), twin) == ["python"]
    assert unseeded_generators(plain(), plain()) == []


def test_a_variable_that_a_resume_has_lost_is_named() -> None:
    batch = {"loss": "0.9", "around": {"count": "0", "time": "7", "new": "1"}}
    twin = {"run": [life(1, 9, changed={4: step(4, {"around": {"count": "4", "time": "3"}})})]}
    found = first_difference(plain(), resumed({4: step(4, batch)}), twin=twin)
    assert found is not None
    assert found.suspects == (("count", "4", "0"),)
    assert "before it: count was 4 and is 0" in diagnose_resume(found).sentence


def test_without_batches_a_variable_is_looked_for_where_the_life_began() -> None:
    before = {
        "run": [life(1, 9, changed={3: step(3, {"around": {}}, around={"count": "3"}), 4: step(4, {"around": {}})})]
    }
    other = resumed({4: step(4, {"loss": "0.9", "around": {}})}, around={"count": "0"})
    found = first_difference(before, other, twin=before)
    assert found is not None
    assert found.suspects == (("count", "3", "0"),)


def test_a_second_run_that_begins_afresh_with_other_weights_is_not_told_of_a_checkpoint() -> None:
    one: Records = {"runs_a-0a1b2c": [life(1, 9)], "runs_b-3d4e5f": [life(1, 9)]}
    other: Records = {"runs_a-0a1b2c": [life(1, 9)], "runs_b-3d4e5f": [life(1, 9, 2, weights={"a": "x", "b": "b0"})]}
    found = first_difference(one, other)
    assert found is not None
    assert (found.run, found.shown, found.resumed_at) == ("runs_b-3d4e5f", "runs_b", 0)
    diagnosis = diagnose_resume(found)
    assert diagnosis.cause == SEED
    assert "runs_b (attempt 2) had no checkpoint to go on from, began afresh at step 0" in diagnosis.sentence
    assert "checkpoint of step" not in diagnosis.sentence
    assert "before each model is built" in diagnosis.advice


def test_the_run_is_named_where_a_script_has_several() -> None:
    one: Records = {"x-0a1b2c": [life(1, 9)], "y-3d4e5f": [life(1, 9)]}
    other: Records = {"x-0a1b2c": [life(1, 9)], "y-3d4e5f": resumed({4: step(4, lr=[0.5])})["run"]}
    found = first_difference(one, other)
    assert found is not None
    assert "At step 4 of y, the first step after a resume at step 3, the" in diagnose_resume(found).sentence
    assert "learning rate at step 4 of y, 0.5" in diagnose_twins(found).sentence
    missing = first_difference(one, {"x-0a1b2c": [life(1, 9)], "y-3d4e5f": [life(1, 7)]})
    assert missing is not None
    assert "does not make the same steps of y: 9, 7" in diagnose_resume(missing).sentence


def test_runs_of_one_name_keep_what_tells_them_apart() -> None:
    assert shown_names({"x-0a1b2c": [], "x-3d4e5f": [], "y-0a1b2c": []}) == {
        "x-0a1b2c": "x-0a1b2c",
        "x-3d4e5f": "x-3d4e5f",
        "y-0a1b2c": "y",
    }
