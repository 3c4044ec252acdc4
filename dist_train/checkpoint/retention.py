"""Which checkpoints to delete: a pure choice; the checkpointer deletes, after a newer commit and never before.

Invariant (law 6): never the newest, never one that is protected (resumed from, pinned), never so many that fewer than
two verified ones stay (one if `keep_last=1`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.policy import CheckpointPolicy


def select_best(
    checkpoints: Sequence[tuple[str, Manifest]], monitor: str | None, mode: str, count: int
) -> list[tuple[str, Manifest]]:
    """Up to `count` checkpoints with the best monitored metric, best first; the older one wins a tie."""
    if monitor is None:
        return []
    scored = [one for one in checkpoints if _is_number(one[1].metrics.get(monitor))]
    sign = 1 if mode == "min" else -1
    return sorted(scored, key=lambda one: (sign * one[1].metrics[monitor], one[1].sequence))[:count]


def select_deletions(
    checkpoints: Sequence[tuple[str, Manifest]],
    policy: CheckpointPolicy,
    *,
    run_id: str,
    verified: Collection[str],
    protected: Collection[str] = (),
    monitor: str | None = None,
) -> list[str]:
    """Paths to delete, oldest first.

    Args:
        checkpoints: path and manifest of every committed checkpoint in the directory.
        verified: paths whose bytes this attempt wrote or read back.
        protected: paths that must stay whatever the policy says.
        monitor: the metric that decides what is best.
    """
    own = sorted((one for one in checkpoints if one[1].run_id == run_id), key=lambda one: one[1].sequence)
    # A step that was saved before its evaluation and again after it counts once.
    newest_of_step = {manifest.progress.global_step: path for path, manifest in own}
    current = [path for path, manifest in own if newest_of_step[manifest.progress.global_step] == path]
    keep = {*current[-policy.keep_last :], *protected}
    keep |= {path for path, _ in select_best(own, monitor, policy.mode, policy.keep_best)}
    minimum = 1 if policy.keep_last == 1 else 2
    if len([path for path, _ in own if path in keep and path in verified]) < minimum:
        return []
    return [path for path, _ in own if path not in keep]


def _is_number(value: float | None) -> bool:
    return value is not None and value == value
