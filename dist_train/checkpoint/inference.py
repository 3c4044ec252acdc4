"""A saved model's weights for inference, without the rest of the run.

Invariant: only what was verified is read, tensor by tensor from the mapped file into the model: no second copy of it
is made. The run directory is not changed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar, cast

from torch import nn

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.restorer import Opened
from dist_train.checkpoint.selection import open_run, select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.console import ByteMeter
from dist_train.errors import CorruptCheckpointError, NoCheckpointError, StateMismatchError, StorageError
from dist_train.state import LiveState

logger = logging.getLogger(__name__)
_Model = TypeVar("_Model", bound=nn.Module | Mapping[str, nn.Module])


def load_model(run_dir: str, checkpoint: str, model: _Model, *, partial_load: Sequence[str] = ()) -> _Model:
    """Fills a model with the weights and buffers of a checkpoint and returns it.

    What the checkpoint was saved without (`RunOptions.exclude`: a frozen base) stays as it is in the model; a warning
    says so where it has other values than in the training.

    Args:
        run_dir: a run directory.
        checkpoint: `latest`, `best`, `epoch:15`, `step:1200`, or the path of a checkpoint folder.
        model: built as for training; on any device, unwrapped or not. A mapping of names for a run with several
            models; those that are not in it are not loaded.
        partial_load: patterns of what may differ and then stays as it is; see `RunOptions`.

    Raises:
        NoCheckpointError: there is no such checkpoint.
        CorruptCheckpointError: its bytes are not those that were committed.
        StateMismatchError: names, shapes or dtypes differ from the model's.
    """
    opened = open_whole(lambda: find_checkpoint(run_dir, checkpoint), files_for_inference)
    try:
        models = dict(model) if isinstance(model, Mapping) else {"": cast(nn.Module, model)}
        live = LiveState(models=models, optimizers={}, partial_load=partial_load)
        manifest = opened.manifest
        for note in live.restore_weights(manifest.state, manifest.settings, opened.reader):
            logger.warning("%s", note)
    except StateMismatchError as error:
        raise StateMismatchError(
            f"{opened.path} does not fit the model: {error}. The model is unchanged.{error.hint}", opened.path
        ) from error
    finally:
        opened.reader.close()
    return model


def open_whole(
    select: Callable[[], tuple[Store, str, Manifest]], files_of: Callable[[Manifest], Collection[str]]
) -> Opened:
    """A checkpoint whose files are what was committed. The choice is made again when a training that goes on has
    pruned it meanwhile, or taken its optimizer's state away.

    Raises:
        CorruptCheckpointError: its bytes are not those that were committed.
    """
    for tries_left in (2, 1, 0):
        store, path, manifest = select()
        try:
            require_whole(store, path, manifest, files_of(manifest))
            reader = CheckpointReader(store, path, manifest)
            return Opened(path=store.shown(path), manifest=manifest, reader=reader, origin=store)
        except (CorruptCheckpointError, FileNotFoundError):
            if read_checkpoint(store, path).manifest == manifest or not tries_left:
                raise
    raise AssertionError("unreachable")


def _require_run(run_dir: str) -> None:
    """Raises NoCheckpointError for what is no run at all: a checkpoint, a file, nothing."""
    try:
        open_run(run_dir, or_checkpoint=True)
    except StorageError as error:
        raise NoCheckpointError(str(error)) from None


def find_checkpoint(run_dir: str, checkpoint: str) -> tuple[Store, str, Manifest]:
    """The store, the folder in it and the manifest of a checkpoint named as in `load_model`."""
    try:
        store, found = select_checkpoint(Store(run_dir), checkpoint)
    except NoCheckpointError:
        _require_run(run_dir)
        raise
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"{store.path(found.path)} holds no checkpoint.")
    return store, found.path, found.manifest


def files_for_inference(manifest: Manifest) -> list[str]:
    """All but the optimizer's, which are most of the bytes."""
    return [name for name in sorted(manifest.files) if not name.startswith("optimizer-")]


def list_all_files(manifest: Manifest) -> list[str]:
    return sorted(manifest.files)


def require_whole(store: Store, path: str, manifest: Manifest, files: Collection[str]) -> None:
    """Raises CorruptCheckpointError where the bytes of these files are not those that were committed."""
    name = f"verify {path.rsplit('/', 1)[-1]}"
    meter = ByteMeter(sum(manifest.files[one].size for one in files), sys.stderr, name=name)
    try:
        damages = verify_checkpoint(store, path, manifest, files=files, on_bytes=meter.add)
    finally:
        meter.pause()
    if damages:
        raise CorruptCheckpointError(
            f"{store.shown(path)} cannot be used: {'; '.join(map(str, damages))}. Choose another checkpoint "
            f"(`dist-train ls {store.given}` lists them).",
            str(store.path(path)),
        )
