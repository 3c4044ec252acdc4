"""Pins: marker files that keep a checkpoint from retention for as long as they are there.

Invariant: a pin is named by the digest of the manifest that it protects, so that it needs no lock and survives the
checkpoint's move to abandoned/; the path inside is for people. It says nothing of other runs.
"""

from __future__ import annotations

import re

from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import PINS, Manifest
from dist_train.checkpoint.store import Store
from dist_train.errors import NoCheckpointError

_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


def read_pins(store: Store) -> frozenset[str]:
    """Digests of the manifests that are pinned."""
    return frozenset(name for name in store.list(PINS) if _DIGEST.match(name))


def is_pinned(manifest: Manifest | None, pins: frozenset[str]) -> bool:
    """Whether a checkpoint is pinned; a pin that came while it was being stripped still counts."""
    if manifest is None or not pins:  # a digest takes a while
        return False
    return manifest.stripped_from in pins or manifest.digest in pins


def add_pin(store: Store, path: str, digest: str) -> None:
    """Durable when this returns."""
    store.make_directory(PINS)
    store.replace(f"{PINS}/{digest}", f"{path}\n".encode())


def remove_pin(store: Store, digest: str) -> None:
    """A pin that is not there is no error."""
    if store.exists(f"{PINS}/{digest}"):
        store.unlink(f"{PINS}/{digest}")
        store.sync_directory(PINS)


def pin(store: Store, path: str, manifest: Manifest) -> Manifest:
    """Pins a checkpoint of a run that may be pruning it at this very moment; returns its manifest as it is now.

    Raises:
        NoCheckpointError: it was deleted before the pin was there.
    """
    add_pin(store, path, manifest.digest)
    now = read_checkpoint(store, path).manifest or read_checkpoint(store, path).manifest  # it may just be put back
    if now is not None and now.digest == manifest.digest:
        return now
    if now is not None and now.stripped_from == manifest.digest:
        add_pin(store, path, now.digest)
    remove_pin(store, manifest.digest)
    if now is None or now.stripped_from != manifest.digest:
        raise NoCheckpointError(
            f"{store.shown(path)} was deleted by retention before it could be pinned. `dist-train ls {store.given}` "
            f"lists what there is."
        )
    return now


def unpin(store: Store, manifest: Manifest) -> bool:
    """Returns whether it was pinned."""
    digests = {manifest.digest, manifest.stripped_from} & read_pins(store)
    for digest in digests:
        remove_pin(store, str(digest))
    return bool(digests)
