"""Links and retention after a commit and never before, in the writer's thread of the main rank.

Invariant: nothing is given up while a newer attempt owns the directory, and before the first commit of an attempt only
where the next save would not fit the budget. What may go is decided in `retention`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dist_train.checkpoint.holdings import carry_out, measure, prove, shortfall_text, size_of_a_save, survey
from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.retention import Holding, Verdict, decide, select_best
from dist_train.checkpoint.roll_back import select_proved
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.stripping import sweep
from dist_train.checkpoint.verify import verify_checkpoint
from dist_train.checkpoint.writer import Committed, Event, Pruned, Stripped

logger = logging.getLogger(__name__)


class Keeper:
    """Links and retention of one attempt, in the writer's thread of the main rank.

    Args:
        is_lost: whether a newer attempt owns the directory; what is in it is its business then.
        clean_steps: updates after which a checkpoint has proved good; the newest that has, and the next that will,
            stay. None keeps none for that.
    """

    def __init__(
        self, store: Store, policy: CheckpointPolicy, is_lost: Callable[[], bool], clean_steps: int | None = None
    ) -> None:
        self._clean_steps = clean_steps
        self._store = store
        self._policy = policy
        self._is_lost = is_lost
        self._verified: set[str] = set()
        self._protected: dict[str, str] = {}
        self._told_of_links = self._told_of_budget = False

    def resumed_from(self, path: str) -> None:
        """It was verified, and must stay until something newer is durable."""
        self._verified.add(path)
        self._protected = {path: "resumed from"}

    def after_commit(self, done: Committed, monitor: str | None) -> list[Event]:
        """Points the links, then gives up what the policy does not want.

        Raises:
            OSError: the rest is left to the next commit.
        """
        self._verified.add(done.path)
        if self._is_lost():
            return []
        holdings = survey(self._store, verified=self._verified, protected=self._protected)
        current = [(one.path, one.manifest) for one in holdings if one.place == "current" and one.manifest]
        own = [one for one in current if one[1].run_id == done.manifest.run_id]
        self._point_links(done.path, own, monitor)
        for path, manifest in own:
            sweep(self._store, path, manifest)
        if self._clean_steps is not None:
            proved = select_proved(own, done.manifest.progress.global_step - self._clean_steps)
            holdings = [replace(one, protected=one.protected or proved.get(one.path, "")) for one in holdings]
        verdict = self._judge(done.manifest.run_id, monitor)(holdings)
        self._protected = {}  # once something newer is durable, the origin of this attempt is like any other
        return list(self._carry_out(verdict))

    def make_room(self, run_id: str, monitor: str | None) -> list[Event]:
        """At the start: an attempt that was killed before its retention has left no room for the next save."""
        judge = self._judge(run_id, monitor)
        try:
            holdings = survey(self._store, verified=self._verified, protected=self._protected)
            sized, other_bytes = measure(self._store, holdings)
            total = other_bytes + sum(one.num_bytes for one in sized)
            if self._policy.budget is None or total + size_of_a_save(sized) <= self._policy.budget:
                return []
            _, verdict = prove(holdings, judge, self._check)
            return list(self._carry_out(verdict))
        except OSError as error:
            logger.warning("No room was made in %s before the first save: %s.", self._store.root, error)
            return []

    def _judge(self, run_id: str, monitor: str | None) -> Callable[[Sequence[Holding]], Verdict]:
        def judge(holdings: Sequence[Holding]) -> Verdict:
            other_bytes = reserve_bytes = 0
            if self._policy.budget is not None:  # without a budget nobody asks for sizes
                holdings, other_bytes = measure(self._store, holdings)
                reserve_bytes = size_of_a_save(holdings)
            return decide(
                holdings,
                self._policy,
                run_id=run_id,
                monitor=monitor,
                other_bytes=other_bytes,
                reserve_bytes=reserve_bytes,
            )

        return judge

    def _check(self, path: str, manifest: Manifest) -> str:
        damages = verify_checkpoint(self._store, path, manifest)
        self._verified |= set() if damages else {path}
        return "; ".join(map(str, damages))

    def _carry_out(self, verdict: Verdict) -> Iterator[Event]:
        if verdict.shortfall and not verdict.to_verify and not self._told_of_budget:
            self._told_of_budget = True
            logger.warning("%s", shortfall_text(verdict, self._policy, str(self._store.root)))
        for decision in verdict.given_up():
            if self._is_lost():
                return
            if carry_out(self._store, decision):
                kind = Pruned if decision.action == "delete" else Stripped
                yield kind(path=decision.holding.path, reason=decision.reason, num_bytes=decision.bytes_freed)

    def _point_links(self, latest: str, own: list[tuple[str, Manifest]], monitor: str | None) -> None:
        best = select_best(own, monitor, self._policy.mode, 1)
        try:
            self._store.link("latest", latest)
            if best:
                self._store.link("best", best[0][0])
        except OSError as error:
            if not self._told_of_links:
                logger.warning(
                    "No 'latest' and 'best' links in %s: %s. Nothing depends on them.", self._store.root, error
                )
            self._told_of_links = True
