"""Files that go along with every checkpoint of a run, so that other programs load its folder: a config, a tokenizer.

    read (main rank, once) -> bytes in memory -> the writer puts them beside the shards of each commit

Invariant: what is written is what was attached, whatever becomes of the files that it came from. No library is needed
that the files are for: an object that can save itself is asked to, and its weights are never among what it saves.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_train.checkpoint.manifest import MANIFEST_NAME, MODEL_INDEX, FileEntry
from dist_train.checkpoint.verify import digest_bytes
from dist_train.console import bytes_text
from dist_train.errors import ConfigError
from dist_train.model_state import innermost_module

MOST_BYTES = 256 << 20
"""Every checkpoint holds them anew, and the main rank keeps them in memory."""
_OURS = re.compile(rf"{re.escape(MANIFEST_NAME)}.*|{re.escape(MODEL_INDEX)}|(model|optimizer|state)-.*|\..*", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedFile:
    """One file, as it lies in every checkpoint's folder."""

    data: bytes
    entry: FileEntry
    origin: str
    """What it was made of, for people."""


def read_attached(items: Iterable[Any], already: Mapping[str, AttachedFile] | None = None) -> dict[str, AttachedFile]:
    """Those that are attached already and the files of `items`, by name.

    Args:
        items: paths of files, objects with `save_pretrained(folder)`, or models, of which their configs are taken.

    Raises:
        ConfigError: an item is nothing of that kind, or its files cannot lie in a checkpoint's folder.
    """
    files = dict(already or {})
    for item in items:
        for name, file in _read_item(item).items():
            if name in files and files[name].data != file.data:
                raise ConfigError(
                    f"Two files to be attached are called {name}, and differ: one is of {files[name].origin}, the "
                    f"other of {file.origin}. Attach one of them."
                )
            files.setdefault(name, file)
    total = sum(len(file.data) for file in files.values())
    if total > MOST_BYTES:
        largest = max(files, key=lambda name: len(files[name].data))
        raise ConfigError(
            f"The attached files are {bytes_text(total)}, of which {largest} alone is "
            f"{bytes_text(len(files[largest].data))}; at most {bytes_text(MOST_BYTES)} go along with each checkpoint. "
            f"Attach configs and tokenizers; what training changes belongs to run.register, data elsewhere."
        )
    return files


def _read_item(item: Any) -> dict[str, AttachedFile]:
    if isinstance(item, (str, os.PathLike)):
        return {Path(item).name: _read_file(Path(item), str(item))}
    kind = type(item).__name__
    save = _save_settings_of if isinstance(item, nn.Module) else _save_itself
    with tempfile.TemporaryDirectory(prefix="dist_train-attached-") as folder:
        save(item, folder)
        return {path.name: _read_file(path, f"the {kind}") for path in sorted(Path(folder).iterdir())}


def _read_file(path: Path, origin: str) -> AttachedFile:
    if not path.exists():
        raise ConfigError(f"{path} cannot be attached: there is no such file.")
    if not path.is_file():
        raise ConfigError(f"{path}, of {origin}, cannot be attached: it is no plain file. Attach its files one by one.")
    if path.name.lower().endswith(".safetensors") or _OURS.match(path.name):
        raise ConfigError(
            f"{path.name}, of {origin}, cannot be attached: a checkpoint's folder has files of such names, or hidden "
            f"ones, itself. Weights are saved by the run; give any other file another name."
        )
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ConfigError(f"{path} cannot be attached: it is {bytes_text(size)}, and {bytes_text(MOST_BYTES)} may be.")
    data = path.read_bytes()
    return AttachedFile(data=data, entry=digest_bytes(data), origin=origin)


def _save_itself(item: Any, folder: str) -> None:
    if not callable(getattr(item, "save_pretrained", None)):
        raise ConfigError(
            f"A {type(item).__name__} cannot be attached: give paths of files, objects with save_pretrained(folder) "
            f"(a config, a tokenizer, a processor), or the model, whose config is taken."
        )
    try:
        _without_sets(item).save_pretrained(folder)
    except Exception as error:  # another library's, and the other ranks wait
        raise ConfigError(
            f"The {type(item).__name__} cannot be attached: its save_pretrained failed with {type(error).__name__}: "
            f"{error}."
        ) from error


def _without_sets(item: Any) -> Any:
    """PEFT's configs hold sets, whose order differs by process: a resume would find another file each time."""
    sets = {name: value for name, value in getattr(item, "__dict__", {}).items() if isinstance(value, set)}
    ordered = copy.copy(item) if sets else item
    for name, value in sets.items():
        setattr(ordered, name, sorted(value, key=str))
    return ordered


def _save_settings_of(model: nn.Module, folder: str) -> None:
    """What the model's own `save_pretrained` writes beside its weights."""
    inner: Any = innermost_module(model)
    inner = getattr(inner, "_orig_mod", inner)
    configs = [*_adapter_configs(inner), *(() if hasattr(inner, "get_base_model") else _model_configs(inner))]
    if not configs:
        raise ConfigError(
            f"The {type(inner).__name__} cannot be attached: it has no config with save_pretrained. Attach the files "
            f"that it is built from; its weights are saved anyway."
        )
    for config in configs:
        _save_itself(config, folder)


def _model_configs(model: Any) -> list[Any]:
    """With the class and the element type that `from_pretrained` goes by."""
    config, generation = copy.deepcopy(getattr(model, "config", None)), getattr(model, "generation_config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return []
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # which fully_shard puts before it
    floating = (one.dtype for one in model.parameters() if one.dtype.is_floating_point)
    if (dtype := next(floating, None)) is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    return [config, *([] if generation is None else [generation])]


def _adapter_configs(model: Any) -> list[Any]:
    """PEFT's of the only adapter; several have one folder each there, which a checkpoint's folder cannot have."""
    configs = getattr(model, "peft_config", None) or {}
    if len(configs) > 1:
        raise ConfigError(
            f"The {type(model).__name__} cannot be attached: it has the adapters {', '.join(sorted(configs))}, and a "
            f"checkpoint's folder has one adapter_config.json. Attach the config of one: "
            f"run.attach(model.peft_config[{min(configs)!r}])."
        )
    made = []
    for config in configs.values():
        made.append(copy.deepcopy(config))
        made[-1].inference_mode = True  # as PEFT's own save_pretrained says it
    return made


def compare_attached(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is otherwise than in the checkpoint that is resumed from, as one sentence; digests by name."""
    changed = [f"{name} has changed" for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    changed += [f"{name} is new" for name in sorted(now.keys() - then.keys())]
    changed += [f"{name} is there no more" for name in sorted(then.keys() - now.keys())]
    return [f"Of the attached files {', '.join(changed)}; today's go along from now on."] if changed else []
