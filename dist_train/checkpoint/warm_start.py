"""The weights that a fresh run starts with: of a checkpoint of another run, or of another program's file or folder.

    text -> choice (main rank; recorded, so that a start that is killed chooses the same again) -> opened on every rank

Invariant: nothing is changed but the record; what is read was verified, and all ranks read the same. When a run starts
so, and what is loaded into what, is the beginning's business.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_train.checkpoint.boxes import boxes_of, local_part, region_of
from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.exchange import load_dictionary
from dist_train.checkpoint.foreign import ImportOptions, read_foreign
from dist_train.checkpoint.inference import files_for_inference
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, RUN_FILE, WARM_START_FILE, Manifest, digest_of
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.selection import best_or_latest, open_run, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.console import ByteMeter, tell_long_work
from dist_train.errors import CorruptCheckpointError, DistTrainError, NoCheckpointError
from dist_train.exclusion import digest
from dist_train.optimizer_state import TensorSource
from dist_train.world import World

Json = Any
_NAMED = re.compile(r"(?P<run>.+):(?P<which>latest|best|(?:epoch|step):\d+)\Z")
_FORMS = (
    "a run directory ('runs/base' takes its best checkpoint, or the latest where no metric is monitored), one of its "
    "checkpoints ('runs/base:best', 'runs/base:epoch:15', a folder), or a file or folder of weights (.safetensors, "
    ".pth, Hugging Face's)"
)

_FROM_PRETRAINED = (
    " Of some models transformers names the tensors in its files otherwise than in memory (experts, vision models), "
    "and converts them: call from_pretrained(folder) in the script then, in place of warm_start."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a fresh run starts with, opened."""

    source: TensorSource
    state: Mapping[str, Json]
    """What modules return from get_extra_state lies here."""
    settings: Mapping[str, Json]
    origin: dict[str, Json]
    """Where they are from: `requested`, `path`, `digest`; of a checkpoint also `run_id` and `global_step`."""
    notes: list[str] = field(default_factory=list)
    hint: str = ""
    """What else to do where they do not fit."""
    close: Callable[[], None] = lambda: None


def open_weights(text: str, store: Store, world: World) -> Weights:
    """Collective.

    Args:
        text: as the user wrote it; see `RunOptions.warm_start`.
        store: the run directory that starts; what was chosen is recorded there.

    Raises:
        NoCheckpointError, ConfigError, StorageError: it names nothing that can be had.
        CorruptCheckpointError: its bytes are not those that were committed.
        DisagreementError: the ranks read different weights.
    """
    choice = world.on_main(lambda: _choose(text, store), f"the weights of {text}")
    opened, problem = _try(lambda: _open_checkpoint(choice, world) if choice["root"] else _open_foreign(choice))
    problems = [one for one in world.gather(problem, f"whether {choice['path']} can be read") if one]
    if problems or opened is None:
        if opened is not None:
            opened.close()
        raise CorruptCheckpointError(
            f"warm_start={text!r}: {choice['path']} cannot be used: {problems[0]}. Nothing was loaded. Choose another "
            f"checkpoint or file; without warm_start the run starts from the model as it is constructed.",
            choice["path"],
        )
    world.require_equal(opened.origin["digest"], f"weights in {choice['path']}")
    return opened


def _try(work: Callable[[], Weights]) -> tuple[Weights | None, str]:
    """What it gives, or what is wrong: all ranks must hear of it."""
    try:
        return work(), ""
    except (DistTrainError, OSError, ValueError) as error:
        return None, str(error).rstrip(".")


# The choice, on the main rank


def _choose(text: str, store: Store) -> Json:
    """`root` and `path` of a checkpoint folder (root is empty for other weights) and the manifest's `digest`."""
    before = _recorded(store, text)
    if before and before["root"] and (manifest := _still_there(before)):
        return {**before, "digest": manifest.digest}
    chosen = {"requested": text, **_select(text), "note": ""}
    if before and before["root"]:
        chosen["note"] = (
            f"This run was started before from {before['path']}, which is not there any more: it starts from "
            f"{chosen['path']} now."
        )
    store.replace(WARM_START_FILE, json.dumps(chosen).encode())
    return chosen


def _recorded(store: Store, text: str) -> Json:
    """What an earlier start of the same run chose; None where it was asked for something else."""
    try:
        record = json.loads(store.read(WARM_START_FILE))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(record, dict) and {"root", "path", "digest"} <= record.keys()
    return record if is_whole and record.get("requested") == text else None


def _still_there(record: Json) -> Manifest | None:
    store = Store(record["root"])
    manifest = read_checkpoint(store, os.path.relpath(record["path"], record["root"])).manifest
    return manifest if manifest and record["digest"] in (manifest.digest, manifest.stripped_from) else None


def _select(text: str) -> Json:
    match = None if os.path.exists(text) else _NAMED.match(text)
    place, which = (match["run"], match["which"]) if match else (text, None)
    if not os.path.exists(place):
        raise NoCheckpointError(f"warm_start={text!r}: there is no {place}. Give {_FORMS}.")
    names = set(os.listdir(place)) if os.path.isdir(place) else set()
    if MANIFEST_NAME in names:
        folder = os.path.realpath(place)
        store = Store(os.path.dirname(folder))
        found = read_checkpoint(store, os.path.basename(folder))
    elif which or names & {RUN_FILE, CHECKPOINTS}:
        run = open_run(place)
        store, found = select_checkpoint(run, which or best_or_latest(run))
    else:
        return {"root": "", "path": os.path.abspath(place), "digest": ""}
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"warm_start={text!r}: {store.path(found.path)} is no checkpoint.")
    root = os.path.realpath(store.root)
    return {"root": root, "path": os.path.join(root, found.path), "digest": found.manifest.digest}


# On every rank


def _open_checkpoint(choice: Json, world: World) -> Weights:
    store = Store(choice["root"])
    path = os.path.relpath(choice["path"], choice["root"])
    found = read_checkpoint(store, path)
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"{choice['path']} is no checkpoint.")
    manifest = found.manifest
    if manifest.digest != choice["digest"]:
        raise CorruptCheckpointError(
            f"rank {world.rank} reads manifest {manifest.digest}, the main rank {choice['digest']}", choice["path"]
        )
    share = files_for_inference(manifest)[world.rank :: world.world_size]
    name = os.path.basename(path)
    meter = ByteMeter(sum(manifest.files[one].size for one in share), name=f"verifying {name}", enabled=world.is_main)
    damages = verify_checkpoint(store, path, manifest, files=share, on_bytes=meter.add)
    tell_long_work(f"Verified {name}", meter)
    if damages:
        raise CorruptCheckpointError("; ".join(map(str, damages)), choice["path"])
    reader = CheckpointReader(store, path, manifest, rank=world.rank)
    told = {"run_id": manifest.run_id, "global_step": manifest.progress.global_step}
    return Weights(
        source=reader,
        state=manifest.state,
        settings=manifest.settings,
        origin={"requested": choice["requested"], "path": choice["path"], "digest": manifest.digest, **told},
        notes=[choice["note"]] if choice["note"] else [],
        close=reader.close,
    )


def _open_foreign(choice: Json) -> Weights:
    foreign = read_foreign(choice["path"], ImportOptions(), load_dictionary)
    weights = ForeignWeights(foreign.models)
    return Weights(
        source=weights,
        state={},
        settings={},
        origin={"requested": choice["requested"], "path": choice["path"], "digest": weights.digest()},
        notes=[f"{foreign.kind}: {note}" for note in foreign.notes],
        hint=_FROM_PRETRAINED if os.path.isfile(os.path.join(choice["path"], "config.json")) else "",
    )


class ForeignWeights:
    """Whole tensors by name, of models by name; implements `TensorSource`."""

    def __init__(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        self._tensors: dict[str, torch.Tensor] = {
            f"model/{name}/{key}" if name else f"model/{key}": value
            for name, weights in models.items()
            for key, value in weights.items()
            if isinstance(value, torch.Tensor) and not key.endswith("_extra_state")
        }

    def digest(self) -> str:
        """Of names and values."""
        return digest_of([[name, digest(value)] for name, value in sorted(self._tensors.items())])

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._tensors if name.startswith(prefix)]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self._tensors[name].shape), self._tensors[name].dtype

    def is_sharded(self, name: str) -> bool:
        return False

    def own_name(self, name: str) -> str:
        return name

    def own_names(self, name: str) -> list[str]:
        return []

    def fill(self, name: str, target: torch.Tensor) -> None:
        value = self._tensors[name]
        with torch.no_grad():
            if not isinstance(target, DTensor):
                target.detach().copy_(value)
                return
            for box in boxes_of(name, target):
                region = region_of(local_part(target), box.local_offsets, box.sizes)
                region.copy_(region_of(value, box.offsets, box.sizes))

    def create(self, name: str, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor:
        return self._tensors[name].detach().to(device, copy=True)
