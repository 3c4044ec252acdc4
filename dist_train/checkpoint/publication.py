"""A checkpoint folder under any name: filled beside its place, put there at once, and what lay there taken away.

    begin -> (every rank writes into the staging folder) -> seal -> (the manifest) -> publish

Invariant: whatever dies at whatever instant, the old folder is whole under its name, or the new one is, or the old one
lies beside it (only for an instant, and only where names cannot be exchanged), where `locate` finds it and the next
`begin` puts it back. Two saves of one name never mix: the folder is sealed under a name that only its owner knows
before anything is decided about it. Nothing is replaced but what such a save has written.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import MANIFEST_NAME, MODEL_INDEX, SAVING_PREFIX, TRASH_PREFIX, Manifest
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError, StorageError

REASON = "dcp"
"""In the manifest of every checkpoint that may be replaced."""
SEALED_PREFIX = ".sealed-"
REPLACED_PREFIX = ".replaced-"
_TOKEN = r"[0-9a-f]{16}"
_RANK = re.compile(rf"(\.saving-|\.(sealed|replaced|trash)-{_TOKEN}-)?rank-\d{{5,}}\Z")
_LONGEST_NAME = 255 - len(f"{REPLACED_PREFIX}{'0' * 16}-")
"""Of a folder, so that it can be renamed to its names beside its place."""
_OURS = re.compile(r".*\.safetensors\Z")


def rank_name(rank: int) -> str:
    """Folder of a checkpoint that a rank wrote without the others, inside of the one that was asked for."""
    return f"rank-{rank:05d}"


class Publication:
    """One save of one name.

    Args:
        path: the folder to be; a link is followed.
    """

    def __init__(self, path: str | os.PathLike[str], store: Callable[[str], Store] = Store) -> None:
        parent, self.name = os.path.split(os.path.realpath(path))
        self.store = store(parent)
        self.staging = f"{SAVING_PREFIX}{self.name}"
        """Equal for all ranks and all saves of the name: a rank can be told nothing else where its plan is cached."""
        self._token = ""

    @property
    def path(self) -> str:
        return str(self.store.path(self.name))

    def locate(self) -> str | None:
        """The folder that counts now, relative to the store: under its name or, after a crash, just beside it."""
        if self.store.exists(self.name):
            return self.name
        return next((name for name in self._beside() if name.startswith(REPLACED_PREFIX)), None)

    def require_replaceable(self, *, overwrite: bool) -> Manifest | None:
        """The manifest of the checkpoint that lies there, None where nothing does that has one.

        Raises:
            ConfigError: it must stay, or it is not what a save of this kind has written.
        """
        self._require_movable()
        place = self.locate()
        if place is None:
            return None
        if not self.store.is_directory(place):
            raise ConfigError(f"{self.path} is a file, expected a folder for a checkpoint. Give another path.")
        names = self.store.list(place)
        if names and not overwrite:
            raise ConfigError(
                f"{self.path} holds a checkpoint already, and overwrite is False. It was left as it is; give another "
                f"path, or overwrite=True."
            )
        found = read_checkpoint(self.store, place).manifest if MANIFEST_NAME in names else None
        self._require_ours(names, found)
        return found

    def _require_movable(self) -> None:
        """The folder is put in its place and taken away by renames, within the folder above."""
        if os.path.ismount(self.path) or not self.name:
            raise ConfigError(
                f"{self.path} is where a file system is mounted, and a checkpoint takes the place of its folder as a "
                f"whole. Give a folder below it."
            )
        with contextlib.suppress(OSError):  # a working directory that is gone
            if os.path.commonpath([self.path, os.path.realpath(os.getcwd())]) == self.path:
                raise ConfigError(
                    f"{self.path} is the working directory or lies above it, and a checkpoint takes the place of its "
                    f"folder as a whole. Give a folder below it."
                )
        if len(os.fsencode(self.name)) > _LONGEST_NAME:
            raise ConfigError(f"{self.path}: the name of the folder is too long; at most {_LONGEST_NAME} bytes.")

    def _require_ours(self, names: list[str], found: Manifest | None) -> None:
        if names and all(_RANK.match(name) for name in names):
            return
        if found is not None and found.reason != REASON:
            raise ConfigError(
                f"{self.path} is a checkpoint of a training run (run {found.run_id}, step "
                f"{found.progress.global_step}), which this save would take away. It was left as it is; give another "
                f"path."
            )
        known = set(found.files) if found else {MODEL_INDEX, *filter(_OURS.match, names)}
        strangers = [name for name in names if name not in known | {MANIFEST_NAME}]
        if strangers or (names and MANIFEST_NAME not in names):
            raise ConfigError(
                f"{self.path} holds {', '.join(strangers[:3] or names[:3])}, which no StorageWriter put there, and a "
                f"checkpoint replaces its folder as a whole. It was left as it is; give a folder that is not there "
                f"yet, or take out what is to be kept and delete the rest."
            )

    def begin(self) -> None:
        """Clears what killed saves of this name have left, and makes the staging folder.

        Raises:
            StorageError: another save of this name begins at this very moment.
        """
        self.store.make_directory("")
        if (place := self.locate()) not in (None, self.name):
            assert place is not None
            self.store.rename(place, self.name)
            self.store.sync_directory("")
        for name in self._beside():
            self.discard(name)
        self._token = secrets.token_hex(8)
        try:
            self.store.make_directory(self.staging, exist_ok=False)
            self.store.write_new(f"{self.staging}/{self._mark()}", b"")
        except (FileExistsError, FileNotFoundError) as error:
            raise self.overtaken() from error

    def require_begun(self) -> None:
        """Raises FileNotFoundError where the staging folder is another save's: nothing is put in its way."""
        self.store.size(f"{self.staging}/{self._mark()}")

    def seal(self) -> str:
        """Takes the staging folder to a name that no other save knows, and returns that.

        Raises:
            StorageError: another save of this name has begun meanwhile.
        """
        sealed = f"{SEALED_PREFIX}{self._token}-{self.name}"
        try:
            self.store.rename(self.staging, sealed)
            if not self.store.exists(f"{sealed}/{self._mark()}"):
                self.store.rename(sealed, self.staging)  # another save's, which may go on
                raise FileNotFoundError(f"{sealed}/{self._mark()}")
        except FileNotFoundError as error:
            raise self.overtaken() from error
        self.store.unlink(f"{sealed}/{self._mark()}")
        return sealed

    def overtaken(self) -> StorageError:
        return StorageError(
            f"The save of {self.path} was given up: its folder {self.staging} is gone or another one's. Another save "
            f"of the same path has begun (one path takes one save at a time), somebody deleted it, or the path does "
            f"not lie in a directory that all nodes share."
        )

    def publish(self, sealed: str) -> None:
        """Puts a folder whose content is durable in its place. Durable when this returns; the old one is gone then.

        Raises:
            OSError: the old one is in its place, if there was one.
        """
        old = None
        if self.store.exists(self.name):
            old = sealed if self.store.exchange(sealed, self.name) else self._set_aside()
        try:
            if old != sealed:
                self.store.rename(sealed, self.name)
            self.store.sync_directory("")
        except OSError:
            self._take_back(sealed, old)
            raise
        if old is not None:
            self.discard(old)

    def _set_aside(self) -> str:
        """Where names cannot be swapped: from here to the next rename the old one is found by `locate` alone."""
        aside = f"{REPLACED_PREFIX}{self._token}-{self.name}"
        self.store.rename(self.name, aside)
        return aside

    def _take_back(self, sealed: str, old: str | None) -> None:
        """Nothing is known to be durable: the old one comes back. Where that fails, too, nothing may be deleted."""
        with contextlib.suppress(OSError):
            if old == sealed:
                self.store.exchange(sealed, self.name)
            elif self.store.exists(self.name):
                self.store.rename(self.name, sealed)
            if old not in (None, sealed):
                self.store.rename(str(old), self.name)
            self.discard(sealed)

    def discard(self, name: str) -> None:
        """First another name, then gone; what cannot be removed now is left to the next save of this name."""
        trash = f"{TRASH_PREFIX}{secrets.token_hex(8)}-{self.name}"
        with contextlib.suppress(OSError):
            self.store.rename(name, trash)
            self.store.remove_tree(trash)

    def _beside(self) -> list[str]:
        """What saves of this name may have left."""
        mine = re.escape(self.name)
        pattern = re.compile(rf"\.(saving-{mine}|(sealed|replaced|trash)-{_TOKEN}-{mine})\Z")
        return [name for name in self.store.list() if pattern.match(name)]

    def _mark(self) -> str:
        return f".save-{self._token}"
