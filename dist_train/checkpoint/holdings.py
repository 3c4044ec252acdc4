"""What retention looks at and how it acts: facts of a run directory in, a checkpoint deleted or stripped out.

    survey -> measure -> (prove) -> retention.decide -> carry_out, one by one

Invariant: whatever dies in between, each checkpoint that was not given up is whole, and what was given up is gone,
trash or swept by the next pass. What may go is `retention`'s business; needs neither torch nor the model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dist_train.checkpoint import branch
from dist_train.checkpoint.catalog import Found, find_abandoned, read_checkpoint
from dist_train.checkpoint.manifest import ABANDONED, CHECKPOINTS, CORRUPT_PREFIX, Manifest
from dist_train.checkpoint.pins import is_pinned, read_pins
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.retention import Decision, Holding, Place, Verdict
from dist_train.checkpoint.selection import find_checkpoints
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.stripping import strip
from dist_train.checkpoint.trash import discard
from dist_train.console import bytes_text

logger = logging.getLogger(__name__)
Json = Any
Check = Callable[[str, Manifest], str]
"""Reads a checkpoint back: what is wrong with it, "" where it is whole."""


def survey(
    store: Store, *, verified: Sequence[str] | set[str] = (), protected: Mapping[str, str] | None = None
) -> list[Holding]:
    """Every checkpoint folder of a run directory but those in flight or on the way out; without their sizes."""
    pins, record = read_pins(store), branch.read_record([store])
    found = find_checkpoints(store)
    why = {**_origin_of_unsaved_branch(store, record, found), **(protected or {})}

    def hold(one: Found, place: Place) -> Holding:
        unread = "cannot be used; the next start sets it aside" if one.manifest is None and place == "current" else ""
        return Holding(
            path=one.path,
            manifest=one.manifest,
            place=place,
            pinned=is_pinned(one.manifest, pins),
            verified=one.path in verified,
            protected=why.get(one.path, ""),
            before_branch=place == "current" and branch.is_from_before(record, one),
            problem=unread,
        )

    aside = [name for name in store.list(CHECKPOINTS) if name.startswith(CORRUPT_PREFIX)]
    return [
        *(hold(one, "abandoned" if branch.is_left_behind(record, one) else "current") for one in found),
        *(hold(read_checkpoint(store, path), "abandoned") for path in find_abandoned(store)),
        *(hold(read_checkpoint(store, f"{CHECKPOINTS}/{name}"), "corrupt") for name in aside),
    ]


def _origin_of_unsaved_branch(store: Store, record: Json, found: Sequence[Found]) -> dict[str, str]:
    """The one checkpoint of this directory that the branch can start from as long as it has none of its own."""
    if record is None or record["origin"][0] != str(store.root):
        return {}
    if any(one.manifest and one.manifest.sequence >= record["first_sequence"] for one in found):
        return {}
    return {record["origin"][1]: "a branch starts from it that has saved nothing yet"}


def measure(store: Store, holdings: Sequence[Holding]) -> tuple[list[Holding], int]:
    """The same with their sizes, and the bytes of everything else in the run directory."""
    sized = [replace(one, num_bytes=store.tree_bytes(one.path)) for one in holdings]
    return sized, max(store.tree_bytes() - sum(one.num_bytes for one in sized), 0)


def size_of_a_save(holdings: Sequence[Holding]) -> int:
    """Bytes that the next save will need: those of the newest full checkpoint; 0 before the first."""
    current = [one for one in holdings if one.place == "current" and one.manifest is not None]
    full = [one for one in current if one.manifest and one.manifest.stripped_from is None] or current
    return max(full, key=lambda one: one.sequence).num_bytes if full else 0


def prove(
    holdings: Sequence[Holding], judge: Callable[[Sequence[Holding]], Verdict], check: Check
) -> tuple[list[Holding], Verdict]:
    """Reads checkpoints back until as many have proved whole as law 6 asks for; a damaged one counts for nothing."""
    known = {one.path: one for one in holdings}
    while (verdict := judge(list(known.values()))).to_verify:
        one = known[verdict.to_verify[0]]
        assert one.manifest is not None
        problem = check(one.path, one.manifest)
        known[one.path] = replace(one, verified=not problem, problem=f"damaged: {problem}" if problem else "")
    return list(known.values()), verdict


def carry_out(store: Store, decision: Decision, *, unless: Callable[[], bool] = lambda: False) -> bool:
    """Deletes or strips one checkpoint; False where that was not to be (pinned meanwhile, gone, an error).

    Args:
        unless: asked as pins are, once more when the checkpoint is out of the way: it is put back where this says so.
    """
    one = decision.holding

    def must_stay() -> bool:
        return is_pinned(one.manifest, read_pins(store)) or unless()

    if must_stay():
        return False
    if decision.action == "delete":
        gone = store.exists(one.path) and discard(store, one.path, unless=must_stay)
        folder = one.path.rpartition("/")[0]
        if folder.startswith(f"{ABANDONED}/") and not store.list(folder):
            with contextlib.suppress(OSError):
                store.remove_tree(folder)
        return gone
    assert one.manifest is not None
    try:
        return strip(store, one.path, one.manifest, is_pinned=must_stay)
    except OSError as error:
        logger.warning("%s keeps its optimizer until the next commit: %s.", store.path(one.path), error)
        return False


def shortfall_text(verdict: Verdict, policy: CheckpointPolicy, where: str) -> str:
    """One paragraph: why the budget cannot be kept, and what would help."""
    stay = [one for one in verdict.decisions if one.action != "delete"]
    size = bytes_text(sum(one.bytes_after for one in stay))
    need = bytes_text(verdict.bytes_after + verdict.reserve_bytes)
    room = f", {bytes_text(verdict.reserve_bytes)} of room for the next save" if verdict.reserve_bytes else ""
    pinned = sum(one.holding.pinned for one in stay)
    help_by = ["raise max_bytes"]
    help_by += [f"`dist-train unpin` {'some of the' if pinned > 1 else 'the'} {pinned} pinned"] if pinned else []
    help_by += ["lower keep_best"] if policy.keep_best > 1 else []
    help_by += ["give keep_optimizer=1, so that older ones become weights-only"] if not policy.keep_optimizer else []
    help_by += ["give keep_last=1, so that one is enough"] if policy.keep_last > 1 else []
    help_by += ["move other files out of it"] if verdict.other_bytes * 10 > verdict.bytes_after else []
    return (
        f"max_bytes={policy.max_bytes} cannot be kept in {where}: {need} are needed, of which {size} are {len(stay)} "
        f"checkpoints that must stay (the newest that verify, best and pinned ones)"
        f"{room}, and {bytes_text(verdict.other_bytes)} other files. Nothing more is deleted for it. What helps: "
        f"{'; '.join(help_by)}."
    )
