"""What to keep, what to make weights-only and what to delete: a pure choice with its reasons; `keeper` acts on it.

    holdings, policy -> decide -> a Decision for each: keep, strip or delete, and why

Invariant (law 6): only committed checkpoints of this run are given up, never the newest, a pinned, a best or a
protected one, and never so many that fewer than two verified ones stay (one if `keep_last=1`). The budget yields to
that. Deciding again after the decisions were carried out changes nothing more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.policy import CheckpointPolicy

Place = Literal["current", "abandoned", "corrupt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One checkpoint folder, as far as retention must know it."""

    path: str
    manifest: Manifest | None
    """None where it cannot be read."""
    num_bytes: int = 0
    """Of the whole folder; counts for the budget only."""
    place: Place = "current"
    pinned: bool = False
    verified: bool = False
    """Its bytes were written or read back by whoever asks."""
    protected: str = ""
    """Why it must stay whatever the policy says; empty where nothing says so."""
    problem: str = ""
    """Why it counts for nothing, though it lies among the committed ones."""

    @property
    def sequence(self) -> int:
        return self.manifest.sequence if self.manifest else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of one checkpoint."""

    holding: Holding
    action: Literal["keep", "strip", "delete"]
    """strip: keep it without the state of optimizer and scheduler."""
    reason: str

    @property
    def bytes_after(self) -> int:
        return 0 if self.action == "delete" else self.holding.num_bytes - self.bytes_freed

    @property
    def bytes_freed(self) -> int:
        if self.action == "delete":
            return self.holding.num_bytes
        return _optimizer_bytes(self.holding) if self.action == "strip" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All decisions, oldest first, and what they come to."""

    decisions: list[Decision]
    to_verify: list[str]
    """Nothing may be given up yet: paths of which enough must prove whole first, the most useful ones first."""
    other_bytes: int
    """Of everything else in the run directory."""
    reserve_bytes: int
    """Room for the next save."""
    budget: int | None

    @property
    def bytes_now(self) -> int:
        return self.other_bytes + sum(one.holding.num_bytes for one in self.decisions)

    @property
    def bytes_after(self) -> int:
        return self.other_bytes + sum(one.bytes_after for one in self.decisions)

    @property
    def shortfall(self) -> int:
        """Bytes by which the budget is missed even so; 0 where it is kept."""
        return 0 if self.budget is None else max(self.bytes_after + self.reserve_bytes - self.budget, 0)

    def given_up(self) -> list[Decision]:
        return [one for one in self.decisions if one.action != "keep"]


def select_best(
    checkpoints: Sequence[tuple[str, Manifest]], monitor: str | None, mode: str, count: int
) -> list[tuple[str, Manifest]]:
    """Up to `count` checkpoints with the best monitored metric, best first; the older one wins a tie."""
    if monitor is None:
        return []
    scored = [one for one in checkpoints if _is_number(one[1].metrics.get(monitor))]
    sign = 1 if mode == "min" else -1
    return sorted(scored, key=lambda one: (sign * one[1].metrics[monitor], one[1].sequence))[:count]


def decide(
    holdings: Iterable[Holding],
    policy: CheckpointPolicy,
    *,
    run_id: str,
    monitor: str | None = None,
    other_bytes: int = 0,
    reserve_bytes: int = 0,
    unwanted: Collection[Place] = (),
) -> Verdict:
    """What becomes of every checkpoint of a run directory.

    Args:
        monitor: the metric that decides what is best.
        other_bytes: of everything in the run directory that is no holding; for the budget.
        reserve_bytes: size of the next save; for the budget.
        unwanted: `abandoned`, `corrupt`: give these up altogether, but for pinned ones.
    """
    everything = sorted(holdings, key=lambda one: (one.sequence, one.path))
    own = [one for one in everything if _is_own(one, run_id) and one.place == "current"]
    reasons = _reasons_to_keep(own, policy, monitor)
    kept = [one for one in own if one.path in reasons]
    least = min(1 if policy.keep_last == 1 else 2, len(own))
    proven = [one for one in kept if one.verified]
    choice = _Choice(everything, run_id, reasons)
    to_verify: list[str] = []
    if not own or len(proven) < least:
        to_verify = [one.path for one in reversed(kept) if not one.verified]
    else:
        best = {path for path, _ in _best(own, policy, monitor)}
        safe = best | {one.path for one in [own[-1], *proven[-least:]]}
        choice.delete([one for one in own if one.path not in reasons], _why_not(own, policy))
        choice.clear(unwanted)
        choice.strip(_to_strip(own, kept, policy), policy)
        choice.fit([one for one in kept if one.path not in safe], policy, other_bytes + reserve_bytes)
    return Verdict(
        decisions=choice.decisions(),
        to_verify=to_verify,
        other_bytes=other_bytes,
        reserve_bytes=reserve_bytes,
        budget=policy.budget,
    )


class _Choice:
    """Decisions in the making: everything is kept until something is said against it."""

    def __init__(self, everything: list[Holding], run_id: str, reasons: dict[str, list[str]]) -> None:
        self._run_id = run_id
        self._decisions = {
            one.path: Decision(holding=one, action="keep", reason=_why_kept(one, run_id, reasons)) for one in everything
        }

    def decisions(self) -> list[Decision]:
        return list(self._decisions.values())

    def delete(self, holdings: Iterable[Holding], why: dict[str, str]) -> None:
        for one in holdings:
            self._decisions[one.path] = Decision(holding=one, action="delete", reason=why[one.path])

    def clear(self, places: Collection[Place]) -> None:
        """Gives up what no longer belongs to the run's history."""
        for place, why in (("abandoned", "left behind by a branch"), ("corrupt", "set aside, cannot be used")):
            if place in places:
                dispensable = self._dispensable(place)
                self.delete(dispensable, dict.fromkeys((one.path for one in dispensable), why))

    def strip(self, holdings: Iterable[Holding], policy: CheckpointPolicy) -> None:
        count = policy.keep_optimizer
        older = "older than the newest" if count == 1 else f"older than the newest {count}"
        for one in holdings:
            reason = f"{self._decisions[one.path].reason}; {older}"
            self._decisions[one.path] = Decision(holding=one, action="strip", reason=reason)

    def fit(self, kept: Iterable[Holding], policy: CheckpointPolicy, besides: int) -> None:
        """Deletes within the budget's need: abandoned, corrupt, recent, and permanent ones last; the oldest first."""
        if policy.budget is None:
            return
        recent = [one for one in kept if not (one.pinned or one.protected)]
        recent.sort(key=lambda one: _permanence(one, policy) != "")
        why = f"over the budget of {policy.max_bytes}" + ("" if isinstance(policy.max_bytes, str) else " bytes")
        left = besides + sum(one.bytes_after for one in self._decisions.values())
        for one in [*self._dispensable("abandoned"), *self._dispensable("corrupt"), *recent]:
            if left <= policy.budget:
                return
            if self._decisions[one.path].action == "delete":
                continue
            left -= self._decisions[one.path].bytes_after
            self._decisions[one.path] = Decision(holding=one, action="delete", reason=why)

    def _dispensable(self, place: str) -> list[Holding]:
        """Those of a place that may go; one that was set aside unread was found in this run's own directory."""
        found = [one.holding for one in self._decisions.values() if one.holding.place == place]
        return [one for one in found if (_is_own(one, self._run_id) or one.manifest is None) and not _must_stay(one)]


def _is_own(one: Holding, run_id: str) -> bool:
    return one.manifest is not None and one.manifest.run_id == run_id and not one.problem


def _must_stay(one: Holding) -> bool:
    return one.pinned or bool(one.protected)


def _current(own: Sequence[Holding]) -> list[Holding]:
    """Without those whose step was saved again: before its evaluation and after it counts once."""
    newest_of_step = {_step(one): one.path for one in own}
    return [one for one in own if newest_of_step[_step(one)] == one.path]


def _reasons_to_keep(own: Sequence[Holding], policy: CheckpointPolicy, monitor: str | None) -> dict[str, list[str]]:
    """By path; what is not in it is not wanted."""
    reasons: dict[str, list[str]] = {}
    current = _current(own)
    newest = "the newest" if policy.keep_last == 1 else f"one of the newest {policy.keep_last}"
    for one in current[-policy.keep_last :]:
        reasons.setdefault(one.path, []).append("the newest" if one is current[-1] else newest)
    best = f"best {monitor}" if policy.keep_best == 1 else f"one of the best {policy.keep_best} by {monitor}"
    for path, _ in _best(own, policy, monitor):
        reasons.setdefault(path, []).append(best)
    for one in own:
        permanent = _permanence(one, policy) if one in current else ""
        told = [text for text in (permanent, "pinned" if one.pinned else "", one.protected) if text]
        if told:
            reasons.setdefault(one.path, []).extend(told)
    return reasons


def _best(own: Sequence[Holding], policy: CheckpointPolicy, monitor: str | None) -> list[tuple[str, Manifest]]:
    rows = [(one.path, one.manifest) for one in own if one.manifest]
    return select_best(rows, monitor, policy.mode, policy.keep_best)


def _permanence(one: Holding, policy: CheckpointPolicy) -> str:
    """Why it stays for ever, "" where it does not."""
    assert one.manifest is not None
    progress = one.manifest.progress
    epochs = 0 if progress.samples_into_epoch else progress.epochs_completed
    if policy.keep_every_epochs and epochs and epochs % policy.keep_every_epochs == 0:
        return _every(policy.keep_every_epochs, "epoch")
    if policy.keep_every_steps and progress.global_step and progress.global_step % policy.keep_every_steps == 0:
        return _every(policy.keep_every_steps, "step")
    return ""


def _every(count: int, noun: str) -> str:
    tail = "th" if 10 <= count % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"every {noun}" if count == 1 else f"every {count}{tail} {noun}"


def _why_not(own: Sequence[Holding], policy: CheckpointPolicy) -> dict[str, str]:
    current = {one.path for one in _current(own)}
    older = f"older than the newest {policy.keep_last}" if policy.keep_last > 1 else "older than the newest"
    return {one.path: older if one.path in current else "its step was saved again" for one in own}


def _why_kept(one: Holding, run_id: str, reasons: dict[str, list[str]]) -> str:
    if one.problem:
        return one.problem
    if one.pinned and one.place != "current":
        return "pinned"
    if one.manifest is not None and one.manifest.run_id != run_id:
        return "belongs to another run"
    if one.place == "abandoned":
        return one.protected or "left behind by a branch"
    if one.place == "corrupt":
        return one.protected or "set aside, cannot be used"
    return ", ".join(reasons.get(one.path, ["stays until enough newer ones are verified"]))


def _to_strip(own: Sequence[Holding], kept: Sequence[Holding], policy: CheckpointPolicy) -> list[Holding]:
    """Those that become weights-only; as many verified ones as law 6 asks for stay full."""
    if policy.keep_optimizer is None:
        return []
    full = [one for one in kept if one.verified and _optimizer_bytes(one)]
    least = 1 if policy.keep_last == 1 or policy.keep_optimizer == 1 else 2
    if len(full) < least:
        return []
    exempt = {one.path for one in [*_current(own)[-policy.keep_optimizer :], *full[-least:]]}
    return [one for one in kept if one.path not in exempt and not _must_stay(one) and _optimizer_bytes(one)]


def _optimizer_bytes(one: Holding) -> int:
    manifest = one.manifest
    return sum(manifest.files[name].size for name in manifest.optimizer_files) if manifest else 0


def _step(one: Holding) -> int:
    return one.manifest.progress.global_step if one.manifest else -1


def _is_number(value: float | None) -> bool:
    return value is not None and value == value
