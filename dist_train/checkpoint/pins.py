"""Pins: marker files that keep a checkpoint from retention for as long as they are there.

Invariant: a pin is named by the digest of the manifest that it protects, so that it needs no lock and survives the
checkpoint's move to abandoned/; the path inside is for people. It says nothing of other runs.
"""

from __future__ import annotations

import re

from dist_train.checkpoint.manifest import PINS, Manifest
from dist_train.checkpoint.store import Store

_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


def read_pins(store: Store) -> frozenset[str]:
    """Digests of the manifests that are pinned."""
    return frozenset(name for name in store.list(PINS) if _DIGEST.match(name))


def is_pinned(manifest: Manifest | None, pins: frozenset[str]) -> bool:
    """Whether a checkpoint is pinned; a pin that came while it was being stripped still counts."""
    return manifest is not None and (manifest.digest in pins or manifest.stripped_from in pins)


def add_pin(store: Store, path: str, digest: str) -> None:
    """Durable when this returns."""
    store.make_directory(PINS)
    store.replace(f"{PINS}/{digest}", f"{path}\n".encode())


def remove_pin(store: Store, digest: str) -> None:
    """A pin that is not there is no error."""
    if store.exists(f"{PINS}/{digest}"):
        store.unlink(f"{PINS}/{digest}")
        store.sync_directory(PINS)
