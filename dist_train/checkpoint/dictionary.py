"""The dictionary that people save with `torch.save` at an epoch's end, made of a checkpoint.

    epoch, global_step, model_state_dict, optimizer_state_dict, scheduler_state_dict, scaler_state_dict,
    train_loss, the metrics by name, best_<monitor>

Invariant: what `load_state_dict` of plain torch objects takes: names without ours, parameters of an optimizer by
their place, and no type that `torch.load(weights_only=True)` refuses. Reads and writes no file itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dist_train.checkpoint.manifest import IMPORTED, Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.weight_files import model_tensors
from dist_train.errors import ConfigError
from dist_train.tree import decode

Json = Any
MODEL_KEY = "model_state_dict"
OPTIMIZER_KEY = "optimizer_state_dict"
SCHEDULER_KEY = "scheduler_state_dict"
SCALER_KEY = "scaler_state_dict"


def build_dictionary(manifest: Manifest, reader: CheckpointReader, *, weights_only: bool) -> dict[str, Any]:
    """Tensors are mapped from the files where they can be; several models or optimizers are dictionaries by name."""
    progress = manifest.progress
    best = {f"best_{manifest.best.monitor}": manifest.best.value} if manifest.best else {}
    loss = {} if manifest.train_loss is None else {"train_loss": manifest.train_loss}
    told: dict[str, Any] = {
        **manifest.metrics,
        **best,
        **loss,
        "epoch": progress.epochs_completed - 1,
        "global_step": progress.global_step,
        **_decode(manifest.settings.get(IMPORTED, {}), reader),  # not trained since: what its source said still holds
        MODEL_KEY: _only(_model_states(manifest, reader)),
    }
    if weights_only:
        return told
    optimizers = {name: _optimizer_state(json, reader) for name, json in places_of(manifest, "optimizer").items()}
    schedulers = {name: _decode(json, reader) for name, json in places_of(manifest, "scheduler").items()}
    parts = {OPTIMIZER_KEY: optimizers, SCHEDULER_KEY: schedulers}
    told.update({key: _only(states) for key, states in parts.items() if states})
    # Empty without mixed precision, as a GradScaler that is not enabled has it: scripts of that age read the key.
    told[SCALER_KEY] = _decode(manifest.state.get("scaler", {}), reader)
    return told


def places_of(manifest: Manifest, kind: str) -> dict[str, Json]:
    """Name -> state of the optimizers or schedulers; "" is an only one."""
    return {
        place.removeprefix(kind).removeprefix("/"): json
        for place, json in manifest.state.items()
        if place == kind or place.startswith(f"{kind}/")
    }


def list_left_out(manifest: Manifest) -> list[str]:
    """What the dictionary has no place for, for people."""
    if "dcp" in manifest.state:
        return ["all that was saved beside the model"]
    registered = [place.removeprefix("user/") for place in manifest.state if place.startswith("user/")]
    told = [f"the registered {', '.join(registered)}"] if registered else []
    return [*told, "the state of the random generators"] if "rng" not in manifest.absent else told


def _only(states: dict[str, Any]) -> Any:
    return states[""] if list(states) == [""] else states


def _model_states(manifest: Manifest, reader: CheckpointReader) -> dict[str, dict[str, Any]]:
    seen: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, Any]] = {}
    for name, keys in model_tensors(manifest).items():
        states[name] = {}
        for key, full in keys.items():
            stored = manifest.aliases.get(full, full)
            states[name][key] = seen.setdefault(stored, reader.view(stored))  # tied stays tied
        place = f"model/{name}" if name else "model"
        states[name].update(_decode(manifest.state.get(f"{place}/~extra", {}), reader))
    return states


def _optimizer_state(json: Json, reader: CheckpointReader) -> dict[str, Any]:
    """torch's own form: parameters are numbered through all groups."""
    if apart := json.get("apart"):
        name = next(iter(apart))
        raise ConfigError(
            f"The optimizer kept plain values of each rank for its own part of {name} (and {len(apart) - 1} other "
            f"parameters), which no single dictionary can hold. Export the weights alone."
        )
    numbers: dict[str, int] = {}
    groups = []
    for group in json["groups"]:
        first = len(numbers)
        numbers.update({name: first + place for place, name in enumerate(group["params"])})
        groups.append({**_decode(group["settings"], reader), "params": list(range(first, len(numbers)))})
    state: dict[Any, Any] = {numbers[name]: _decode(one, reader) for name, one in json["state"].items()}
    state.update(_decode(json["loose"], reader))
    return {**_decode(json.get("told", {}), reader), "state": state, "param_groups": groups}


def _decode(json: Json, reader: CheckpointReader) -> Any:
    return _plain(decode(json, lambda name, device: reader.view(name)))


def _plain(value: Any) -> Any:
    """Without numpy, which `weights_only` refuses."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_plain(inner) for inner in value)
    return value
