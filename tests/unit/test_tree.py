"""Nested values <-> JSON and tensors: equal after a round trip, or refused by name."""

from __future__ import annotations

import json
import math
from collections import Counter
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.errors import UnsaveableStateError
from dist_train.tree import decode, encode, encode_shared, merge_settings, require_apart


def round_trip(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "user/x", tensors))
    return decode(json.loads(text), lambda name, device: tensors[name].clone())


def same(one: Any, other: Any) -> bool:
    """Equality to the bit and the type, NaN equal to itself."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return math.isnan(one) == math.isnan(other) and (math.isnan(one) or one.hex() == other.hex())
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
keys = (
    st.text(max_size=4) | st.just("$") | st.integers() | st.booleans() | st.tuples(st.integers(), st.text(max_size=2))
)
arrays = st.sampled_from(["<f4", ">f8", "|b1", "<i8", "|u1", "<c16", "<f2", "<U3", "<M8[s]"]).flatmap(
    lambda dtype: st.sampled_from([(), (0,), (3,), (2, 2)]).map(
        lambda shape: np.arange(int(np.prod(shape)), dtype="i8").reshape(shape).astype(dtype)
    )
)
tensors_of = st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]).map(
    lambda dtype: torch.arange(4).reshape(2, 2).to(dtype)
)
hashable = st.integers() | st.text(max_size=3) | st.frozensets(st.integers(), max_size=2)
values = st.recursive(
    plain | arrays | tensors_of | st.sets(hashable, max_size=3) | st.frozensets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(values)
def test_every_accepted_value_comes_back_equal(value: Any) -> None:
    assert same(value, round_trip(value))


@pytest.mark.parametrize(
    "value",
    [
        *[2**64, -(10**40), float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, b"\x00\xff"],
        *[{1: "a", "1": "b"}, {"$": 1}, {"$": "tensor", "name": "x"}, {None: 1, True: 2, (1, "a"): [3]}],
        *[{frozenset({1, 2}): 0}, set(), ((),)],
    ],
    ids=repr,
)
def test_unusual_plain_values_come_back_equal(value: Any) -> None:
    assert same(value, round_trip(value))


@pytest.mark.parametrize(
    "scalar",
    [np.float32(0.1), np.float64(0.1), np.int8(-3), np.bool_(True), np.complex64(1j), np.datetime64("2020-01-01")],
    ids=repr,
)
def test_numpy_scalars_keep_their_type(scalar: Any) -> None:
    back = round_trip(scalar)
    assert back.dtype == scalar.dtype
    assert back == scalar


def test_read_only_and_strided_arrays_come_back() -> None:
    array = np.arange(12).reshape(3, 4).T
    array.flags.writeable = False
    assert same(np.ascontiguousarray(array), np.ascontiguousarray(round_trip([array])[0]))


def test_dtypes_and_devices_come_back() -> None:
    assert round_trip([torch.bfloat16, torch.device("cuda:1")]) == [torch.bfloat16, torch.device("cuda:1")]


def test_subclasses_of_plain_types_are_saved_by_value() -> None:
    class Color(IntEnum):
        RED = 3

    class MyList(list[int]):
        pass

    assert round_trip(Color.RED) == 3
    assert round_trip({Color.RED: 1}) == {3: 1}
    assert round_trip(MyList([1, 2])) == [1, 2]
    assert round_trip(Counter("aab")) == Counter("aab")
    assert round_trip(torch.Size([2, 3])) == (2, 3)


@pytest.mark.parametrize(
    "value",
    [
        {1: torch.zeros(2), "1": torch.ones(2)},
        {"a": {"b": torch.zeros(2)}, "a/b": torch.ones(2)},
        {"a": [np.zeros(2)], "a/0": np.ones(2)},
    ],
    ids=["int and text key", "nested and slash", "list and slash"],
)
def test_tensors_at_places_that_read_alike_do_not_overwrite_each_other(value: Any) -> None:
    assert same(value, round_trip(value))


@pytest.mark.parametrize(
    ("value", "place", "kind"),
    [
        ({"a": [1, object()]}, "user/ema/a/1", "builtins.object"),
        ({"f": max}, "user/ema/f", "builtin_function_or_method"),
        ({"g": torch.Generator()}, "user/ema/g", "Generator"),
        ({"z": slice(1)}, "user/ema/z", "builtins.slice"),
        ({object(): 1}, "user/ema (a key)", "builtins.object"),
        ([np.array([None])], "user/ema/0", "numpy.ndarray"),
        ([np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])], "user/ema/0", "numpy.ndarray"),
        ([np.ma.masked_array([1, 2], [True, False])], "user/ema/0", "MaskedArray"),
    ],
    ids=["object", "function", "generator", "slice", "key", "object array", "record array", "masked array"],
)
def test_refusal_names_the_place_and_the_type(value: Any, place: str, kind: str) -> None:
    with pytest.raises(UnsaveableStateError) as caught:
        encode(value, "user/ema", {})
    assert place in str(caught.value)
    assert kind in str(caught.value)


def test_tensors_are_handed_on_uncopied() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    tensors: dict[str, torch.Tensor] = {}
    encode({"a": tensor}, "user/x", tensors)
    assert tensors["user/x/a"].data_ptr() == tensor.data_ptr()
    assert not tensors["user/x/a"].requires_grad


# Settings


def merged(current: Any, then: Any, today: Any) -> tuple[Any, dict[str, Any]]:
    changes: dict[str, Any] = {}
    return merge_settings(current, then, today, "o", changes), changes


def test_what_the_run_decayed_is_restored_where_the_user_changed_nothing() -> None:
    assert merged({"lr": 0.01, "n": 3}, {"lr": 0.1, "n": 0}, {"lr": 0.1, "n": 0}) == ({"lr": 0.01, "n": 3}, {})


def test_what_the_user_writes_now_takes_effect() -> None:
    result, changes = merged({"lr": 0.01, "wd": 0.0}, {"lr": 0.1, "wd": 0.0}, {"lr": 0.2, "wd": 0.0})
    assert result == {"lr": 0.2, "wd": 0.0}
    assert changes == {"o.lr": (0.1, 0.2)}


def test_a_setting_that_only_one_side_knows_is_kept() -> None:
    assert merged({"old": 1, "a": 2}, {"a": 2}, {"a": 2, "new": 3}) == ({"old": 1, "a": 2, "new": 3}, {})


def test_without_a_record_of_construction_the_checkpoint_wins() -> None:
    assert merged({"lr": 0.01}, None, {"lr": 0.1}) == ({"lr": 0.01}, {})


def test_a_changed_setting_inside_a_list_of_objects_leaves_the_counters_beside_it() -> None:
    """SequentialLR keeps its schedulers' states in a list: a new gamma must not reset the count of steps."""
    then = {"_schedulers": [{"last_epoch": 0, "gamma": 0.9}, {"last_epoch": 0, "gamma": 0.5}]}
    today = {"_schedulers": [{"last_epoch": 0, "gamma": 0.8}, {"last_epoch": 0, "gamma": 0.5}]}
    current = {"_schedulers": [{"last_epoch": 7, "gamma": 0.9}, {"last_epoch": 2, "gamma": 0.5}]}
    result, changes = merged(current, then, today)
    assert result == {"_schedulers": [{"last_epoch": 7, "gamma": 0.8}, {"last_epoch": 2, "gamma": 0.5}]}
    assert list(changes.values()) == [(0.9, 0.8)]


def test_values_of_another_kind_are_replaced_whole() -> None:
    """An infinity is an object in JSON, a finite number is not; neither may be mixed with the other."""
    infinite = encode(math.inf, "x", {})
    assert merged(0.25, infinite, infinite) == (0.25, {})
    pair, infinity = encode((1, 2), "x", {}), encode(math.inf, "x", {})
    result, changes = merged(pair, pair, infinity)
    assert decode(result, lambda name, device: torch.empty(0)) == math.inf
    assert changes == {"o": (pair, infinity)}


# What shares memory


def test_a_tensor_under_two_names_has_one_beside_what_is_there_already() -> None:
    one, before = torch.zeros(2, 3), torch.zeros(1)
    found = {"user/x/a": before}
    json = encode_shared({"a": one, "b": [one, one.clone()]}, "user/x", found)
    assert [item["name"] for item in (json["a"], *json["b"])] == ["user/x/a~1", "user/x/a~1", "user/x/b/1"]
    assert set(found) == {"user/x/a", "user/x/a~1", "user/x/b/1"}
    assert found["user/x/a"] is before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda t: t[:2], lambda t: t[1:]),
        (lambda t: t, lambda t: t[1:3]),
        (lambda t: t, lambda t: t.view(3, 2)),
        (lambda t: t, lambda t: t[::2]),
        (lambda t: t[:1].expand(4), lambda t: t),
    ],
)
def test_views_of_a_part_are_found(one: Any, other: Any) -> None:
    whole = torch.zeros(6)
    for pair in ((one, other), (other, one)):
        tensors = {str(index): make(whole) for index, make in enumerate(pair)}
        with pytest.raises(UnsaveableStateError, match="share memory and are not the same tensor"):
            require_apart(tensors, {"0"})
        require_apart(tensors, ())


def test_views_that_have_no_element_in_common_are_none() -> None:
    whole, other = torch.zeros(6), torch.zeros(6)
    views = {"a": whole[:3], "b": whole[3:4], "c": whole[4:], "d": other, "e": other[:0], "f": torch.zeros(2, 2).T}
    require_apart(views, views)
    columns = torch.zeros(3, 2)
    require_apart({"a": columns[:, 0], "b": columns[:, 1]}, {"a", "b"})


def test_a_span_that_ends_in_another_is_found_beyond_its_neighbours() -> None:
    whole = torch.zeros(9)
    with pytest.raises(UnsaveableStateError, match=r"^a and d"):
        require_apart({"a": whole[:8], "b": torch.zeros(1), "d": whole[6:]}, {"d"})


def test_what_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UnsaveableStateError, match=r"user/x holds itself.*load_state_dict"):
        encode(value, "user/x", {})
