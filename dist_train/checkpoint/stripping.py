"""A full checkpoint -> a weights-only one, in place: the state of optimizer, scheduler and scaler is taken away.

    weights_only(manifest) -> the new manifest replaces the old one at once -> the optimizer's files are unlinked

Invariant: at every instant the folder verifies, before as a full and after as a weights-only checkpoint: the files that
a manifest lists are there until no manifest lists them. What a kill leaves in between is swept by the next pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from dist_train.checkpoint.manifest import MANIFEST_NAME, Manifest
from dist_train.checkpoint.store import Store

STRIPPED = ("optimizer", "scheduler", "scaler")
"""Kinds of state that go. What the user registered stays: it may be an average of the weights."""
_LEFT_OVER = re.compile(rf"{re.escape(MANIFEST_NAME)}\.[\d-]+\.tmp\Z")


def weights_only(manifest: Manifest) -> Manifest:
    """The manifest without the state of optimizer, scheduler and scaler; the same sequence, another digest."""
    gone = set(manifest.optimizer_files)
    lost = sorted({_kind(place) for place in manifest.state} & set(STRIPPED))
    settings = {place: value for place, value in manifest.settings.items() if _kind(place) not in STRIPPED}
    absent = list(dict.fromkeys([*manifest.absent, *lost]))
    return replace(
        manifest,
        files={name: entry for name, entry in manifest.files.items() if name not in gone},
        tensors={name: entry for name, entry in manifest.tensors.items() if _kind(name) != "optimizer"},
        state={place: value for place, value in manifest.state.items() if _kind(place) not in STRIPPED},
        settings={**settings, "absent": absent, "stripped_from": manifest.stripped_from or manifest.digest},
    )


def strip(store: Store, path: str, manifest: Manifest, *, is_pinned: Callable[[], bool] = lambda: False) -> bool:
    """Makes a committed checkpoint weights-only.

    Args:
        is_pinned: asked once the new manifest is in place, when a pin can no longer miss it.

    Returns:
        False where it was pinned meanwhile: it is as it was.
    """
    store.replace(f"{path}/{MANIFEST_NAME}", weights_only(manifest).to_json().encode())
    if is_pinned():
        store.replace(f"{path}/{MANIFEST_NAME}", manifest.to_json().encode())
        return False
    _unlink(store, path, manifest.optimizer_files)
    return True


def sweep(store: Store, path: str, manifest: Manifest) -> None:
    """Removes what a stripping that was killed has left: files of the optimizer, a manifest half written."""
    names = [name for name in store.list(path) if name not in manifest.files]
    doomed = [name for name in names if _LEFT_OVER.match(name)]
    if manifest.stripped_from is not None:
        doomed += [name for name in names if name.startswith("optimizer-")]
    _unlink(store, path, doomed)


def _unlink(store: Store, path: str, names: list[str]) -> None:
    for name in names:
        store.unlink(f"{path}/{name}")
    if names:
        store.sync_directory(path)


def _kind(name: str) -> str:
    return name.partition("/")[0]
