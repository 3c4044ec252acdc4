"""What a run directory and its checkpoints hold, as plain JSON values: the facts behind the command line.

Invariant: reads only, and of the data files at most the headers; needs neither torch nor the model. How facts are shown
to people is the command line's business.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dist_train.checkpoint.catalog import Found, committed, find_abandoned, read_checkpoint
from dist_train.checkpoint.manifest import (
    CHECKPOINTS,
    CORRUPT_PREFIX,
    EVENTS_LOG,
    RUN_FILE,
    SAVING_PREFIX,
    STATUS_FILE,
    TRASH_PREFIX,
    WARM_START,
    Manifest,
    TensorEntry,
    parse_step_name,
)
from dist_train.checkpoint.ownership import Owner, newest_attempt, read_owner
from dist_train.checkpoint.pins import is_pinned, read_pins
from dist_train.checkpoint.selection import best_path, better_elsewhere, find_checkpoints, newest_path
from dist_train.checkpoint.store import Store
from dist_train.errors import CheckpointError

Json = Any
_BLOCK = 4096
_MAX_HEADER_BYTES = 100_000_000
_SHARD = re.compile(r"(?P<group>\w+)-(?P<rank>\d{5,})-of-\d{5,}\.safetensors\Z")
_ASIDE = re.compile(rf"{re.escape(CORRUPT_PREFIX)}a(?P<attempt>\d+)-(?P<name>.+)\Z")


# One line of the list


def list_rows(store: Store) -> list[dict[str, Json]]:
    """Every checkpoint of the run, oldest first, those that cannot be used with their `problem`."""
    found = find_checkpoints(store)
    latest, best, pins = newest_path(found), best_path(found), read_pins(store)
    marks = [{"latest": one.path == latest, "best": one.path == best} for one in found]
    rows = [{**_row(store, one, pins), **mark} for one, mark in zip(found, marks, strict=True)]
    if better_elsewhere(found):
        rows = [{**row, "best_here": row["best"]} for row in rows]
    aside = [name for name in store.list(CHECKPOINTS) if name.startswith(CORRUPT_PREFIX)]
    reasons = _reasons(store, aside)
    for name in aside:
        one = read_checkpoint(store, f"{CHECKPOINTS}/{name}")
        rows.append({**_row(store, one, pins), "latest": False, "best": False, "problem": reasons[name]})
    return sorted(rows, key=lambda row: -1 if row["sequence"] is None else row["sequence"])


def abandoned_row(store: Store, one: Found) -> dict[str, Json]:
    """A checkpoint that a branch has left behind."""
    return {**_row(store, one, read_pins(store)), "latest": False, "best": False, "abandoned": True}


def _row(store: Store, one: Found, pins: frozenset[str]) -> dict[str, Json]:
    manifest = one.manifest
    name = os.path.basename(one.path)
    aside = _ASIDE.match(name)
    row = {
        "step": parse_step_name(aside["name"] if aside else name),
        "epochs_completed": manifest.progress.epochs_completed if manifest else None,
        "sequence": manifest.sequence if manifest else None,
        "bytes": manifest.num_bytes if manifest else store.tree_bytes(one.path),
        "metrics": dict(manifest.metrics) if manifest else {},
        "monitor": manifest.best.monitor if manifest and manifest.best else None,
        "train_loss": manifest.train_loss if manifest else None,
        "committed_at": manifest.committed_at if manifest else None,
        "path": store.shown(one.path),
        "pinned": is_pinned(manifest, pins),
        "weights_only": manifest is not None and "optimizer" in manifest.absent,
    }
    return row if one.problem is None else {**row, "problem": problem_text(one.problem)}


def problem_text(problem: CheckpointError) -> str:
    """What is wrong, without the path that the message begins with."""
    return str(problem).removeprefix(f"{problem.path}: ")


def _reasons(store: Store, aside: list[str]) -> dict[str, str]:
    """Why folders were set aside, as run.jsonl tells it."""
    reasons = {name: f"set aside by attempt {_attempt_of(name)}, which could not use it" for name in aside}
    lines = store.read(EVENTS_LOG).splitlines() if aside and store.exists(EVENTS_LOG) else []
    for line in lines:
        if b'"skipped_checkpoint"' not in line:
            continue
        problem = str(_parse(line).get("problem", ""))
        before, separator, kept = problem.partition(" It is kept as ")
        name = kept.rstrip(".").rpartition("/")[2]
        if separator and name in reasons:
            path, _, why = before.partition(" cannot be used: ")
            why = why.removeprefix(f"{path}: ").rstrip(".")
            reasons[name] = f"set aside by attempt {_attempt_of(name)}: {why or before}"
    return reasons


def _attempt_of(name: str) -> str:
    match = _ASIDE.match(name)
    return str(int(match["attempt"])) if match else "?"


def find_leftovers(store: Store) -> dict[str, dict[str, int]]:
    """Folders that are no checkpoints of the run any more or not yet: how many and how large."""
    kinds = {SAVING_PREFIX: "saving", TRASH_PREFIX: "trash"}
    places: dict[str, list[str]] = {kind: [] for kind in ("saving", "trash", "abandoned")}
    for name in store.list(CHECKPOINTS):
        for prefix, kind in kinds.items():
            if name.startswith(prefix):
                places[kind].append(f"{CHECKPOINTS}/{name}")
    places["abandoned"] = find_abandoned(store)
    return {
        kind: {"count": len(paths), "bytes": sum(map(store.tree_bytes, paths))}
        for kind, paths in places.items()
        if paths
    }


# All about a run and one checkpoint


def describe_run(store: Store) -> dict[str, Json]:
    """Who it is, how it stands, what it holds."""
    found = find_checkpoints(store)
    identity = _read_json(store, RUN_FILE)
    owner = read_owner(store)
    newest, best, elsewhere = newest_path(found), best_path(found), better_elsewhere(found)
    return {
        "run_dir": store.given,
        "run_id": identity.get("run_id"),
        "created": identity.get("created"),
        "status": _status_now(store, found, owner),
        "owner": None if owner is None else {"hostname": owner.hostname, "pid": owner.pid, "released": owner.released},
        "attempts": newest_attempt(store),
        "checkpoints": len(committed(found)),
        "unusable": len(found) - len(committed(found)),
        "newest": store.shown(newest) if newest else None,
        "best": store.shown(best) if best else None,
        "better_elsewhere": None if elsewhere is None else asdict(elsewhere),
        "leftovers": find_leftovers(store),
    }


def _status_now(store: Store, found: list[Found], owner: Owner | None) -> dict[str, Json] | None:
    """status.json is written at both ends of an attempt: in between the newest checkpoint knows more, and a killed
    attempt leaves "running" behind.
    """
    status = _read_json(store, STATUS_FILE)
    if not status or status.get("status") != "running":
        return status or None
    if owner is not None and owner.is_known_to_be_gone():
        status = {**status, "status": "killed"}
    usable = committed(found)
    if usable and usable[-1][1].progress.global_step > status.get("global_step", 0):
        progress = usable[-1][1].progress
        status |= {"global_step": progress.global_step, "epochs_completed": progress.epochs_completed}
    return status


def describe_checkpoint(store: Store, path: str, manifest: Manifest) -> dict[str, Json]:
    """Everything a manifest says but the state itself, and what follows from it."""
    config = manifest.settings.get("config", {})
    best = manifest.best
    return {
        "path": store.shown(path),
        "run_id": manifest.run_id,
        "sequence": manifest.sequence,
        "attempt": manifest.attempt,
        "digest": manifest.digest,
        "parent": manifest.parent,
        "committed_at": manifest.committed_at,
        "reason": manifest.reason,
        "progress": {name: getattr(manifest.progress, name) for name in manifest.progress.__slots__},
        "train_loss": manifest.train_loss,
        "metrics": dict(manifest.metrics),
        "best": None if best is None else {name: getattr(best, name) for name in best.__slots__},
        "learning_rates": _learning_rates(manifest),
        "pinned": is_pinned(manifest, read_pins(store)),
        "weights_only": "optimizer" in manifest.absent,
        "absent": manifest.absent,
        "stripped_from": manifest.stripped_from,
        "warm_start": manifest.settings.get(WARM_START),
        "exclude": manifest.settings.get("exclude"),
        "policy": config.get("policy"),
        "data": config.get("data"),
        "config": config.get("user"),
        "world_size": manifest.world_size,
        "environment": manifest.environment,
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
        "groups": _groups(manifest),
        "aliases": manifest.aliases,
        "bytes": manifest.num_bytes,
        "image_bytes_by_rank": _image_bytes(manifest),
    }


def _learning_rates(manifest: Manifest) -> list[dict[str, Json]]:
    """Of every parameter group, at construction and in the checkpoint; None where it is held in a tensor."""
    rates = []
    for place, state in manifest.state.items():
        if place.partition("/")[0] != "optimizer":
            continue
        then = manifest.settings.get(place, [])
        for index, group in enumerate(state["groups"]):
            first = then[index].get("lr") if index < len(then) else None
            rate = group["settings"].get("lr")
            rates.append({"optimizer": place, "group": index, "at_construction": _plain(first), "now": _plain(rate)})
    return rates


def _plain(value: Json) -> Json:
    return value if isinstance(value, (int, float)) else None


def _groups(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Files, tensors, elements and data bytes of the model, the optimizer and the rest."""
    groups = {group: Counter[str]() for group in ("model", "optimizer", "state")}
    for name in manifest.files:
        match = _SHARD.match(name)
        if match and match["group"] in groups:
            groups[match["group"]].update(files=1, file_bytes=manifest.files[name].size)
    for name, entry in manifest.tensors.items():
        head = name.partition("/")[0]
        numel = _numel(entry)
        counts = groups[head if head in ("model", "optimizer") else "state"]
        counts.update(tensors=1, elements=numel, bytes=numel * itemsize(entry.dtype))
    keys = ("files", "file_bytes", "tensors", "elements", "bytes")
    return {group: {key: counts[key] for key in keys} for group, counts in groups.items()}


def _image_bytes(manifest: Manifest) -> list[int]:
    """Host memory that one save occupies on each rank: its files, each from a page boundary on."""
    sizes = [0] * manifest.world_size
    for name, entry in manifest.files.items():
        match = _SHARD.match(name)
        if match and int(match["rank"]) <= len(sizes):
            sizes[int(match["rank"]) - 1] += -(-entry.size // _BLOCK) * _BLOCK
    return [max(size, _BLOCK) for size in sizes]


def _numel(entry: TensorEntry) -> int:
    product = 1
    for size in entry.shape:
        product *= size
    return product


def itemsize(dtype: str) -> int:
    """Bytes of one element, from safetensors' name of its type: BF16, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


# Inside a data file


def tensors_between(store: Store, found: Found, name: str, start: int, stop: int) -> list[str] | None:
    """Names of the tensors with bytes in [start, stop) of a data file; None where its header is not to be trusted."""
    group = name.partition("-")[0]
    try:
        with open(store.path(f"{found.path}/{name}"), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                return None
            header = json.loads(file.read(length))
        parts = json.loads(header.pop("__metadata__", {}).get("dist_train.parts", "{}"))
        touched = []
        for key, entry in header.items():
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            if first < stop and start < last:
                full = key if group == "state" else f"{group}/{key}"
                touched.append(parts[key]["name"] if key in parts else full)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = found.manifest.tensors if found.manifest else {}
    return touched if all(one in known for one in touched) else None


def _read_json(store: Store, path: str) -> dict[str, Json]:
    return _parse(store.read(path)) if store.exists(path) else {}


def _parse(text: bytes) -> dict[str, Json]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return dict(value) if isinstance(value, Mapping) else {}
