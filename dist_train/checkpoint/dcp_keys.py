"""The keys of torch.distributed.checkpoint <-> the names and values of a checkpoint of format 1.

    key "model.a.weight"  <->  tensor "model/a.weight" in a file of the group `model`      (so with `optimizer.`)
    key "epoch"           <->  tensor "epoch" of the group `state`, or a nested value in the manifest's `state`

Invariant: `key_of(name_of(key)) == key` for every key. A checkpoint that a run saved offers what it holds under the
keys that torch's own `get_state_dict` and planners give the same objects. Reads no file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_train.checkpoint.manifest import Manifest
from dist_train.tree import decode

Json = Any
STATE = "dcp"
"""Key of the manifest's `state` under which stands what torch's planners need."""
_FOLDED = ("model", "optimizer")
_ESCAPED = (*_FOLDED, STATE)
_WITH_TENSOR = ("tensor", "ndarray", "bytes", "bytearray")
_MANY_CHARACTERS = 1 << 16
"""Of base64: more would make the manifest, which every rank reads, slow to read."""
_HEADER_KEY = "__metadata__"
"""safetensors takes it for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """All that a rank had of a tensor, when it saved without the others: stored as a tensor of its own."""

    key: str
    offsets: list[int]
    size: list[int]
    """Of the whole tensor."""


@dataclass(slots=True, kw_only=True)
class Offer:
    """What a checkpoint has for torch's planners."""

    tensors: dict[str, str] = field(default_factory=dict)
    """Key -> name of the stored tensor."""
    values: dict[str, Json] = field(default_factory=dict)
    """Key -> nested value."""
    planner_data: Any = None
    fragments: dict[str, Fragment] = field(default_factory=dict)
    """Name of the stored tensor -> what it is."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Key -> dtype that the planner declared, where it handed over another one."""


def name_of(key: str) -> str:
    """The name under which a tensor is stored."""
    head, _, rest = key.partition(".")
    if head in _FOLDED and rest not in ("", _HEADER_KEY):
        return f"{head}/{rest}"
    return f"{STATE}/{key}" if key == _HEADER_KEY or head.partition("/")[0] in _ESCAPED else key


def key_of(name: str) -> str:
    """The key of a tensor that was stored under a name."""
    head, slash, rest = name.partition("/")
    if not slash or head not in _ESCAPED:
        return name
    return rest if head == STATE else f"{head}.{rest}"


def place_of_value(key: str) -> str:
    """Where the tensors inside a nested value are stored."""
    return f"{STATE}/~values/{key}"


def name_of_fragment(key: str, offsets: Iterable[int]) -> str:
    return f"{STATE}/~fragments/{key}@{','.join(map(str, offsets))}"


def offer_of(manifest: Manifest) -> Offer:
    """What dcp can load from a checkpoint, whoever wrote it."""
    return _offer_of_dcp(manifest) if STATE in manifest.state else _offer_of_run(manifest)


def _offer_of_dcp(manifest: Manifest) -> Offer:
    kept = manifest.state[STATE]
    fragments = {name: Fragment(**one) for name, one in kept["fragments"].items()}
    inner = {name for json in kept["values"].values() for name in tensors_inside(json)}
    names = [name for name in manifest.tensors if name not in inner]
    return Offer(
        tensors={fragments[name].key if name in fragments else key_of(name): name for name in names},
        values=kept["values"],
        planner_data=decode(kept["planner_data"], _no_tensor),
        fragments=fragments,
        dtypes=kept["dtypes"],
    )


def _no_tensor(name: str, device: str) -> Any:
    raise AssertionError(f"planner_data refers to the tensor {name}")


def tensors_inside(json: Json) -> Iterator[str]:
    """Names of the tensors and arrays inside a nested value."""
    if isinstance(json, Mapping):
        if json.get("$") in _WITH_TENSOR and "name" in json:
            yield json["name"]
        for inner in json.values():
            yield from tensors_inside(inner)
    elif isinstance(json, list):
        for inner in json:
            yield from tensors_inside(inner)


def take_out_bytes(json: Json, place: str, tensors: dict[str, torch.Tensor]) -> Json:
    """What `encode` made of a value, its long `bytes` put into `tensors` under names below the place."""
    if isinstance(json, list):
        return [take_out_bytes(inner, place, tensors) for inner in json]
    if not isinstance(json, dict):
        return json
    if json.get("$") not in ("bytes", "bytearray"):
        return {key: take_out_bytes(inner, place, tensors) for key, inner in json.items()}
    if len(json["value"]) < _MANY_CHARACTERS:
        return json
    name = f"{place}/~bytes-{len(tensors)}"
    while name in tensors:
        name += "~"
    tensors[name] = torch.frombuffer(bytearray(base64.b64decode(json["value"])), dtype=torch.uint8)
    return {"$": json["$"], "name": name}


def _offer_of_run(manifest: Manifest) -> Offer:
    """The state of the run's objects, flattened as torch's planners flatten a dictionary of dictionaries."""
    offer = Offer(planner_data={})
    for place, json in manifest.state.items():
        kind, _, name = place.partition("/")
        path = (kind, name) if name else (kind,)
        if place != "generators" and not place.endswith(("/~extra", "/~buffers")):
            _flatten(path, _in_torch_form(json) if kind == "optimizer" else json, offer)
    inner = {name for json in manifest.state.values() for name in tensors_inside(json)}
    for name in [*manifest.tensors, *manifest.aliases]:
        if name not in inner:
            _put(tuple(name.split("/")), name, offer.tensors, offer)
    return offer


def _in_torch_form(json: Json) -> Json:
    """As `torch.distributed.checkpoint.state_dict` has an optimizer's state: parameters by name."""
    groups = [{**group["settings"], "params": group["params"]} for group in json["groups"]]
    return {"state": json["state"], "param_groups": groups}


def _flatten(path: tuple[str | int, ...], json: Json, offer: Offer) -> None:
    """Source: torch/distributed/checkpoint/_traverse.py, traverse_state_dict."""
    tag = json.get("$") if isinstance(json, Mapping) else None
    if tag == "tensor":
        _put(path, json["name"], offer.tensors, offer)
    elif tag == "dict":
        for key, inner in json["items"]:
            _flatten((*path, str(decode(key, _no_tensor))), inner, offer)
    elif isinstance(json, Mapping) and tag is None:
        for key, inner in json.items():
            _flatten((*path, key), inner, offer)
    elif isinstance(json, list) and not _is_leaf(json):
        for index, inner in enumerate(json):
            _flatten((*path, index), inner, offer)
    else:
        _put(path, json, offer.values, offer)


def _is_leaf(json: list[Json]) -> bool:
    """Lists are taken apart where a tensor, a dictionary or such a list is in them."""
    return not any(
        not _is_leaf(one) if isinstance(one, list) else isinstance(one, Mapping) and _is_taken_apart(one)
        for one in json
    )


def _is_taken_apart(json: Mapping[str, Json]) -> bool:
    return json.get("$") in (None, "dict", "tensor")


def _put(path: tuple[str | int, ...], value: Json, into: dict[str, Json], offer: Offer) -> None:
    key = ".".join(map(str, path))
    into[key] = value
    offer.planner_data[key] = path
