"""Law 6: what may be deleted."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.manifest import Manifest
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.retention import select_best, select_deletions
from tests.support.manifests import manifest

Row = tuple[str, Manifest]


def row(sequence: int, value: float | None = None, *, run_id: str = "run") -> Row:
    metrics = {} if value is None else {"val": value}
    return f"c/{run_id}-{sequence}", manifest(sequence, metrics=metrics, run_id=run_id)


def delete(rows: list[Row], policy: CheckpointPolicy, **fields: object) -> list[str]:
    verified = fields.pop("verified", [path for path, _ in rows])
    doomed = select_deletions(rows, policy, run_id="run", verified=verified, monitor="val", **fields)  # type: ignore[arg-type]
    return [path.rpartition("-")[2] for path in doomed]


rows_strategy = st.lists(
    st.tuples(
        st.sampled_from(["run", "other"]),
        st.none() | st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf, -math.inf]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=9,
)
policies = st.builds(
    CheckpointPolicy,
    keep_last=st.integers(1, 4),
    keep_best=st.integers(0, 3),
    mode=st.sampled_from(["min", "max"]),
)


@given(rows_strategy, policies, st.randoms(use_true_random=False))
def test_law_6_holds_for_every_history(
    history: list[tuple[str, float | None, bool, bool]], policy: CheckpointPolicy, chance: object
) -> None:
    rows = [row(sequence, value, run_id=run_id) for sequence, (run_id, value, _, _) in enumerate(history)]
    verified = {path for (path, _), (_, _, is_verified, _) in zip(rows, history, strict=True) if is_verified}
    protected = {path for (path, _), (_, _, _, is_protected) in zip(rows, history, strict=True) if is_protected}
    shuffled = list(rows)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    doomed = select_deletions(shuffled, policy, run_id="run", verified=verified, protected=protected, monitor="val")
    own = [path for path, one in rows if one.run_id == "run"]
    assert set(doomed) <= set(own), "a foreign run's"
    assert not set(doomed) & protected, "a protected one"
    assert not set(doomed) & set(own[-policy.keep_last :]), "one of the newest"
    stay = [path for path in own if path not in doomed]
    least = 1 if policy.keep_last == 1 else 2
    assert not doomed or len(set(stay) & verified) >= least, "below the verified minimum"
    best = select_best([one for one in rows if one[1].run_id == "run"], "val", policy.mode, policy.keep_best)
    assert not set(doomed) & {path for path, _ in best}, "a best one"
    assert doomed == sorted(doomed, key=own.index), "not oldest first"


def test_the_newest_and_the_best_are_kept() -> None:
    rows = [row(n, value) for n, value in enumerate([5.0, 1.0, 3.0, 4.0, 6.0])]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=1)) == ["0", "2"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=2)) == ["0"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=1, mode="max")) == ["0", "1", "2"]
    assert delete(rows, CheckpointPolicy(keep_last=2, keep_best=0)) == ["0", "1", "2"]


def test_newest_means_sequence_and_not_step() -> None:
    rows = [("c/new", manifest(9, step=1)), ("c/old", manifest(1, step=9)), ("c/mid", manifest(5, step=5))]
    doomed = select_deletions(rows, CheckpointPolicy(keep_last=1), run_id="run", verified=["c/new", "c/old", "c/mid"])
    assert doomed == ["c/old", "c/mid"]


def test_one_is_taken_at_its_word() -> None:
    assert delete([row(1), row(2), row(3)], CheckpointPolicy(keep_last=1)) == ["1", "2"]


def test_keep_last_one_deletes_nothing_while_the_newest_is_unproven() -> None:
    rows = [row(1), row(2)]
    assert delete(rows, CheckpointPolicy(keep_last=1), verified=["c/run-1"]) == []


def test_unproven_checkpoints_do_not_count_for_the_minimum() -> None:
    rows = [row(1), row(2), row(3), row(4)]
    assert delete(rows, CheckpointPolicy(keep_last=2), verified=["c/run-4", "c/run-1"]) == []
    assert delete(rows, CheckpointPolicy(keep_last=2), verified=["c/run-4", "c/run-3"]) == ["1", "2"]


def test_a_foreign_run_is_never_touched_and_never_counted() -> None:
    rows = [row(9, run_id="other"), row(8, run_id="other"), row(1), row(2), row(3)]
    assert delete(rows, CheckpointPolicy(keep_last=2)) == ["1"]


def test_the_older_of_two_equal_ones_is_the_best() -> None:
    rows = [row(1, 2.0), row(2, 2.0), row(3, 2.0)]
    assert [path for path, _ in select_best(rows, "val", "min", 1)] == ["c/run-1"]
    assert [path for path, _ in select_best(rows, "val", "max", 2)] == ["c/run-1", "c/run-2"]


def test_nan_is_never_the_best() -> None:
    rows = [row(1, math.nan), row(2, 7.0), row(3)]
    assert [path for path, _ in select_best(rows, "val", "min", 3)] == ["c/run-2"]
    assert select_best(rows, None, "min", 3) == []


def test_a_step_that_was_saved_before_and_after_its_evaluation_counts_once() -> None:
    rows = [("c/1", manifest(1, step=1)), ("c/2", manifest(2, step=2)), ("c/2.1", manifest(3, step=2))]
    everything = [path for path, _ in rows]
    assert select_deletions(rows, CheckpointPolicy(keep_last=2), run_id="run", verified=everything) == ["c/2"]
