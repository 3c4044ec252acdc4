"""Files and folders for elsewhere that appear whole or not at all: written under a hidden name, fsynced, renamed.

Invariant: under the name that was asked for there is never a part of a file; what was there stays until the new one
is durable. Nothing is ever written into a run. It knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import BinaryIO

from dist_train.checkpoint.enclosure import require_outside_of_runs
from dist_train.checkpoint.manifest import MODEL_INDEX
from dist_train.checkpoint.store import Store, is_out_of_space
from dist_train.console import bytes_text
from dist_train.errors import ConfigError, DistTrainError, StorageError

_SLACK_BYTES = 1 << 20
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors\Z")


@contextlib.contextmanager
def new_file(target: str, *, needed_bytes: int, force: bool) -> Iterator[BinaryIO]:
    """A file to be written; it gets its name when the block ends well, and is gone when it does not.

    Raises:
        ConfigError: the target is there already (and `force` is not given), is a directory, or lies in a run.
        StorageError: the disk has no room for `needed_bytes`, or a write failed.
    """
    store, name = _prepare(target, needed_bytes, force, is_folder=False)
    temporary = _temporary(name)
    try:
        with open(store.path(temporary), "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        store.rename(temporary, name)
        store.sync_directory("")
    except BaseException as error:
        with contextlib.suppress(OSError):
            store.unlink(temporary)
        raise _told(error, target) from error


@contextlib.contextmanager
def new_folder(target: str, *, needed_bytes: int, force: bool) -> Iterator[Store]:
    """A folder to be filled with files by `write_into`; it gets its name when the block ends well.

    With `force`, the model's weights in an existing folder are replaced, see `_replace_weights`; its other files (a
    config, a tokenizer, an adapter's weights) stay. A link to a folder is followed.

    Raises:
        ConfigError: as for a file.
        StorageError: as for a file.
    """
    parent, name = _prepare(target, needed_bytes, force, is_folder=True)
    temporary = _temporary(name)
    try:
        parent.make_directory(temporary, exist_ok=False)
        staging = Store(parent.path(temporary))
        yield staging
        staging.sync_directory("")
        if parent.list(name):
            _replace_weights(parent, name, temporary)
        else:
            parent.rename(temporary, name)  # also over an empty directory
        parent.sync_directory("")
    except BaseException as error:
        with contextlib.suppress(OSError):
            parent.remove_tree(temporary)
        raise _told(error, target) from error


@contextlib.contextmanager
def write_into(folder: Store, name: str) -> Iterator[BinaryIO]:
    """A file of a new folder, fsynced at the end."""
    with open(folder.path(name), "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _replace_weights(parent: Store, name: str, temporary: str) -> None:
    """The new files come in first, the index after its shards; then what is left of the old set goes, its index first.

    So there is a whole set at each moment, whatever dies in between: the old one, the new one, or, until the old one is
    gone, both, of which a reader takes one by its own rule (model.safetensors first, or an index). The exception is a
    sharded set that is replaced by one of as many shards, under the same names: a folder cannot change several files
    at once, so the index goes first of all there, and a reader finds no model rather than shards of two. The same
    command again finishes what was cut short.
    """
    new = parent.list(temporary)
    replaces = any(_WEIGHTS.match(one) for one in new)  # an adapter comes beside the weights that it is for
    old = [one for one in parent.list(name) if replaces and (_WEIGHTS.match(one) or one == MODEL_INDEX)]
    if MODEL_INDEX in new and set(new) & set(old) - {MODEL_INDEX}:
        parent.unlink(f"{name}/{MODEL_INDEX}")
        parent.sync_directory(name)
    for one in sorted(new, key=lambda file: file == MODEL_INDEX):
        if one == MODEL_INDEX:
            parent.sync_directory(name)
        parent.rename(f"{temporary}/{one}", f"{name}/{one}")
    parent.sync_directory(name)
    for one in sorted(set(old) - set(new), key=lambda file: file != MODEL_INDEX):
        parent.unlink(f"{name}/{one}")
    parent.sync_directory(name)
    parent.remove_tree(temporary)


def require_new(target: str, *, force: bool, is_folder: bool) -> None:
    """Asked before long work begins, and again before the target is written.

    Raises:
        ConfigError: the target lies in a run, or something is there already that may not be replaced.
    """
    require_outside_of_runs(target)
    if not os.path.lexists(target):
        return
    if is_folder:
        require_no_dead_link(target)
    if os.path.isdir(target) is not is_folder:
        what = "a file, and a folder" if is_folder else "a directory, and a file"
        raise ConfigError(f"{target} is {what} is to be written. Give another path.")
    if not force and not (is_folder and not os.listdir(target)):
        raise ConfigError(f"{target} is there already. Give another path (--to), or --force to replace it.")


def require_no_dead_link(target: str) -> None:
    """Raises ConfigError where the target is a link to what is not there: nobody can tell which folder is meant."""
    if os.path.islink(target) and not os.path.exists(target):
        raise ConfigError(
            f"{target} is a link to {os.readlink(target)}, which is not there. Make that folder, remove the link, or "
            f"give another path."
        )


def _prepare(target: str, needed_bytes: int, force: bool, *, is_folder: bool) -> tuple[Store, str]:
    require_new(target, force=force, is_folder=is_folder)
    parent, name = os.path.split(os.path.realpath(target) if is_folder else os.path.abspath(target))
    store = Store(parent)
    try:
        store.make_directory("")
        free = store.free_bytes()
    except OSError as error:
        raise _told(error, target) from error
    if free < needed_bytes + _SLACK_BYTES:
        raise StorageError(
            f"{target} was not written: it needs {bytes_text(needed_bytes)}, {bytes_text(free)} are free in {parent}. "
            f"Free space, or choose a place on another disk."
        )
    return store, name


def _temporary(name: str) -> str:
    return f".{name}.{os.getpid()}-{time.monotonic_ns()}.tmp"


def _told(error: BaseException, target: str) -> BaseException:
    """An error of the disk as one paragraph; any other as it is."""
    if not isinstance(error, OSError) or isinstance(error, DistTrainError):
        return error
    why = "the disk is full or a quota is exceeded" if is_out_of_space(error) else error.strerror or str(error)
    next_step = "Free space, or choose" if is_out_of_space(error) else "Choose"
    return StorageError(f"{target} was not written: {why}. {next_step} another place, and try again.")
