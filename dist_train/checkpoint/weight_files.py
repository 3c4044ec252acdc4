"""A checkpoint's weights as safetensors: one file, Hugging Face's folder of shards, or PEFT's of an adapter.

Invariant: values are bit for bit those of the checkpoint, names are those of the model's state_dict (an adapter's are
PEFT's own), and never more than `BLOCK_BYTES` of them are in memory, however large a tensor is and however many ranks
wrote its parts. A tied tensor is stored once.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch

from dist_train.checkpoint.adapters import has_adapter, name_adapters
from dist_train.checkpoint.manifest import MODEL_INDEX, Manifest
from dist_train.checkpoint.outbox import write_into
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, Part, lay_out
from dist_train.errors import ConfigError

OnBytes = Callable[[int], None]
MODEL_FILE = "model.safetensors"
BLOCK_BYTES = 64 << 20
_PREFIX = "model/"


def model_tensors(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Model's name -> its keys in the state_dict -> names in the manifest, tied ones included; "" is an only model."""
    models: dict[str, dict[str, str]] = {}
    for full in [*manifest.tensors, *manifest.aliases]:
        name, _, key = full.removeprefix(_PREFIX).rpartition("/")
        if full.startswith(_PREFIX) and "~extra" not in name.split("/"):
            models.setdefault(name, {})[key] = full
    return models


def weight_parts(manifest: Manifest, reader: CheckpointReader) -> list[Part]:
    """What goes into the files, in the model's order; the keys of several models begin with the model's name."""
    parts = []
    for name, keys in model_tensors(manifest).items():
        for key, full in keys.items():
            if full in manifest.tensors:
                parts.append(_part(reader, full, f"{name}.{key}" if name else key))
    return parts


def adapter_parts(manifest: Manifest, reader: CheckpointReader, config: Mapping[str, Any]) -> list[Part]:
    """What goes into PEFT's file. What is tied is written once for each of its names, as PEFT does it.

    Raises:
        ConfigError: see `name_adapters`.
    """
    models = [keys for keys in model_tensors(manifest).values() if has_adapter(keys)] or [{}]
    if len(models) > 1:
        raise ConfigError(f"{len(models)} models of the checkpoint have adapters; PEFT's folder has exactly one.")
    return [_part(reader, models[0][key], name) for name, key in name_adapters(models[0], config).items()]


def tied_keys(manifest: Manifest) -> dict[str, str]:
    """Key that is left out -> key that is stored, as safetensors' own `save_model` notes it in a file."""
    keys = {
        full: f"{name}.{key}" if name else key
        for name, members in model_tensors(manifest).items()
        for key, full in members.items()
    }
    return {keys[alias]: keys[stored] for alias, stored in manifest.aliases.items() if alias in keys}


def write_weights(
    file: BinaryIO,
    parts: Sequence[Part],
    reader: CheckpointReader,
    on_bytes: OnBytes,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file."""
    layout = lay_out("model", parts, metadata)
    file.write(layout.header)
    for part in layout.parts:
        if part.num_bytes:
            for offsets, sizes in blocks(part, BLOCK_BYTES):  # no name is given to one: it would live beside the next
                on_bytes(file.write(_bytes_of(reader.read_box(part.name, offsets, sizes))))


def write_shards(
    folder: Store, parts: Sequence[Part], reader: CheckpointReader, max_shard_bytes: int, on_bytes: OnBytes
) -> int:
    """Hugging Face's folder: shards and their index, or one file where one suffices; returns how many."""
    shards = split_shards(parts, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else MODEL_FILE
        weight_map.update({part.key: name for part in members})
        with write_into(folder, name) as file:
            write_weights(file, members, reader, on_bytes)
    if len(shards) > 1:
        total = sum(part.num_bytes for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with write_into(folder, MODEL_INDEX) as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
    return len(shards)


def split_shards(parts: Iterable[Part], max_shard_bytes: int) -> list[list[Part]]:
    """In order, each as full as it gets; a tensor that is larger than a shard has one of its own."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.num_bytes
    return shards


def blocks(part: Part, most_bytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of boxes that are one after the other in a whole tensor's row-major bytes."""
    item_bytes, shape = DTYPES[part.dtype].itemsize, part.sizes
    if part.num_bytes <= most_bytes:
        yield part.offsets, shape
        return
    dim = next(dim for dim in range(len(shape)) if math.prod(shape[dim + 1 :]) * item_bytes <= most_bytes)
    step = most_bytes // (math.prod(shape[dim + 1 :]) * item_bytes)
    for outer in itertools.product(*map(range, shape[:dim])):
        for low in range(0, shape[dim], step):
            sizes = (*(1,) * dim, min(step, shape[dim] - low), *shape[dim + 1 :])
            yield (*outer, low, *part.offsets[dim + 1 :]), sizes


def _part(reader: CheckpointReader, full: str, key: str) -> Part:
    shape, dtype = reader.describe(full)
    return Part(name=full, key=key, dtype=DTYPE_NAMES[dtype], sizes=shape, offsets=(0,) * len(shape), whole=True)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
