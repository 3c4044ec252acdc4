"""TorchWorld and DDP between real gloo processes: what each rank sees, what is said of a rank that is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import run_script
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.ranks import FLOATS, SAME, bits, tensors

pytestmark = pytest.mark.distributed
RANKS = str(ROOT / "tests/support/ranks.py")
DEADLINE_SECONDS = 120.0


def ask(check: str, world_size: int, out: Path) -> list[dict[str, Any]]:
    """What each rank of a new world has written."""
    out.mkdir(exist_ok=True)
    if check in ("replicas", "own-buffers"):
        run_script(world_size, RANKS, check, str(out), deadline_seconds=DEADLINE_SECONDS)
    else:  # what `init_distributed` finds under torchrun is the matter
        command = torchrun(world_size, RANKS, check, str(out))
        run_command(command, deadline_seconds=DEADLINE_SECONDS).require_success()
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[str, Any]]]:
    """By check and world size; each world is launched once."""
    known: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def find(check: str, world_size: int) -> list[dict[str, Any]]:
        if (check, world_size) not in known:
            known[check, world_size] = ask(check, world_size, tmp_path_factory.mktemp(check))
        return known[check, world_size]

    return find


@pytest.fixture(params=[2, 3])
def rows(request: pytest.FixtureRequest, answers: Callable[[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return answers("collectives", request.param)


@pytest.fixture(params=[2, 3])
def replicas(
    request: pytest.FixtureRequest, answers: Callable[[str, int], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    return answers("replicas", request.param)


def test_every_rank_knows_its_place(rows: list[dict[str, Any]]) -> None:
    size = len(rows)
    assert [row["rank"] for row in rows] == [[rank, rank, size, rank == 0] for rank in range(size)]
    assert {row["kind"] for row in rows} == {"TorchWorld"}


def test_init_distributed_does_nothing_the_second_time(rows: list[dict[str, Any]]) -> None:
    assert all(row["same_group"] for row in rows)


def test_an_accelerator_made_afterwards_believes_in_all_processes(rows: list[dict[str, Any]]) -> None:
    """On a machine without a GPU, without cpu=True: alone it would believe in one."""
    assert [row["believes"] for row in rows] == [len(rows)] * len(rows)


def test_integers_are_reduced_exactly(rows: list[dict[str, Any]]) -> None:
    last = len(rows) - 1
    for row in rows:
        assert row["max"] == [last, 0, 2**62 + last]
        assert row["sum"] == [sum(range(1, len(rows) + 1)), -(2**40) * len(rows)]


def test_json_is_the_main_ranks_after_a_broadcast(rows: list[dict[str, Any]]) -> None:
    assert all(row["broadcast"] == {"of": 0, "text": "ü", "list": []} for row in rows)
    assert all(row["broadcast_none"] is None for row in rows)


def test_json_of_any_length_is_gathered_in_rank_order(rows: list[dict[str, Any]]) -> None:
    expected = [{"of": rank, "pad": "x" * 100 * rank} for rank in range(len(rows))]
    assert all(row["gather"] == expected for row in rows)


def test_floats_are_gathered_bit_for_bit(rows: list[dict[str, Any]]) -> None:
    expected = [[value.hex() for value in FLOATS[rank:]] for rank in range(len(rows))]
    assert all(row["floats"] == expected for row in rows)


def test_tensors_of_any_dtype_and_layout_become_the_main_ranks(rows: list[dict[str, Any]]) -> None:
    expected = {name: bits(value) for name, value in tensors(0).items()}
    for row in rows:
        assert row["tensors"] == expected
        assert row["strides_kept"]


def test_a_disagreement_of_one_rank_is_raised_on_all(rows: list[dict[str, Any]]) -> None:
    for rank, row in enumerate(rows):
        assert row["equal"] == ""
        assert row["different"].startswith(f"DisagreementError: Rank {rank}: the ranks do not hold the same manifest")
    assert SAME in rows[0]["different"]
    assert SAME not in rows[1]["different"]


def test_letters_arrive_while_the_main_threads_are_busy(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["received"] == [f"from {rank}" for rank in range(len(rows))]
    assert all(row["sums"] == [len(rows)] * 20 for row in rows)


def test_letters_that_were_taken_are_gone(rows: list[dict[str, Any]]) -> None:
    assert all(not any(row["left"]) for row in rows)


def test_a_letter_that_does_not_come_is_an_error_with_its_name_and_the_rank(rows: list[dict[str, Any]]) -> None:
    for rank, row in enumerate(rows):
        assert row["late"].startswith(f"DeadlineError: Rank {rank} waited 0 s for never/{rank}, and it did not come")


def test_a_second_world_does_not_take_the_letters_of_the_first(rows: list[dict[str, Any]]) -> None:
    assert all(row["stale"].startswith("DeadlineError") for row in rows)


@pytest.mark.parametrize("check", ["lost-peer", "silent-peer"])
def test_a_peer_that_is_dead_or_silent_is_an_error_and_not_a_hang(check: str, tmp_path: Path) -> None:
    (row,) = ask(check, 2, tmp_path / "out")
    assert row["message"].startswith("DeadlineError: Rank 0 of 2 waited")
    assert "(of at most 3) for the other ranks to agree on whether to save or stop, and lost them:" in row["message"]
    assert "Look at the first rank that failed" in row["message"]


# Replicas


def test_fixing_the_bucket_layout_leaves_no_trace(replicas: list[dict[str, Any]]) -> None:
    for row in replicas:
        assert row["unchanged"]
        assert row["rng"]
        assert all(row["grads"])


def test_the_bucket_layout_is_not_rebuilt_by_the_first_backward_pass(replicas: list[dict[str, Any]]) -> None:
    assert [row["rebuilt_again"] for row in replicas] == [False] * len(replicas)


def test_gradients_after_fixing_the_layout_are_equal_on_all_ranks(replicas: list[dict[str, Any]]) -> None:
    assert replicas[0]["gradients"]
    assert all(row["gradients"] == replicas[0]["gradients"] for row in replicas)


def test_evaluation_uses_the_main_ranks_buffers_on_all_ranks(replicas: list[dict[str, Any]]) -> None:
    assert all(row["evaluated_with"] == [1.0, 1.0, 1.0] for row in replicas)


def test_training_after_an_evaluation_begins_with_the_main_ranks_buffers(replicas: list[dict[str, Any]]) -> None:
    """The number of batches that BatchNorm counted: the main rank's 1, and one more."""
    assert [row["after"][-1] for row in replicas] == [2.0] * len(replicas)


def test_buffers_that_are_not_broadcast_are_each_ranks_own_after_an_evaluation(replicas: list[dict[str, Any]]) -> None:
    for rank, row in enumerate(replicas):
        assert row["own_evaluated_with"] == [1.0, 1.0, 1.0]
        assert row["own_after"] == [rank + 1.0] * 3


def test_buffers_that_are_not_broadcast_go_on_from_each_ranks_own(tmp_path: Path) -> None:
    rows = ask("own-buffers", 2, tmp_path / "out")
    assert rows[0]["left"] != rows[1]["left"]
    for row in rows:
        assert row["resumed"] == row["left"]
        assert row["end"] == row["twin"] != row["left"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="torchrun needs a POSIX system")
def test_ranks_that_are_launched_without_a_call_of_ours_are_told(tmp_path: Path) -> None:
    """`Run` in a launched script that forgot `init_distributed` says which line is missing."""
    script = tmp_path / "script.py"
    script.write_text("from torch import nn\nimport dist_train as dt\ndt.Run('run', model=nn.Linear(1, 1))\n")
    outcome = run_command(torchrun(2, str(script)), deadline_seconds=DEADLINE_SECONDS)
    assert outcome.returncode != 0
    assert "Call dist_train.init_distributed() at the top of the script" in outcome.output
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
