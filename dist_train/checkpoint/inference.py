"""A saved model's weights for inference, without the rest of the run."""

from __future__ import annotations

import os

from torch import nn

from dist_train.checkpoint.catalog import committed, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.retention import select_best
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, StateMismatchError
from dist_train.state import LiveState


def load_model(run_dir: str, checkpoint: str, model: nn.Module) -> nn.Module:
    """Fills a model with the weights and buffers of a checkpoint and returns it.

    Args:
        run_dir: a run directory.
        checkpoint: `latest`, `best`, or the path of a checkpoint folder.
        model: built as for training; on any device, unwrapped or not.

    Raises:
        NoCheckpointError: there is no such checkpoint.
        CorruptCheckpointError: its bytes are not those that were committed.
        StateMismatchError: names, shapes or dtypes differ from the model's.
    """
    store, path, manifest = find_checkpoint(run_dir, checkpoint)
    damages = verify_checkpoint(store, path, manifest)
    if damages:
        raise CorruptCheckpointError(
            f"{store.path(path)} cannot be used: {'; '.join(map(str, damages))}. Choose another checkpoint "
            f"(`dist-train ls {run_dir}` lists them).",
            str(store.path(path)),
        )
    reader = CheckpointReader(store, path, manifest)
    try:
        LiveState(models={"": model}, optimizers={}).restore(manifest.state, {}, reader)
    except StateMismatchError as error:
        raise StateMismatchError(
            f"{store.path(path)} does not fit the model: {error}. The model is unchanged."
        ) from error
    finally:
        reader.close()
    return model


def find_checkpoint(run_dir: str, checkpoint: str) -> tuple[Store, str, Manifest]:
    """The store, the folder in it and the manifest of a checkpoint named as in `load_model`."""
    if checkpoint in ("latest", "best"):
        return _find_in_run(Store(run_dir), checkpoint)
    if not os.path.isdir(checkpoint) and os.path.isdir(os.path.join(run_dir, "checkpoints", checkpoint)):
        checkpoint = os.path.join(run_dir, "checkpoints", checkpoint)
    if not os.path.isdir(checkpoint):
        raise ConfigError(f"{checkpoint!r} is neither 'latest', 'best' nor the path of a checkpoint folder.")
    folder, name = os.path.split(os.path.abspath(checkpoint))
    found = read_checkpoint(Store(folder), name)
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"{checkpoint} holds no checkpoint.")
    return Store(folder), name, found.manifest


def _find_in_run(store: Store, which: str) -> tuple[Store, str, Manifest]:
    usable = committed(list_checkpoints(store))
    if which == "best" and usable:
        best = usable[-1][1].best
        usable = select_best(usable, best.monitor, best.mode, 1) if best else []
    if not usable:
        raise NoCheckpointError(f"{store.root} holds no checkpoint that could be the {which} one.")
    path, manifest = usable[-1]
    return store, path, manifest
