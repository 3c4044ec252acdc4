"""Going back to a checkpoint that proved good: a branch that the run starts by itself, recorded before anything moves.

    decide    branch.json: from where on, and which windows are left out     the one moment that counts
    (then)    any start, in this process or another, follows the record as it follows a branch

Invariant: a kill before the record forgets the whole decision, which the replay makes again; after it nothing is
forgotten: where to go back to, and the ledger, stand in one file that is replaced durably.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dist_train.checkpoint import branch
from dist_train.checkpoint.manifest import BRANCH_FILE, Manifest
from dist_train.checkpoint.store import Store

Json = Any


def decide(
    store: Store,
    parents: Sequence[Store],
    proved_step: int,
    *,
    attempt: int,
    last_sequence: int,
    skip: Callable[[int], list[Json]],
) -> Json:
    """Records the roll-back to the newest checkpoint that proved good; on the main rank, with no save in flight.

    Args:
        proved_step: checkpoints up to this step have.
        last_sequence: the highest that the run has used.
        skip: the ledger, given the step that is gone back to.

    Returns:
        Path and step of that checkpoint; None where there is none, and nothing was changed.
    """
    placed, _ = branch.place(store, parents)
    record = branch.read_record([store, *parents])
    current = [each for each in placed if not branch.is_left_behind(record, each.one)]
    origin = max(
        (each for each in current if each.one.manifest and is_good(each.one.manifest, proved_step)),
        key=lambda each: each.sequence,
        default=None,
    )
    if origin is None or origin.one.manifest is None:
        return None
    step = origin.one.manifest.progress.global_step
    newest = max([last_sequence, branch.last_sequence(record), *(each.sequence for each in placed)])
    replaced = {
        "requested": record["requested"] if record else "",
        "origin": origin.candidate,
        "origin_sequence": origin.sequence,
        "first_sequence": newest + 1,
        "attempt": attempt,
        "branch_sequence": branch.asked_for(record),
        "skip": skip(step),
    }
    store.replace(BRANCH_FILE, json.dumps(branch.relative(store, replaced)).encode())
    return [origin.store.shown(origin.one.path), step]


def is_good(manifest: Manifest, proved_step: int) -> bool:
    """Whether a run can go back to it: proved, and with all that a resume needs."""
    return manifest.progress.global_step <= proved_step and manifest.stripped_from is None


def select_proved(checkpoints: Iterable[tuple[str, Manifest]], proved_step: int) -> dict[str, str]:
    """What retention protects for a roll-back, path -> why: the one that it would go back to, and the one that will
    prove good next, which a run that saves often would give up before.
    """
    full = [(manifest.sequence, path, manifest) for path, manifest in checkpoints if manifest.stripped_from is None]
    full.sort(key=lambda one: one[0])
    good = [path for _, path, manifest in full if is_good(manifest, proved_step)]
    next_ones = [path for _, path, _ in full if path not in good]
    return {
        **dict.fromkeys(good[-1:], "proved good, to roll back to"),
        **dict.fromkeys(next_ones[:1], "the next to prove good, to roll back to"),
    }
