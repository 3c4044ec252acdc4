"""Law 6: what may be deleted or stripped, and why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.checkpoint.manifest import FileEntry, Manifest
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.retention import Decision, Holding, Verdict, decide, select_best
from dist_train.checkpoint.stripping import weights_only
from tests.support.manifests import manifest

Row = tuple[str, Manifest]
WEIGHTS, OPTIMIZER = 100, 200
FILES = {
    "model-00001-of-00001.safetensors": FileEntry(size=WEIGHTS, digest=""),
    "optimizer-00001-of-00001.safetensors": FileEntry(size=OPTIMIZER, digest=""),
}


def row(sequence: int, value: float | None = None, *, run_id: str = "run", **fields: Any) -> Row:
    metrics = {} if value is None else {"val": value}
    return f"c/{run_id}-{sequence}", manifest(sequence, metrics=metrics, run_id=run_id, files=FILES, **fields)


def hold(one: Row, **fields: Any) -> Holding:
    given = {"verified": True, "num_bytes": one[1].num_bytes, **fields}
    return Holding(path=one[0], manifest=one[1], **given)


def judge(rows: list[Row | Holding], policy: CheckpointPolicy, **fields: Any) -> Verdict:
    holdings = [one if isinstance(one, Holding) else hold(one) for one in rows]
    return decide(holdings, policy, run_id="run", monitor="val", **fields)


def paths(verdict: Verdict, action: str) -> list[str]:
    return [one.holding.path.rpartition("-")[2] for one in verdict.decisions if one.action == action]


def delete(rows: list[Row | Holding], policy: CheckpointPolicy, **fields: Any) -> list[str]:
    return paths(judge(rows, policy, **fields), "delete")


def reasons(verdict: Verdict) -> dict[str, str]:
    return {one.holding.path.rpartition("-")[2]: one.reason for one in verdict.decisions}


def verified(rows: list[Row], *names: str) -> list[Row | Holding]:
    return [hold(one, verified=one[0].rpartition("-")[2] in names) for one in rows]


# The law


def some_holding(sequence: int, draw: Any) -> Holding:
    run_id, value, place, flags, epochs, same_step = draw
    step = sequence - 1 if same_step else sequence
    path, one = row(sequence, value, run_id=run_id, step=step, epochs=epochs)
    one = weights_only(one) if flags[3] else one
    pinned, is_verified, protected, _, broken = flags
    return Holding(
        path=path,
        manifest=None if broken and place == "corrupt" else one,
        num_bytes=one.num_bytes,
        place=place,
        pinned=pinned and not broken,
        verified=is_verified,
        protected="resumed from" if protected else "",
        problem="damaged" if broken and place == "current" else "",
    )


rarely = st.sampled_from([False, False, False, True])
draws = st.tuples(
    st.sampled_from(["run", "run", "run", "other"]),
    st.none() | st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]),
    st.sampled_from(["current", "current", "current", "abandoned", "corrupt"]),
    st.tuples(rarely, st.sampled_from([True, True, False]), rarely, rarely, rarely),
    st.integers(0, 4),
    rarely,
)
histories = st.lists(draws, max_size=9).map(lambda drawn: [some_holding(i, one) for i, one in enumerate(drawn, 1)])
optional = st.none() | st.integers(1, 3)
policies = st.builds(
    CheckpointPolicy,
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    keep_every_epochs=optional,
    keep_every_steps=optional,
    keep_optimizer=optional,
    max_bytes=st.none() | st.integers(1, 3000),
    mode=st.sampled_from(["min", "max"]),
)
besides = st.fixed_dictionaries(
    {
        "other_bytes": st.integers(0, 500),
        "reserve_bytes": st.integers(0, 500),
        "unwanted": st.sets(st.sampled_from(["abandoned", "corrupt"])),
    }
)


@settings(max_examples=100)
@given(histories, policies, besides, st.randoms(use_true_random=False))
def test_law_6_holds_for_every_history(
    holdings: list[Holding], policy: CheckpointPolicy, more: dict[str, Any], chance: Any
) -> None:
    shuffled = list(holdings)
    chance.shuffle(shuffled)
    verdict = judge(shuffled, policy, **more)  # type: ignore[arg-type]
    given_up = {one.holding.path: one for one in verdict.given_up()}
    gone = {path for path, one in given_up.items() if one.action == "delete"}
    own = [one for one in holdings if one.place == "current" and is_own(one)]
    assert len(verdict.decisions) == len(holdings), "one decision each"
    for one in holdings:
        decision = given_up.get(one.path)
        foreign = one.manifest is not None and one.manifest.run_id != "run"
        assert not (decision and (foreign or one.pinned or one.protected or one.problem)), f"{decision}"
        assert not (decision and decision.action == "strip" and one.place != "current"), f"{decision}"
    assert not own or own[-1].path not in given_up, "the newest"
    best = select_best([(one.path, one.manifest) for one in own if one.manifest], "val", policy.mode, policy.keep_best)
    assert not gone & {path for path, _ in best}, "a best one"
    least = min(1 if policy.keep_last == 1 else 2, len(own))
    stay = [one for one in own if one.path not in gone]
    assert not given_up or (own and len([one for one in stay if one.verified]) >= least), "below the verified minimum"
    stripped = set(given_up) - gone
    full = [one for one in stay if one.verified and one.path not in stripped and is_full(one)]
    enough = 1 if 1 in (policy.keep_last, policy.keep_optimizer) else 2
    assert not stripped or len(full) >= enough, "below the minimum of full ones"


def is_own(one: Holding) -> bool:
    return one.manifest is not None and one.manifest.run_id == "run" and not one.problem


def is_full(one: Holding) -> bool:
    return one.manifest is not None and bool(one.manifest.optimizer_files)


@settings(max_examples=100)
@given(histories, policies, besides)
def test_deciding_again_after_the_decisions_were_carried_out_changes_nothing(
    holdings: list[Holding], policy: CheckpointPolicy, more: dict[str, Any]
) -> None:
    once = judge(list(holdings), policy, **more)
    again = judge(list(carried_out(once.decisions)), policy, **more)
    assert again.given_up() == []
    assert again.bytes_now == once.bytes_after
    assert again.to_verify == once.to_verify


def carried_out(decisions: list[Decision]) -> list[Holding]:
    left = [one for one in decisions if one.action != "delete"]
    return [
        replace(one.holding, manifest=weights_only(one.holding.manifest), num_bytes=one.bytes_after)
        if one.action == "strip" and one.holding.manifest
        else one.holding
        for one in left
    ]


@settings(max_examples=100)
@given(histories, policies, besides)
def test_the_budget_is_kept_or_only_what_must_stay_is_left(
    holdings: list[Holding], policy: CheckpointPolicy, more: dict[str, Any]
) -> None:
    verdict = judge(list(holdings), policy, **more)
    if verdict.shortfall and not verdict.to_verify:
        own = [one.holding for one in verdict.decisions if one.holding.place == "current" and is_own(one.holding)]
        left = [one.holding for one in verdict.decisions if one.action != "delete" and one.holding in own]
        best = select_best([(one.path, one.manifest) for one in own if one.manifest], "val", policy.mode, 9)
        top = {path for path, _ in best[: policy.keep_best]}
        spare = [one for one in left if not (one.pinned or one.protected or one.path in top or one is own[-1])]
        assert len([one for one in spare if one.verified]) <= 2, "more could have gone"
        assert all(one.verified for one in spare), "more could have gone"


# What is kept


def test_the_newest_and_the_best_are_kept() -> None:
    rows: list[Any] = [row(n, value) for n, value in enumerate([5.0, 1.0, 3.0, 4.0, 6.0])]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=1)) == ["0", "2"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=2)) == ["0"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=1, mode="max")) == ["0", "1", "2"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=0)) == ["0", "1", "2"]


def test_newest_means_sequence_and_not_step() -> None:
    rows: list[Any] = [("c-new", manifest(9, step=1)), ("c-old", manifest(1, step=9)), ("c-mid", manifest(5, step=5))]
    assert delete(rows, CheckpointPolicy(keep_last=1)) == ["old", "mid"]


def test_one_is_taken_at_its_word() -> None:
    assert delete([row(1), row(2), row(3)], CheckpointPolicy(keep_last=1)) == ["1", "2"]


def test_keep_last_one_deletes_nothing_while_the_newest_is_unproven() -> None:
    verdict = judge(verified([row(1), row(2)], "1"), CheckpointPolicy(keep_last=1))
    assert verdict.given_up() == []
    assert verdict.to_verify == ["c/run-2"]


def test_unproven_checkpoints_do_not_count_for_the_minimum() -> None:
    rows = [row(1), row(2), row(3), row(4)]
    assert delete(verified(rows, "4", "1"), CheckpointPolicy(keep_last=2)) == []
    assert delete(verified(rows, "4", "3"), CheckpointPolicy(keep_last=2)) == ["1", "2"]
    assert judge(verified(rows, "1"), CheckpointPolicy(keep_last=2)).to_verify == ["c/run-4", "c/run-3"]


def test_a_foreign_run_is_never_touched_and_never_counted() -> None:
    rows: list[Any] = [row(9, run_id="other"), row(8, run_id="other"), row(1), row(2), row(3)]
    verdict = judge(rows, CheckpointPolicy(keep_last=2))
    assert paths(verdict, "delete") == ["1"]
    assert reasons(verdict)["9"] == "belongs to another run"


def test_the_older_of_two_equal_ones_is_the_best() -> None:
    rows = [row(1, 2.0), row(2, 2.0), row(3, 2.0)]
    assert [path for path, _ in select_best(rows, "val", "min", 1)] == ["c/run-1"]
    assert [path for path, _ in select_best(rows, "val", "max", 2)] == ["c/run-1", "c/run-2"]


def test_nan_is_never_the_best() -> None:
    rows = [row(1, math.nan), row(2, 7.0), row(3)]
    assert [path for path, _ in select_best(rows, "val", "min", 3)] == ["c/run-2"]
    assert select_best(rows, None, "min", 3) == []


def test_a_step_that_was_saved_before_and_after_its_evaluation_counts_once() -> None:
    rows: list[Any] = [("c-1", manifest(1, step=1)), ("c-2", manifest(2, step=2)), ("c-2.1", manifest(3, step=2))]
    verdict = judge(rows, CheckpointPolicy(keep_last=2))
    assert paths(verdict, "delete") == ["2"]
    assert reasons(verdict)["2"] == "its step was saved again"


def test_every_kth_epoch_is_kept_as_it_was_after_its_evaluation() -> None:
    rows: list[Any] = [row(n, epochs=n) for n in range(1, 12)]
    rows.insert(5, row(50, epochs=5, samples=8))  # within the sixth epoch
    rows[5] = (rows[5][0], replace(rows[5][1], sequence=5))
    verdict = judge(rows, CheckpointPolicy(keep_last=1, keep_every_epochs=5))
    assert paths(verdict, "keep") == ["5", "10", "11"]
    assert reasons(verdict)["10"] == "every 5th epoch"
    assert reasons(verdict)["50"] == "older than the newest"


def test_every_kth_step_is_kept() -> None:
    rows: list[Any] = [row(n) for n in range(500, 3001, 250)]
    verdict = judge(rows, CheckpointPolicy(keep_last=1, keep_every_steps=1000))
    assert paths(verdict, "keep") == ["1000", "2000", "3000"]
    assert reasons(verdict)["2000"] == "every 1000th step"
    assert reasons(verdict)["3000"] == "the newest, every 1000th step"


def test_pinned_and_protected_ones_are_kept() -> None:
    rows: list[Any] = [hold(row(1), pinned=True), hold(row(2), protected="resumed from"), row(3), row(4)]
    verdict = judge(rows, CheckpointPolicy(keep_last=1, keep_optimizer=1))
    assert paths(verdict, "delete") == ["3"]
    assert paths(verdict, "strip") == []
    assert reasons(verdict) == {"1": "pinned", "2": "resumed from", "3": "older than the newest", "4": "the newest"}


def test_what_cannot_be_used_counts_for_nothing_and_stays() -> None:
    rows: list[Any] = [row(1), row(2), hold(row(3), problem="damaged: a file is missing"), row(4)]
    verdict = judge(rows, CheckpointPolicy(keep_last=2))
    assert paths(verdict, "delete") == ["1"]
    assert reasons(verdict)["3"] == "damaged: a file is missing"


# Weights-only


def test_older_ones_lose_the_optimizer_and_a_pinned_one_does_not() -> None:
    rows: list[Any] = [hold(row(1, 1.0)), hold(row(2), pinned=True), row(3), row(4), row(5), row(6)]
    verdict = judge(rows, CheckpointPolicy(keep_last=4, keep_optimizer=2))
    assert paths(verdict, "strip") == ["1", "3", "4"]
    assert reasons(verdict)["1"] == "best val; older than the newest 2"
    assert verdict.bytes_now - verdict.bytes_after == 3 * OPTIMIZER


def test_two_full_ones_stay_unless_one_is_asked_for() -> None:
    rows = [row(1), row(2), row(3)]
    asked, unasked = CheckpointPolicy(keep_last=3, keep_optimizer=1), CheckpointPolicy(keep_last=3, keep_optimizer=2)
    assert paths(judge(verified(rows, "3"), asked), "strip") == [], "two must be verified"
    assert paths(judge(verified(rows, "3", "2"), asked), "strip") == ["1", "2"]
    assert paths(judge(verified(rows, "1", "2"), unasked), "strip") == [], "the only verified full ones"


def test_one_without_an_optimizer_is_not_stripped() -> None:
    bare = [(f"c-{n}", manifest(n)) for n in (1, 2, 3)]
    assert paths(judge(list(bare), CheckpointPolicy(keep_optimizer=1)), "strip") == []


# The budget

FULL = WEIGHTS + OPTIMIZER


def test_the_budget_takes_abandoned_then_corrupt_then_old_then_permanent_ones() -> None:
    rows: list[Any] = [
        hold(row(8), place="abandoned"),
        hold(row(9), place="abandoned", pinned=True),
        hold(row(7), place="corrupt"),
        *(row(n, epochs=n) for n in (10, 11, 12, 13, 14)),
    ]
    order = []
    for fits in range(8, 0, -1):
        policy = CheckpointPolicy(keep_last=4, keep_best=0, keep_every_epochs=5, max_bytes=fits * FULL)
        order += [one for one in delete(rows, policy) if one not in order]
    assert order == ["8", "7", "11", "12", "10"]
    assert reasons(judge(rows, CheckpointPolicy(max_bytes=1)))["8"] == "over the budget of 1 bytes"


def test_the_budget_counts_other_files_and_leaves_room_for_the_next_save() -> None:
    rows: list[Any] = [row(n) for n in range(1, 5)]
    policy = CheckpointPolicy(keep_last=4, max_bytes=5 * FULL)
    assert delete(rows, policy, reserve_bytes=FULL) == []
    assert delete(rows, policy, reserve_bytes=FULL, other_bytes=1) == ["1"]
    assert judge(rows, policy, reserve_bytes=FULL, other_bytes=1).shortfall == 0


def test_the_budget_yields_to_the_law_and_says_by_how_much() -> None:
    rows: list[Any] = [hold(row(1), pinned=True), row(2, 1.0), row(3), row(4), row(5)]
    verdict = judge(rows, CheckpointPolicy(max_bytes=FULL), reserve_bytes=FULL)
    assert paths(verdict, "delete") == ["3"]
    assert verdict.shortfall == 4 * FULL
    assert judge(rows, CheckpointPolicy()).shortfall == 0


def test_stripping_comes_before_deleting_for_the_budget() -> None:
    rows: list[Any] = [row(n) for n in range(1, 5)]
    policy = CheckpointPolicy(keep_last=4, keep_optimizer=2, max_bytes=2 * FULL + 2 * WEIGHTS)
    verdict = judge(rows, policy)
    assert paths(verdict, "strip") == ["1", "2"]
    assert paths(verdict, "delete") == []


# On request


def test_abandoned_and_corrupt_ones_go_on_request_only() -> None:
    rows: list[Any] = [
        hold(row(1), place="abandoned"),
        hold(row(2, run_id="other"), place="abandoned"),
        Holding(path="c-unread", manifest=None, place="corrupt"),
        row(3),
    ]
    assert delete(rows, CheckpointPolicy()) == []
    assert delete(rows, CheckpointPolicy(), unwanted=["abandoned"]) == ["1"]
    assert delete(rows, CheckpointPolicy(), unwanted=["corrupt"]) == ["unread"]


def test_nothing_goes_from_a_run_without_a_checkpoint_of_its_own() -> None:
    rows: list[Any] = [hold(row(1), place="abandoned")]
    assert delete(rows, CheckpointPolicy(max_bytes=1), unwanted=["abandoned"]) == []
