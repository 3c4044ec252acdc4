"""Nested Python values <-> JSON and named tensors, without pickle.

Invariant: `decode(encode(value)) == value` for everything that `encode` accepts; what it does not accept is refused
with the name of the object and the place inside it. It knows nothing of models, files or ranks.
"""

from __future__ import annotations

import base64
import json as json_module
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from dist_train.errors import UnsaveableStateError
from dist_train.tagged import TEXT_TAGS, from_text, make_mapping, mapping_kind, text_of, way_out
from dist_train.tied import find_overlap, storage_key

Json = Any
_TAG = "$"


def encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Json:
    """JSON of a nested value; tensors are put, uncopied, into `tensors` under the place where they were found.

    Args:
        value: None, bool, int, float, str, bytes, tensor, numpy array or scalar, dtype, device, what `tagged` knows of
            the standard library, and dict, list, tuple, set or deque of these.
        place: name of the value, for instance `user/ema`; used for tensors and in errors.

    Raises:
        UnsaveableStateError: names the place and the type that cannot be saved.
    """
    try:
        return _encode(value, place, tensors)
    except RecursionError:
        raise UnsaveableStateError(
            f"{place} holds itself, or is nested deeper than a checkpoint can hold. Leave what points back out of that "
            f"object's state_dict(), and set it again in load_state_dict()."
        ) from None


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Json:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if isinstance(value, torch.Tensor):
        return {_TAG: "tensor", "name": _keep(value.detach(), place, tensors), "device": value.device.type}
    if isinstance(value, Mapping):
        return _encode_mapping(value, place, tensors)
    if isinstance(value, (list, tuple, set, frozenset, deque)) and not hasattr(value, "_fields"):
        return _encode_sequence(value, place, tensors)
    return _encode_other(value, place, tensors)


def _encode_mapping(value: Mapping[Any, Any], place: str, tensors: dict[str, torch.Tensor]) -> Json:
    kind = mapping_kind(value)
    if kind is None:
        raise _refusal(value, place)
    if not kind and all(type(key) is str for key in value) and _TAG not in value:
        return {key: _encode(inner, f"{place}/{key}", tensors) for key, inner in value.items()}
    keys = [_encode(key, f"{place} (a key)", tensors) for key in value]
    values = [_encode(inner, f"{place}/{key}", tensors) for key, inner in value.items()]
    return {_TAG: "dict", **kind, "items": [list(pair) for pair in zip(keys, values, strict=True)]}


def _encode_sequence(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Json:
    members = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
    items = [_encode(inner, f"{place}/{index}", tensors) for index, inner in enumerate(members)]
    if isinstance(value, list):
        return items
    if isinstance(value, deque):
        return {_TAG: "deque", "maxlen": value.maxlen, "items": items}
    kind = next(kind for kind in (tuple, set, frozenset) if isinstance(value, kind))
    return {_TAG: kind.__name__, "items": items}


def _encode_other(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Json:
    if isinstance(value, (bytes, bytearray)):
        return {_TAG: "bytes" if isinstance(value, bytes) else "bytearray", "value": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and _is_plain(value):
        data = np.require(value, requirements=["C", "W"]).reshape(-1).view(np.uint8)
        name = _keep(torch.from_numpy(data), place, tensors)
        return {_TAG: "ndarray", "name": name, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic) and _is_plain(value):
        return {_TAG: "scalar", "dtype": value.dtype.str, "value": base64.b64encode(value.tobytes()).decode()}
    if isinstance(value, (torch.dtype, torch.device)):
        return {_TAG: type(value).__name__, "value": str(value).removeprefix("torch.")}
    if isinstance(value, (int, float)):  # subclasses, for instance an IntEnum: their value is what matters
        return _encode(int(value) if isinstance(value, int) else float(value), place, tensors)
    if told := text_of(value):
        return {_TAG: told[0], "value": told[1]}
    raise _refusal(value, place)


def _refusal(value: Any, place: str) -> UnsaveableStateError:
    return UnsaveableStateError(
        f"{place} holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved: a checkpoint "
        f"holds tensors and plain values (numbers, strings, bytes, arrays; dict, list, tuple, set of these), never "
        f"pickles. {way_out(value)}"
    )


def _keep(tensor: torch.Tensor, place: str, tensors: dict[str, torch.Tensor]) -> str:
    """The name under which a tensor is put: its place, numbered where another place reads alike (`a/b` and `a` /
    `b`).
    """
    name, copy = place, 1
    while name in tensors:
        name, copy = f"{place}~{copy}", copy + 1
    tensors[name] = tensor
    return name


def _is_plain(value: np.ndarray | np.generic) -> bool:
    """Whether the bytes, with `dtype.str`, are all there is to it (no objects, records or masks)."""
    return value.dtype.kind not in "OV" and not isinstance(value, np.ma.MaskedArray)


def decode(json: Json, load: Callable[[str, str], torch.Tensor]) -> Any:
    """The value that `encode` was given; `load(name, device_type)` returns a tensor."""
    if isinstance(json, list):
        return [decode(item, load) for item in json]
    if not isinstance(json, dict):
        return json
    if _TAG not in json:
        return {key: decode(value, load) for key, value in json.items()}
    if json[_TAG] in TEXT_TAGS:
        return from_text(json[_TAG], json["value"])
    return _DECODERS[json[_TAG]](json, load)


def _decode_bytes(json: Json, load: Callable[[str, str], torch.Tensor]) -> bytes:
    """Many of them may lie in a tensor; see `dcp_keys.take_out_bytes`."""
    return load(json["name"], "cpu").numpy().tobytes() if "name" in json else base64.b64decode(json["value"])


def _decode_array(json: Json, load: Callable[[str, str], torch.Tensor]) -> np.ndarray:
    data = load(json["name"], "cpu").numpy().tobytes()
    return np.frombuffer(data, dtype=np.dtype(json["dtype"])).reshape(json["shape"]).copy()


_DECODERS: dict[str, Callable[[Json, Callable[[str, str], torch.Tensor]], Any]] = {
    "float": lambda json, load: float(json["value"]),
    "tensor": lambda json, load: load(json["name"], json["device"]),
    "ndarray": _decode_array,
    "dict": lambda json, load: make_mapping(
        json, {decode(key, load): decode(value, load) for key, value in json["items"]}
    ),
    "deque": lambda json, load: deque((decode(item, load) for item in json["items"]), json["maxlen"]),
    "tuple": lambda json, load: tuple(decode(item, load) for item in json["items"]),
    "set": lambda json, load: {decode(item, load) for item in json["items"]},
    "frozenset": lambda json, load: frozenset(decode(item, load) for item in json["items"]),
    "bytes": lambda json, load: _decode_bytes(json, load),
    "bytearray": lambda json, load: bytearray(_decode_bytes(json, load)),
    "scalar": lambda json, load: np.frombuffer(base64.b64decode(json["value"]), dtype=np.dtype(json["dtype"]))[0],
    "dtype": lambda json, load: getattr(torch, json["value"]),
    "device": lambda json, load: torch.device(json["value"]),
}


def tensor_names(json: Json) -> list[str]:
    """Names of the tensors in what `encode` made of a value."""
    if isinstance(json, list):
        return [name for item in json for name in tensor_names(item)]
    if not isinstance(json, dict):
        return []
    own = [json["name"]] if json.get(_TAG) == "tensor" else []
    return own + [name for value in json.values() for name in tensor_names(value)]


def rename_tensors(json: Json, names: Mapping[str, str]) -> Json:
    """What `encode` made of a value, with other names for some of its tensors."""
    if isinstance(json, list):
        return [rename_tensors(item, names) for item in json]
    if not isinstance(json, dict):
        return json
    if json.get(_TAG) in ("tensor", "ndarray"):
        return {**json, "name": names.get(json["name"], json["name"])}
    return {key: rename_tensors(value, names) for key, value in json.items()}


def share(json: Json, mine: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> Json:
    """Adds the tensors of what `encode` made of a value; one whose memory is that of a tensor kept before is told by
    the name of that.
    """
    first = {storage_key(tensor): name for name, tensor in reversed(tensors.items())}
    renamed: dict[str, str] = {}
    for name, tensor in mine.items():
        if (earlier := first.setdefault(storage_key(tensor), name)) != name:
            renamed[name] = earlier
        else:
            tensors[name] = tensor
    return rename_tensors(json, renamed) if renamed else json


def require_apart(tensors: Mapping[str, torch.Tensor], new: Collection[str]) -> None:
    """Raises UnsaveableStateError for one of the `new` tensors that is a view of a part of another tensor, or the other
    way round.
    """
    if overlap := find_overlap(tensors, new):
        raise UnsaveableStateError(
            f"{overlap[0]} and {overlap[1]} share memory and are not the same tensor (one is a view of a part of the "
            f"other): a restart would make two of them, and what is written to one would be missing in the other. Keep "
            f"one of them in the state, and make the view of it where it is used."
        )


def encode_shared(value: Any, place: str, tensors: dict[str, torch.Tensor], *, in_place: bool = False) -> Json:
    """As `encode`; a tensor that the value holds twice has one name, and is one again where that name is loaded once.

    Args:
        in_place: the tensors will be filled where they lie, so that what they share they share again.

    Raises:
        UnsaveableStateError: see `encode`; or one is a view of a part of another one.
    """
    known = set(tensors)
    json = encode(value, place, tensors)
    mine = {name: tensors.pop(name) for name in list(tensors) if name not in known}
    found: dict[str, torch.Tensor] = {}
    json = share(json, mine, found)
    if not in_place:
        require_apart(found, found)
    tensors |= found
    return json


def holds_only(value: Any, is_leaf: Callable[[Any], bool]) -> bool:
    """Whether a value is made of such leaves and of dict, list, tuple, set and their kin."""
    if type(value) in (dict, OrderedDict, defaultdict, Counter):
        return all(holds_only(inner, is_leaf) for pair in value.items() for inner in pair)
    if type(value) in (list, tuple, set, frozenset, deque):
        return all(holds_only(inner, is_leaf) for inner in value)
    return is_leaf(value)


def shown(json: Json) -> Json:
    """What `encode` made of a value, as plain JSON for people: without tags, keys as text."""
    if isinstance(json, list):
        return [shown(item) for item in json]
    if not isinstance(json, dict):
        return json
    kind = json.get(_TAG)
    if kind is None:
        return {key: shown(value) for key, value in json.items()}
    if kind == "dict":
        return {str(shown(key)): shown(value) for key, value in json["items"]}
    return shown(json["items"]) if "items" in json else json.get("value", kind)


def merge_settings(current: Json, then: Json, today: Json, place: str, changes: dict[str, tuple[Json, Json]]) -> Json:
    """What the user writes now takes effect; what the run had decayed is restored.

    Args:
        current: the values in the checkpoint.
        then: the same values when that run's objects were constructed.
        today: the same values in the objects that were constructed now.
        changes: receives `place -> (then, today)` for every setting that the user changed.

    Returns:
        `current` where `then` equals `today`; `today` where they differ.
    """
    if isinstance(current, dict) and isinstance(today, dict) and current.get(_TAG) == today.get(_TAG):
        before = then if isinstance(then, dict) else {}
        merged = {
            key: merge_settings(current[key], before.get(key, today[key]), today[key], f"{place}.{key}", changes)
            for key in today
            if key in current
        }
        return {**current, **{key: today[key] for key in today if key not in current}, **merged}
    if _are_objects(current) and _are_objects(today) and len(current) == len(today):
        before = then if _are_objects(then) and len(then) == len(today) else today
        return [
            merge_settings(*values, f"{place}.{index}", changes)
            for index, values in enumerate(zip(current, before, today, strict=True))
        ]
    if then == today:
        return current
    changes[place] = (then, today)
    return today


def _are_objects(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def encode_whole(value: Any, place: str) -> Json:
    """JSON that holds its tensors, too, for small values that are no part of any file; see `decode_whole`.

    Raises:
        UnsaveableStateError: see `encode`.
    """
    tensors: dict[str, torch.Tensor] = {}
    json = encode_shared(value, place, tensors)
    return {"value": json, "tensors": {name: _whole_tensor(tensor) for name, tensor in tensors.items()}}


def _whole_tensor(tensor: torch.Tensor) -> Json:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": shape, "bytes": base64.b64encode(flat.numpy().tobytes()).decode()}


def decode_whole(json: Json, here: torch.device | None = None) -> Any:
    """The value that `encode_whole` was given; tensors come back on the CPU, or `here` if they lay on such a device."""
    made: dict[str, torch.Tensor] = {}

    def load(name: str, device: str) -> torch.Tensor:
        if name not in made:
            where = here if here is not None and here.type == device else "cpu"
            made[name] = _tensor_of(json["tensors"][name]).to(where)
        return made[name]

    return decode(json["value"], load)


def pack(value: Any, place: str) -> torch.Tensor:
    """A value with its tensors as bytes: of such a tensor each rank may have its own, of its own length."""
    text = json_module.dumps(encode_whole(value, place), allow_nan=False, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack(packed: torch.Tensor, here: torch.device | None = None) -> Any:
    """What `pack` was given; see `decode_whole`."""
    return decode_whole(json_module.loads(packed.numpy().tobytes()), here)


def _tensor_of(json: Json) -> torch.Tensor:
    data = bytearray(base64.b64decode(json["bytes"]))
    dtype: torch.dtype = getattr(torch, json["dtype"])
    flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(json["shape"])
