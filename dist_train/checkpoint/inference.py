"""A saved model's weights for inference, without the rest of the run."""

from __future__ import annotations

from torch import nn

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.selection import select_checkpoint
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.errors import CorruptCheckpointError, NoCheckpointError, StateMismatchError
from dist_train.state import LiveState


def load_model(run_dir: str, checkpoint: str, model: nn.Module) -> nn.Module:
    """Fills a model with the weights and buffers of a checkpoint and returns it.

    Args:
        run_dir: a run directory.
        checkpoint: `latest`, `best`, `step:1200`, or the path of a checkpoint folder.
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
    store, found = select_checkpoint(Store(run_dir), checkpoint)
    if found.manifest is None:
        raise found.problem or NoCheckpointError(f"{store.path(found.path)} holds no checkpoint.")
    return store, found.path, found.manifest
