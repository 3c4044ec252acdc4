"""Retention on request, from outside of the run, which may be training meanwhile.

    open_pruning -> foresee (reads nothing) | prove (reads back what law 6 asks for) -> carry_out, one by one

Invariant: what the run may be using stays. While an owner lives that is: staging folders, the newest two checkpoints,
and the one that its attempt resumed from until it has committed its first. An attempt of which nobody can tell yet
where it resumes from stops everything, whenever it starts: who holds the directory is asked first of all, and again
around each deletion.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dist_train.checkpoint.catalog import committed, list_checkpoints
from dist_train.checkpoint.holdings import Check, carry_out, measure, prove, size_of_a_save, survey
from dist_train.checkpoint.manifest import ATTEMPTS, EVENTS_LOG, Manifest
from dist_train.checkpoint.ownership import newest_attempt, read_owner
from dist_train.checkpoint.parents import read_run_id
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.retention import Decision, Holding, Place, Verdict, decide
from dist_train.checkpoint.store import Store
from dist_train.errors import ConfigError, NoCheckpointError, RunInUseError

Json = Any
NEWEST_OF_A_LIVING_RUN = 2


@dataclass(frozen=True, slots=True)
class _Hold:
    """Who holds the directory: changes with each attempt that starts, at once."""

    newest: int
    """The newest attempt."""
    owner: int | None
    """The one that has said who it is; None where nobody has, as in a run that was unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What is to be pruned by which policy, as of the moment that it was opened."""

    store: Store
    policy: CheckpointPolicy
    unwanted: Collection[Place]
    run_id: str
    monitor: str | None
    hold: _Hold
    is_live: bool
    holdings: list[Holding] = field(repr=False)
    other_bytes: int

    def judge(self, holdings: Sequence[Holding]) -> Verdict:
        """The decisions, as far as what is verified allows."""
        return decide(
            holdings,
            self.policy,
            run_id=self.run_id,
            monitor=self.monitor,
            other_bytes=self.other_bytes,
            reserve_bytes=size_of_a_save(holdings) if self.is_live else 0,
            unwanted=self.unwanted,
        )

    def foresee(self) -> tuple[Verdict, list[str]]:
        """What would be done if all is whole, and what would be read back before."""
        everything = self.judge([replace(one, verified=True) for one in self.holdings])
        if not everything.given_up():
            return everything, []
        to_read: list[str] = []

        def note(path: str, manifest: Manifest) -> str:
            to_read.append(path)
            return ""

        return self.prove(note), to_read

    def prove(self, check: Check) -> Verdict:
        """What is to be done, now that enough has proved whole."""
        return prove(self.holdings, self.judge, check)[1]

    def carry_out(self, verdict: Verdict) -> Iterator[Decision]:
        """Does it; yields what was done.

        Raises:
            RunInUseError: a new attempt began meanwhile, of which nothing is known.
        """
        for decision in verdict.given_up():
            self._require_same_hold()
            if carry_out(self.store, decision, unless=lambda: _look_up(self.store) != self.hold):
                yield decision
            else:  # it may have been put back for the sake of an attempt that began at that moment
                self._require_same_hold()

    def _require_same_hold(self) -> None:
        if _look_up(self.store) != self.hold:
            raise RunInUseError(
                f"A new attempt of the run began in {self.store.given} while it was pruned: what is left to do was "
                f"left alone. Run the same command again."
            )


def open_pruning(store: Store, changes: dict[str, Json], unwanted: Collection[Place]) -> Pruning:
    """Looks at the run directory; changes nothing.

    Args:
        changes: settings of the policy that differ from the recorded one.

    Raises:
        NoCheckpointError: the run has no checkpoint that can be used.
        RunInUseError: an attempt lives of which nobody can tell where it resumes from.
    """
    hold = _look_up(store)  # before all else: whatever an attempt does that starts later, it shows
    _require_settled(store, hold)
    known = committed(list_checkpoints(store))
    if not known:
        raise NoCheckpointError(f"{store.given} holds no checkpoint that can be used: there is nothing to prune.")
    newest = known[-1][1]
    policy = replace(recorded_policy(store, newest), **changes)
    owner = read_owner(store)
    is_live = owner is not None and not owner.is_known_to_be_gone()
    protected = _used_by_the_living(store, known, hold.newest) if is_live else {}
    holdings, other_bytes = measure(store, survey(store, protected=protected))
    if (now := _look_up(store)) != hold:
        raise _starting(store, now.newest)
    best = newest.best.monitor if newest.best else None
    return Pruning(
        store=store,
        policy=policy,
        unwanted=unwanted,
        run_id=read_run_id(store) or newest.run_id,
        monitor=policy.monitor or best,
        hold=hold,
        is_live=is_live,
        holdings=holdings,
        other_bytes=other_bytes,
    )


def recorded_policy(store: Store, newest: Manifest) -> CheckpointPolicy:
    """The policy that the newest checkpoint was saved by; the default where it says none."""
    try:
        return CheckpointPolicy.from_json(newest.settings.get("config", {}).get("policy") or {})
    except (ConfigError, TypeError) as error:
        raise ConfigError(
            f"The policy that the newest checkpoint of {store.given} was saved by cannot be read: {error} It may be "
            f"of a newer version of dist_train; upgrade it."
        ) from error


def _look_up(store: Store) -> _Hold:
    newest, owner = newest_attempt(store), read_owner(store)
    return _Hold(newest, owner.attempt if owner else None)


def _require_settled(store: Store, hold: _Hold) -> None:
    """An attempt takes its number first and says who it is then; in between nobody can tell whether it lives."""
    if hold.owner is not None and hold.owner < hold.newest:
        marker = store.shown(f"{ATTEMPTS}/{hold.newest:06d}")
        raise _starting(
            store,
            hold.newest,
            f" If nothing is starting there, it died in its first moment (on a full disk, for instance): remove "
            f"{marker}, an empty file that is all of it, and run the same command again.",
        )


def _starting(store: Store, attempt: int, more: str = "") -> RunInUseError:
    return RunInUseError(
        f"Attempt {attempt} is starting in {store.given}, and nobody can tell yet which checkpoint it resumes from. "
        f"Nothing was changed. Try again in a moment, when it trains.{more}"
    )


def _used_by_the_living(store: Store, known: Sequence[tuple[str, Manifest]], attempt: int) -> dict[str, str]:
    """Paths that a living attempt may be using, and why."""
    why = f"one of the newest {NEWEST_OF_A_LIVING_RUN} while attempt {attempt} lives"
    used = {path: why for path, _ in known[-NEWEST_OF_A_LIVING_RUN:]}
    if any(manifest.attempt == attempt for _, manifest in known):
        return used
    origin = _origin_of(store, attempt)
    if origin is None:
        raise _starting(store, attempt)
    used |= {path: f"attempt {attempt} resumed from it" for path, one in known if _is_named(one, origin)}
    return used


def _origin_of(store: Store, attempt: int) -> str | None:
    """Digest of the manifest that an attempt resumed from, "" for a fresh start, None where it is not known yet."""
    lines = store.read(EVENTS_LOG).splitlines() if store.exists(EVENTS_LOG) else []
    for line in reversed(lines):
        try:
            event = json.loads(line)
            if event["attempt"] == attempt and event["event"] in ("started", "resumed"):
                return str(event.get("digest", ""))
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _is_named(manifest: Manifest, digest: str) -> bool:
    return digest in (manifest.digest, manifest.stripped_from)
