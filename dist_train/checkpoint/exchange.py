"""Checkpoints in the forms of others: export to .pth and safetensors, import from what people have.

    export    a run's checkpoint, verified -> a .pth dictionary | a .safetensors file | Hugging Face's folder | PEFT's
    import    `foreign` (whose files are they?) -> `adoption` (a new run with one committed checkpoint)

Invariant: the one module that calls `torch.save` and `torch.load` on files; what is loaded is never executed:
weights_only, with numpy's plain numbers and arrays besides. An export appears whole or not at all, and changes nothing
in the run.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import torch

from dist_train.checkpoint.adapters import CONFIG_NAME as ADAPTER_CONFIG
from dist_train.checkpoint.adapters import WEIGHTS_NAME as ADAPTER_WEIGHTS
from dist_train.checkpoint.adapters import has_adapter
from dist_train.checkpoint.adoption import Adopted, adopt
from dist_train.checkpoint.dictionary import build_dictionary, list_left_out
from dist_train.checkpoint.foreign import ImportOptions, read_foreign
from dist_train.checkpoint.inference import files_for_inference, find_checkpoint, list_all_files, open_whole
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.outbox import new_file, new_folder, require_new, write_into
from dist_train.checkpoint.plain_values import plain_allowed, refused_name
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.restorer import Opened
from dist_train.checkpoint.selection import best_or_latest, open_run
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.tensor_file import Part
from dist_train.checkpoint.weight_files import (
    adapter_parts,
    tied_keys,
    weight_parts,
    write_shards,
    write_weights,
)
from dist_train.console import ByteMeter
from dist_train.errors import ConfigError, CorruptCheckpointError
from dist_train.exclusion import EXCLUDE, absent_names
from dist_train.partial import some

Format = Literal["pth", "safetensors", "hf", "peft"]
FORMATS = ("pth", "safetensors", "hf", "peft")
_FOLDERS = ("hf", "peft")
SHARD_BYTES = 5_000_000_000
"""Hugging Face's own default."""
_LEFT_OUT = ["the state of the optimizer, scheduler and scaler", "the base model"]
_HEADER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export wrote."""

    path: str
    format: str
    checkpoint: str
    """The folder it was made of."""
    num_bytes: int
    num_files: int
    global_step: int
    epochs_completed: int
    left_out: list[str]
    """What the form has no place for."""
    attached: list[str]
    """Files beside the weights: those that go along with the run's checkpoints."""


def export_checkpoint(
    run_dir: str,
    which: str | None = None,
    to: str | None = None,
    *,
    form: Format = "pth",
    max_shard_bytes: int | None = None,
    weights_only: bool = False,
    force: bool = False,
) -> Exported:
    """Writes one checkpoint of a run for other programs; its digests are verified first.

    `hf` and `peft` are folders, the latter of an adapter alone; the files that were attached to the run go along.
    These two and `safetensors` need 64 MB of memory, however large a tensor is. For `pth`, torch.save wants all tensors
    at once: they are mapped from the checkpoint's files, so that the memory they take is the page cache's; tensors that
    are sharded or not row-major are copied.

    Args:
        which: `latest`, `best`, `epoch:15`, `step:1200` or a path; None is the best if there is one, else the latest.
        to: the file to be written, for `hf` and `peft` the folder; a file of a directory that exists gets the name
            that None gives it in the working directory: the run's and the checkpoint's.
        max_shard_bytes: for `hf` alone, the most bytes of one file (a larger tensor has one of its own); None is 5 GB.
        weights_only: for `pth`, leave the optimizer's, scheduler's and scaler's state out.
        force: replace what is there.

    Raises:
        ConfigError: the target is there already or lies in a run, an argument is wrong, or the checkpoint's model is
            none for this format.
        NoCheckpointError, CorruptCheckpointError: the checkpoint cannot be had.
        StorageError: the target cannot be written; nothing is left of it.
    """
    if form not in FORMATS:
        raise ConfigError(f"{form!r} is no format of an export; give {', '.join(FORMATS)}.")
    if max_shard_bytes is not None and form != "hf":
        raise ConfigError(f"The format {form} is one file: a largest size of a file goes with the format hf alone.")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ConfigError(f"A shard of {max_shard_bytes} bytes holds nothing; give at least 1 byte (5GB is usual).")
    whole = form == "pth" and not weights_only
    store = open_run(run_dir, or_checkpoint=True)
    named = which or best_or_latest(store)
    target = _target(store, named, to, form)
    require_new(target, force=force, is_folder=form in _FOLDERS)
    opened = open_whole(lambda: find_checkpoint(run_dir, named), list_all_files if whole else files_for_inference)
    manifest, reader = opened.manifest, opened.reader
    size = sum(manifest.files[name].size for name in (manifest.files if whole else files_for_inference(manifest)))
    meter = ByteMeter(size, sys.stderr, name=f"export {target}")
    try:
        if form == "pth":
            count, written = 1, _write_pth(manifest, reader, target, size, weights_only, force, meter)
        elif form == "safetensors":
            count, written = 1, _write_safetensors(manifest, reader, target, force, meter)
        elif form == "peft":
            count, written = _write_peft(opened, target, force, meter)
        else:
            count, written = _write_hf(opened, target, max_shard_bytes or SHARD_BYTES, force, meter)
    finally:
        meter.pause()
        reader.close()
    return Exported(
        path=target,
        format=form,
        checkpoint=opened.path,
        num_bytes=written,
        num_files=count,
        global_step=manifest.progress.global_step,
        epochs_completed=manifest.progress.epochs_completed,
        left_out=_list_excluded(manifest, form)
        + (list_left_out(manifest) if whole else _LEFT_OUT[: 2 if form == "peft" else 1]),
        attached=manifest.attached if form in _FOLDERS else [],
    )


def import_checkpoint(source: str, run_dir: str, **options: Any) -> Adopted:
    """Makes a new run with one committed checkpoint of what another program has saved; no code of it is executed.

    Args:
        source: a .pth, .pt, .ckpt or .bin file of `torch.save` (Lightning's too), a .safetensors file, or a folder of
            Accelerate's `save_state`, of transformers' Trainer or of Hugging Face's `save_pretrained`.
        run_dir: the new run's directory; continue it with the same model.
        options: the fields of `ImportOptions`.

    Raises:
        ConfigError: the run directory holds checkpoints already or lies in another run, or an option does not fit the
            source.
        CorruptCheckpointError: the source is damaged, or it is no such file.
        UnsaveableStateError: it holds what tensors and JSON cannot hold.
        StorageError: the run directory cannot be written.
    """
    foreign = read_foreign(source, ImportOptions(**options), load_dictionary)
    return adopt(foreign, source, run_dir)


def load_dictionary(path: str) -> Any:
    """What `torch.save` wrote, its tensors mapped from the file where its form allows it.

    Raises:
        CorruptCheckpointError: no such file or a damaged one, or one that wants code to be run.
    """
    try:
        with plain_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the form of torch before 1.6
    except Exception as error:  # pickle's, zip's and torch's own kinds, which have no common base
        if isinstance(error, OSError) and error.filename:  # of opening it; torch has nameless ones for damaged files
            raise
        raise CorruptCheckpointError(_why_not_loaded(path, error), path) from error


def _why_not_loaded(path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    is_of_torch = _is_of_torch(path)
    if not is_of_torch or ("weights_only" not in text and "Weights only" not in text):
        why = text.split(". ")[0] or type(error).__name__
        if not is_of_torch:
            why = "it does not begin like one"
        if isinstance(error, OSError):  # a seek before its beginning: the number of the error helps nobody
            why = "it ends too early"
        return f"{path} cannot be read as a file of torch.save ({why}). It is damaged, cut short or of another kind."
    name = refused_name(text)
    what = f"{name}, which is code of a library or script" if name else "something that is not plain data"
    return (
        f"{path} was not loaded: it wants {what}, and loading that would run it; nothing was executed. If you trust "
        f"the file, make plain data of it where it can be loaded, and import that: "
        f"`c = torch.load({path!r}, weights_only=False)` and then "
        f"`torch.save({{k: v for k, v in c.items() if k not in ('config', 'args', 'hyper_parameters')}}, "
        f"'plain.pth')`, where the words in brackets are the keys of c that hold more than tensors and numbers; all "
        f"others are kept, so that optimizer, scheduler and scaler go on. Where c is the model itself, "
        f"`torch.save(c.state_dict(), 'plain.pth')`."
    )


def _list_excluded(manifest: Manifest, form: str) -> list[str]:
    """What of the model no checkpoint holds, so that the export is no whole model; an adapter's needs none of it."""
    exclude = manifest.settings.get(EXCLUDE)
    names = [name.removeprefix("model/") for name in sorted(absent_names(exclude)) if name.startswith("model/")]
    if exclude is None or not names or form == "peft":
        return []
    kept_out = f"exclude={tuple(exclude['patterns'])!r} keeps out of checkpoints"
    return [f"{len(names)} tensors of the model, which {kept_out} ({some(names)})"]


def _is_of_torch(path: str) -> bool:
    """By how it begins: a zip file, a pickle, or the tar of torch 0.1."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80" or tarfile.is_tarfile(path)


def _target(store: Store, which: str, to: str | None, form: str) -> str:
    """`ultra-best.pth` or `ultra-epoch-15`, in the working directory or the one that was given."""
    of_run = os.path.basename(store.root)
    of_checkpoint = os.path.basename(which.rstrip("/")).replace(":", "-")
    name = f"{of_run}-{of_checkpoint}" + ("" if form in _FOLDERS else f".{form}")
    if to is None:
        return name
    is_place = form not in _FOLDERS and (os.path.isdir(to) or to.endswith("/"))
    return os.path.join(to, name) if is_place else to


def _write_pth(
    manifest: Manifest,
    reader: CheckpointReader,
    to: str,
    size: int,
    weights_only: bool,
    force: bool,
    meter: ByteMeter,
) -> int:
    with new_file(to, needed_bytes=size, force=force) as file:
        sink = _Sink(file, meter.add)
        torch.save(build_dictionary(manifest, reader, weights_only=weights_only), cast(Any, sink))
        sink.require_written()
        return file.tell()


def _write_safetensors(manifest: Manifest, reader: CheckpointReader, to: str, force: bool, meter: ByteMeter) -> int:
    parts = weight_parts(manifest, reader)
    with new_file(to, needed_bytes=_size_of(parts, to), force=force) as file:
        write_weights(file, parts, reader, meter.add, tied_keys(manifest))
        return file.tell()


def _write_hf(opened: Opened, to: str, max_shard_bytes: int, force: bool, meter: ByteMeter) -> tuple[int, int]:
    """(files of weights, bytes)."""
    manifest, reader, beside = opened.manifest, opened.reader, _read_attached(opened)
    parts = weight_parts(manifest, reader)
    if has_adapter([part.key for part in parts]):
        raise ConfigError(
            f"{to} was not written: the checkpoint's model has an adapter of PEFT, and from_pretrained would not know "
            f"its names. Give --format peft for the adapter; or load the model (dist_train.load_model), and call its "
            f"merge_and_unload() and save_pretrained()."
        )
    with new_folder(to, needed_bytes=_size_of(parts, to, beside), force=force) as folder:
        count = write_shards(folder, parts, reader, max_shard_bytes, meter.add)
        _write_beside(folder, beside)
        return count, folder.tree_bytes()


def _write_peft(opened: Opened, to: str, force: bool, meter: ByteMeter) -> tuple[int, int]:
    """The same of PEFT's folder."""
    manifest, reader, beside = opened.manifest, opened.reader, _read_attached(opened)
    try:
        config = json.loads(beside.get(ADAPTER_CONFIG, b"{}"))
    except ValueError as error:
        raise ConfigError(f"{opened.path}/{ADAPTER_CONFIG}, as it was attached, is not JSON ({error}).") from error
    parts = adapter_parts(manifest, reader, config)
    with new_folder(to, needed_bytes=_size_of(parts, to, beside), force=force) as folder:
        with write_into(folder, ADAPTER_WEIGHTS) as file:
            write_weights(file, parts, reader, meter.add)
        _write_beside(folder, beside)
        return 1, folder.tree_bytes()


def _size_of(parts: Sequence[Part], to: str, beside: Mapping[str, bytes] | None = None) -> int:
    if not parts:
        raise ConfigError(f"{to} was not written: the checkpoint holds no model.")
    return sum(part.num_bytes for part in parts) + sum(map(len, (beside or {}).values())) + _HEADER_BYTES


def _read_attached(opened: Opened) -> dict[str, bytes]:
    """Verified with the rest a moment ago."""
    try:
        return {name: Path(opened.path, name).read_bytes() for name in opened.manifest.attached}
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            f"{error.filename} is gone: the training that goes on has pruned the checkpoint. Export it again, or "
            f"another one; `dist-train pin` keeps one.",
            opened.path,
        ) from error


def _write_beside(folder: Store, beside: Mapping[str, bytes]) -> None:
    for name, data in beside.items():
        with write_into(folder, name) as file:
            file.write(data)


class _Sink:
    """A file for torch.save, which hides why a write failed: the error is kept, the rest swallowed."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        if self._error is None:
            try:
                self._file.write(data)
                self._on_bytes(count)
            except OSError as error:
                self._error = error
        return count

    def flush(self) -> None:
        """At the end of the block that opened the file."""

    def require_written(self) -> None:
        """Raises the first error of a write."""
        if self._error is not None:
            raise self._error
