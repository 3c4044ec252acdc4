"""Starting again from an older or a foreign checkpoint: recorded before training begins, begun once.

    no record   -> resume from the origin; then write branch.json and move newer checkpoints to abandoned/
    a record    -> continue the branch's newest checkpoint; then finish moving if a kill came in between

    another     -> finish moving what the old record says, then as without one: a branch of a branch

Invariant: nothing is deleted, nothing is moved before the checkpoint has been loaded, and the same command never starts
the same branch twice. What the run had before a branch stays: older ones in their place, newer ones in abandoned/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.checkpoint.catalog import Found, find_abandoned, list_checkpoints, read_checkpoint
from dist_train.checkpoint.manifest import ABANDONED, BRANCH_FILE, CHECKPOINTS, MANIFEST_NAME
from dist_train.checkpoint.resume import (
    ResumeRequest,
    Selector,
    is_named,
    not_found_message,
    select_candidates,
    select_named,
)
from dist_train.checkpoint.store import Store
from dist_train.errors import FormatVersionError, NoCheckpointError, StorageError

Json = Any


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request leads."""

    record: Json
    """The branch that the run is on then; None without one."""
    is_new: bool
    """Whether that branch is started now."""
    candidates: list[list[str]]
    """Root, path and manifest digest of the checkpoints to try, best first. Empty is a fresh start."""
    last_sequence: int
    """The highest that the run has used."""
    notes: list[str]
    """What people should know of the choice."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A checkpoint and the run directory that it lies in: this run's, or a read-only parent of it."""

    store: Store
    one: Found

    @property
    def sequence(self) -> int:
        return self.one.manifest.sequence if self.one.manifest else -1

    @property
    def candidate(self) -> list[str]:
        digest = self.one.manifest.digest if self.one.manifest else ""
        return [str(self.store.root), self.one.path, digest]


def read_record(places: Sequence[Store]) -> Json:
    """The branch that the run is on, None without one: what the first place with a branch.json says.

    Raises:
        StorageError: it is damaged, so that nobody can tell which checkpoints count.
    """
    for store in places:
        try:
            content = store.read(BRANCH_FILE)
        except OSError:
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            record = None
        wrong = _what_is_wrong(record)
        if wrong:
            raise StorageError(
                f"{store.shown(BRANCH_FILE)} is damaged: {wrong}. It says which checkpoint the run went on from, and "
                f"which ones count since. Put it back from a copy; or delete it, and say with resume= which checkpoint "
                f"to go on from (`dist-train ls {store.given} --all` lists them)."
            )
        root, *rest = record["origin"]
        return {**record, "origin": [root or str(store.root), *rest]}
    return None


def _what_is_wrong(record: Json) -> str:
    """With the content of a branch.json; empty where it is sound."""
    if not isinstance(record, dict):
        return "it is no JSON object"
    origin = record.get("origin")
    if not isinstance(origin, list) or len(origin) != 3 or not all(isinstance(part, str) for part in origin):
        return f"expected `origin` to be [run directory, path, digest], found {origin!r}"
    if not isinstance(record.get("requested"), str):
        return f"expected `requested` to be a text, found {record.get('requested')!r}"
    for name in ("origin_sequence", "first_sequence", "attempt"):
        if not isinstance(record.get(name), int):
            return f"expected `{name}` to be a whole number, found {record.get(name)!r}"
    if not isinstance(record.get("branch_sequence", 0), int) or not isinstance(record.get("skip", []), list):
        return "expected `branch_sequence` to be a whole number and `skip` a list"
    return ""


def find_route(store: Store, parents: Sequence[Store], request: ResumeRequest, attempt: int) -> Route:
    """Where a request leads in a run directory and its read-only parents. Changes nothing.

    Raises:
        NoCheckpointError, ConfigError: what is asked for cannot be had.
        StorageError: branch.json is damaged.
        FormatVersionError: a checkpoint was written by a newer version.
    """
    placed, notes = place(store, parents)
    record = read_record([store, *parents])
    is_new = request.kind == "branch" and (record is None or record["requested"] != request.text)
    if is_new:
        record = new_record(store, record, request, placed, attempt)
    last = max([last_sequence(record), *(each.sequence for each in placed)], default=0)
    if request.kind == "branch":
        return Route(record, is_new, candidates(record, placed), last, notes)
    current = [each for each in placed if not is_left_behind(record, each.one)]
    chosen = select_candidates(request, [each.one for each in current], str(store.root))
    tried = [each.candidate for one in chosen for each in current if each.one is one]
    if record is not None and request.kind != "never":  # its origin may lie elsewhere; then what is older here
        first = candidates(record, placed)
        tried = first + [one for one in tried if one not in first]
    return Route(record, is_new, tried, last, notes)


def place(store: Store, parents: Sequence[Store]) -> tuple[list[Placed], list[str]]:
    """Every checkpoint of the run, and what people should know.

    Of a parent only what this directory does not have itself, and nothing newer that does not follow from this
    directory's newest: two sessions that went on from one checkpoint are two lines, and the own one is continued.
    """
    own = [Placed(store, found) for found in list_checkpoints(store)]
    others = [Placed(one, found) for one in parents for found in list_checkpoints(one)]
    for each in (*others, *own):
        if isinstance(each.one.problem, FormatVersionError):
            raise each.one.problem
    newest = max(own, key=lambda each: each.sequence, default=None)
    manifests = [each.one.manifest for each in others if each.one.manifest]
    digest = newest.one.manifest.digest if newest and newest.one.manifest else ""
    follows = not digest or any(digest in (one.digest, one.parent, one.stripped_from) for one in manifests)
    taken = {each.sequence for each in own}
    placed, left = list(own), []
    for each in others:
        if each.sequence in taken:
            continue
        if newest is not None and not follows and each.sequence > newest.sequence:
            left.append(each)
            continue
        taken.add(each.sequence)
        placed.append(each)
    return placed, [_told_of_other_line(store, left)] if left else []


def _told_of_other_line(store: Store, left: Sequence[Placed]) -> str:
    newest = max(left, key=lambda each: each.sequence)
    path = newest.store.shown(newest.one.path)
    return (
        f"{path} is newer than what {store.given} holds, but does not follow from it: another session has gone on from "
        f"an older checkpoint. This directory's own newest is continued; to go on from the other one give its path as "
        f"resume=, or an empty run directory."
    )


def new_record(store: Store, record: Json, request: ResumeRequest, placed: Sequence[Placed], attempt: int) -> Json:
    """The branch that a request starts. Changes nothing.

    Args:
        record: the branch that the run is on until now.
        placed: every checkpoint of the run, its parents' too.

    Raises:
        NoCheckpointError: there is no such checkpoint, or it cannot be used.
    """
    assert request.selector is not None
    origin, is_ours = _find_origin(store, record, request, request.selector, placed)
    if origin.one.manifest is None:
        raise NoCheckpointError(
            f"resume={request.text!r} cannot be used: {origin.one.problem} Give another checkpoint "
            f"(`dist-train ls {store.given} --all` lists them)."
        )
    newest = max([last_sequence(record), *(one.sequence for one in placed)])
    return {
        "requested": request.text,
        "origin": origin.candidate,
        "origin_sequence": origin.sequence if is_ours else 0,
        "first_sequence": max(newest, origin.sequence) + 1,
        "attempt": attempt,
    }


def _find_origin(
    store: Store, record: Json, request: ResumeRequest, selector: Selector, placed: Sequence[Placed]
) -> tuple[Placed, bool]:
    """The checkpoint to start from, and whether it is one of this run's."""
    if selector.kind == "path":
        root, path = _locate(store, selector.path)
        _require_checkpoint(store, request.text, Store(root), path)
        is_ours = any(str(one.store.root) == root for one in placed) or root == str(store.root)
        return Placed(store if root == str(store.root) else Store(root), read_checkpoint(Store(root), path)), is_ours
    current = [one for one in placed if not is_left_behind(record, one.one)]
    chosen = select_named(selector, [one.one for one in current])
    if chosen is None:
        raise NoCheckpointError(_missing_message(store, request.text, selector, [one.one for one in current]))
    return next(one for one in current if one.one is chosen), True


def _missing_message(store: Store, text: str, selector: Selector, found: Sequence[Found]) -> str:
    """Why a name leads nowhere, and where the checkpoints lie that branches have left behind."""
    left = [read_checkpoint(store, path) for path in find_abandoned(store)]
    same = [one.path for one in left if one.manifest and is_named(selector, one.manifest)]
    told = not_found_message(text, selector, store.given, found, [store.shown(path) for path in same])
    others = len(left) - len(same)
    if others:
        what = f"{others} {'more' if same else 'checkpoints' if others > 1 else 'checkpoint'} that a branch left behind"
        told += f" {store.shown(ABANDONED)} holds {what}: `dist-train ls {store.given} --all` lists them."
    return f"resume={text!r}: {told}"


def last_sequence(record: Json) -> int:
    """The sequence that a branch counts on from; 0 without one."""
    return record["first_sequence"] - 1 if record else 0


def candidates(record: Json, placed: Sequence[Placed]) -> list[list[str]]:
    """The checkpoints to try, best first: the branch's own, then its origin."""
    own = [one for one in placed if one.one.manifest and one.sequence >= record["first_sequence"]]
    own.sort(key=lambda one: one.sequence, reverse=True)
    return [*(one.candidate for one in own), _origin_now(record)]


def _origin_now(record: Json) -> list[str]:
    """The branch's origin; by its present digest where retention has made it weights-only since."""
    root, path, digest = record["origin"]
    manifest = read_checkpoint(Store(root), path).manifest
    return [root, path, manifest.digest if manifest and manifest.stripped_from == digest else digest]


def settle(store: Store, record: Json) -> None:
    """Records the branch, then moves what it leaves behind; both only where not done yet."""
    if record is None:
        return
    before = read_record([store])
    if record != before:
        _move_what_is_left_behind(store, before, origin=record["origin"])
        store.replace(BRANCH_FILE, json.dumps(relative(store, record)).encode())
    _move_what_is_left_behind(store, record, origin=record["origin"])


def _move_what_is_left_behind(store: Store, record: Json, *, origin: list[str]) -> None:
    for one in list_checkpoints(store):
        if is_left_behind(record, one) and [str(store.root), one.path] != origin[:2]:
            _abandon(store, one.path, record["attempt"])


def is_from_before(record: Json, one: Found) -> bool:
    """Of the run as it was when the branch began, and still in its place."""
    if record is None or one.manifest is None or is_left_behind(record, one):
        return False
    return one.manifest.sequence < asked_for(record)


def asked_for(record: Json) -> int:
    """The first sequence of the newest branch that a person asked for, 0 without one: a run that has rolled back by
    itself is still on that, and keeps of its own past what the policy says.
    """
    return int(record.get("branch_sequence", record["first_sequence"])) if record else 0


def is_left_behind(record: Json, one: Found) -> bool:
    """Newer than the branch's origin and not the branch's own."""
    if record is None or one.manifest is None:
        return False
    return bool(record["origin_sequence"] < one.manifest.sequence < record["first_sequence"])


def relative(store: Store, record: Json) -> Json:
    """The record with an origin of this run directory by its path alone, so that the directory may be moved."""
    root, *rest = record["origin"]
    return {**record, "origin": ["" if root == str(store.root) else root, *rest]}


def _locate(store: Store, requested: str) -> tuple[str, str]:
    """The store's root and the path inside it; any other folder is a store of its own run directory."""
    places = [requested, str(store.path(f"{CHECKPOINTS}/{requested}")), str(store.path(requested))]
    full = os.path.realpath(next((one for one in places if os.path.isdir(one)), requested))
    root = os.path.realpath(store.root)
    if full.startswith(root + os.sep):
        return str(store.root), os.path.relpath(full, root)
    home = os.path.dirname(os.path.dirname(full))
    if f"{os.sep}{ABANDONED}{os.sep}" in full:  # one that a branch of another run has left behind
        home = full.partition(f"{os.sep}{ABANDONED}{os.sep}")[0]
    return home, os.path.relpath(full, home)


def _require_checkpoint(store: Store, text: str, there: Store, path: str) -> None:
    """Raises NoCheckpointError for a path of nothing, and for a folder of checkpoints that is none itself."""
    lists = f"`dist-train ls {store.given} --all` lists what this run has."
    if not there.is_directory(path):
        is_file = there.exists(path)
        what = "that is a file, expected the folder of a checkpoint" if is_file else "there is no such folder"
        raise NoCheckpointError(f"resume={text!r}: {what} ({there.path(path)}). {lists}")
    if there.exists(f"{path}/{MANIFEST_NAME}"):
        return
    for folder in (path, f"{path}/{CHECKPOINTS}"):
        names = [name for name in there.list(folder) if there.exists(f"{folder}/{name}/{MANIFEST_NAME}")]
        if names:
            holds = f"{names[0]}" if len(names) == 1 else f"{len(names)} of them, from {names[0]} to {names[-1]}"
            raise NoCheckpointError(
                f"resume={text!r}: {there.path(folder)} is no checkpoint, but holds {holds}. Give the path of one, "
                f"{there.path(f'{folder}/{names[-1]}')} for instance."
            )


def _abandon(store: Store, path: str, attempt: int) -> None:
    folder = f"{ABANDONED}/a{attempt:06d}"
    store.make_directory(folder)
    store.rename(path, f"{folder}/{path.rsplit('/', 1)[-1]}")
    store.sync_directory(folder)
    store.sync_directory(path.rsplit("/", 1)[0])
