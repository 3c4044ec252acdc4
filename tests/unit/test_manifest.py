"""The manifest's JSON: what is written comes back, what was changed is noticed, what is newer is left alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.manifest import (
    Best,
    FileEntry,
    Manifest,
    Progress,
    TensorEntry,
    digest_of,
    parse_step_name,
    saving_name,
    step_name,
)
from dist_train.errors import CheckpointError, CorruptCheckpointError, FormatVersionError
from tests.support.manifests import manifest

numbers = st.integers(0, 2**63)
floats = st.floats(allow_nan=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
progresses = st.builds(
    Progress,
    global_step=numbers,
    epoch=numbers,
    epochs_completed=numbers,
    samples_into_epoch=numbers,
    evaluation=st.sampled_from(["none", "pending", "done"]),
    stale_epochs=numbers,
)
bests = st.builds(
    Best,
    monitor=names,
    mode=st.sampled_from(["min", "max"]),
    value=floats,
    global_step=numbers,
    epochs_completed=numbers,
)
manifests = st.builds(
    Manifest,
    run_id=names,
    sequence=numbers,
    attempt=numbers,
    parent=st.none() | names,
    committed_at=finite,
    progress=progresses,
    files=st.dictionaries(names, st.builds(FileEntry, size=numbers, digest=names, blocks=st.lists(names, max_size=2))),
    tensors=st.dictionaries(
        names,
        st.builds(
            TensorEntry,
            shape=st.lists(numbers, max_size=3),
            dtype=st.just("F32"),
            order=st.none() | st.lists(numbers, max_size=3),
        ),
    ),
    aliases=st.dictionaries(names, names, max_size=2),
    state=st.dictionaries(names, json_values, max_size=3),
    rank_state=st.lists(json_values, max_size=2),
    settings=st.dictionaries(names, json_values, max_size=2),
    environment=st.dictionaries(names, json_values, max_size=2),
    metrics=st.dictionaries(names, floats, max_size=2),
    train_loss=st.none() | floats,
    best=st.none() | bests,
    world_size=st.integers(1, 99999),
    reason=names,
)


@given(manifests)
def test_every_manifest_comes_back_equal(one: Manifest) -> None:
    again = Manifest.from_json(one.to_json())
    assert again == one
    assert again.digest == one.digest
    assert again.to_json() == one.to_json()


def test_metrics_that_are_not_finite_survive() -> None:
    one = manifest(metrics={"a": math.nan, "b": math.inf, "c": -math.inf}, train_loss=math.nan)
    again = Manifest.from_json(one.to_json())
    assert math.isnan(again.metrics["a"])
    assert again.metrics["b"] == math.inf
    assert again.metrics["c"] == -math.inf
    assert again.train_loss is not None
    assert math.isnan(again.train_loss)
    assert again.digest == one.digest


EXAMPLE = manifest(
    3,
    files={"model-00001-of-00001.safetensors": FileEntry(size=4096, digest="ab" * 16)},
    tensors={"model/weight": TensorEntry(shape=[2, 3], dtype="F32")},
    state={"scheduler": {"last_epoch": 3, "base": [1e-05, True, None]}},
    metrics={"val_smape": 12.5},
)


@given(st.integers(0, len(EXAMPLE.to_json()) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(position: int, bit: int) -> None:
    """Some flips leave the meaning as it was (1e-05 and 1E-05)."""
    data = bytearray(EXAMPLE.to_json().encode())
    data[position] ^= 1 << bit
    try:
        found = Manifest.from_json(bytes(data), "runs/x/step-3")
    except CheckpointError as error:
        problem = error
    else:
        assert found == EXAMPLE
        return
    assert "runs/x/step-3" in str(problem)
    assert problem.path == "runs/x/step-3"


@given(st.integers(0, len(EXAMPLE.to_json()) - 1))
def test_a_truncated_manifest_is_corrupt(length: int) -> None:
    with pytest.raises(CorruptCheckpointError):
        Manifest.from_json(EXAMPLE.to_json()[:length])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "3",
        "[]",
        '"x"',
        "{}",
        b"\xff\xfe",
        "[" * 100000,
        '{"format":1}',
        '{"format":"1"}',
        '{"format":null}',
        '{"format":true}',
        "{" * 10,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_garbage_is_corrupt(text: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        Manifest.from_json(text)


def body_of(one: Manifest, **changes: Any) -> str:
    """JSON of a manifest with other fields and the digest that belongs to them."""
    body = {**json.loads(one.to_json()), **changes}
    body.pop("digest")
    body = {name: value for name, value in body.items() if value != "missing"}
    return json.dumps({**body, "digest": digest_of(body)})


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"sequence": "missing"},
        {"best": "missing"},
        {"progress": {"global_step": 1, "surprise": 2}},
        {"progress": None},
        {"files": {"a": {"size": 1}}},
        {"files": []},
        {"tensors": {"a": 3}},
    ],
    ids=str,
)
def test_unknown_and_missing_fields_are_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError, match="unknown field"):
        Manifest.from_json(body_of(EXAMPLE, **changes))


def test_a_newer_format_is_named_and_not_called_corrupt() -> None:
    with pytest.raises(FormatVersionError, match=r"format 2.*reads 1.*Upgrade"):
        Manifest.from_json('{"format": 2, "anything": []}', "runs/x")


def test_digest_depends_on_content_and_not_on_order() -> None:
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 1.5})


def test_the_digest_of_one_that_was_read_is_its_content_s_and_no_copy_has_it() -> None:
    written = manifest(3, metrics={"loss": 1.5}, tensors={"model/w": TensorEntry(shape=[2], dtype="F32")})
    read = Manifest.from_json(written.to_json())
    assert read.digest == written.digest
    changed = replace(read, sequence=4)
    assert changed.digest == Manifest.from_json(changed.to_json()).digest != read.digest


@given(st.integers(0, 10**12), st.integers(0, 50))
def test_names_of_committed_folders_are_read_back(step: int, copy: int) -> None:
    assert parse_step_name(step_name(step, copy)) == step
    assert parse_step_name(saving_name(step_name(step, copy), 7)) is None


@pytest.mark.parametrize(
    "name",
    [
        "step-1",
        "step-00000001x",
        "step-00000001.",
        ".trash-1-step-00000001",
        ".corrupt-a000001-step-00000001",
        "latest",
        "step-00000001\n",
        "abandoned",
    ],
)
def test_other_names_are_never_a_commit(name: str) -> None:
    assert parse_step_name(name) is None


def test_the_text_is_json_for_every_reader() -> None:
    """A bare NaN is Python's own and no JSON; other programs must be able to read a diverged run's manifest."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(manifest(metrics={"a": math.nan, "b": math.inf}, train_loss=-math.inf).to_json(), parse_constant=refuse)


def test_dictionaries_keep_their_order() -> None:
    """A registered object may sum over its dictionary: another order is another sum."""
    state = {"user/x": {"b": 1, "a": {"$": "dict", "items": [["z", 1], ["y", 2]]}}}
    again = Manifest.from_json(manifest(state=state).to_json())
    assert list(again.state["user/x"]) == ["b", "a"]
