"""SoloWorld, joining a process group, and what is said when a rank does not come. Threads and a store in memory.

Collectives between real processes are in tests/distributed/test_world.py.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train import joining
from dist_train.errors import DeadlineError, DisagreementError
from dist_train.world import SoloWorld, TorchWorld, World, current_world, init_distributed

DEADLINE_SECONDS = 20.0


# One process


def test_alone_every_collective_gives_back_what_it_was_given() -> None:
    world = SoloWorld()
    value = {"a": [1, 2.5, None, "ü"], "b": {}}
    assert (world.rank, world.local_rank, world.world_size, world.is_main) == (0, 0, 1, True)
    assert world.max([3, -1], "a") == [3, -1]
    assert world.sum([3, -1], "a") == [3, -1]
    assert world.broadcast(value, "a") == value
    assert world.gather(value, "a") == [value]


def test_alone_floats_are_gathered_bit_for_bit() -> None:
    values = [math.nan, math.inf, -math.inf, -0.0, 0.1 + 0.2, 5e-324]
    (row,) = SoloWorld().gather_floats(values)
    assert [value.hex() for value in row] == [value.hex() for value in values]


def test_alone_a_tensor_is_left_as_it_is() -> None:
    tensor = torch.arange(4.0)
    SoloWorld().broadcast_tensor(tensor)
    assert tensor.tolist() == [0, 1, 2, 3]


def test_alone_everything_is_equal() -> None:
    SoloWorld().require_equal("0123456789abcdef" * 2, "anything")


class TwoDigests(SoloWorld):
    """A world whose other rank holds another digest."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = [int(other[start : start + 8], 16) for start in range(0, 32, 8)]

    def max(self, values: Any, what: str) -> list[int]:
        theirs = [*self.other, *(-word for word in self.other)]
        return [max(pair) for pair in zip(values, theirs, strict=True)]


@pytest.mark.parametrize("digit", range(0, 32, 5))
def test_one_different_digit_of_a_digest_is_seen(digit: int) -> None:
    mine = "0123456789abcdef" * 2
    other = mine[:digit] + ("0" if mine[digit] != "0" else "1") + mine[digit + 1 :]
    TwoDigests(mine).require_equal(mine, "manifest")
    with pytest.raises(DisagreementError, match=f"do not hold the same manifest \\(here {mine}\\)"):
        TwoDigests(other).require_equal(mine, "manifest")


def test_a_letter_is_taken_once_and_by_any_mailbox_of_the_world() -> None:
    world = SoloWorld()
    world.open_mailbox().put("receipt/1", b"\x00\xff")
    assert world.open_mailbox().take("receipt/1", 1.0) == b"\x00\xff"
    with pytest.raises(DeadlineError):
        world.open_mailbox().take("receipt/1", 0.001)


def test_a_letter_that_does_not_come_is_an_error_that_names_it() -> None:
    with pytest.raises(DeadlineError, match=r"receipt/7 did not come within 0 s\."):
        SoloWorld().open_mailbox().take("receipt/7", 0.001)


def test_a_letter_that_comes_later_wakes_whoever_waits() -> None:
    world = SoloWorld()
    thread = threading.Thread(target=lambda: world.open_mailbox().put("late", b"x"))
    thread.start()
    assert world.open_mailbox().take("late", DEADLINE_SECONDS) == b"x"
    thread.join(timeout=DEADLINE_SECONDS)


# Which world this process is in


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(current_world(), SoloWorld)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(current_world(), SoloWorld)


def test_a_launched_process_without_a_group_is_told_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(DisagreementError, match=r"rank 2 has no process group\. Call dist_train.init_distributed\(\)"):
        current_world()


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}])
def test_init_distributed_does_nothing_when_alone(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    init_distributed()
    init_distributed()
    assert not dist.is_initialized()


def test_init_distributed_leaves_a_group_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    init_distributed()  # would fail for want of MASTER_ADDR


# Joining


class Joining(threading.Thread):
    """One rank in a thread."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, seconds: float = DEADLINE_SECONDS) -> None:
        super().__init__(daemon=True)
        self._arguments = (store, rank, world_size, seconds)
        self.rank = rank
        self.generation = ""
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.generation = joining.join(*self._arguments)
        except Exception as error:
            self.error = error

    def ended(self) -> Joining:
        self.join(timeout=2 * DEADLINE_SECONDS)
        assert not self.is_alive()
        return self


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_POLL_SECONDS", 0.002)


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def join_all(store: dist.Store, world_size: int) -> str:
    """The generation of a world that has joined."""
    ranks = [Joining(store, rank, world_size) for rank in range(world_size)]
    generations = {one.ended().generation for one in ranks}
    assert [one.error for one in ranks] == [None] * world_size
    assert len(generations) == 1
    (generation,) = generations
    assert generation
    return generation


def until(condition: Callable[[], bool]) -> None:
    """Polls, under a deadline."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_SECONDS / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("did not come true")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_ranks_agree_on_one_generation(world_size: int, store: dist.Store) -> None:
    join_all(store, world_size)


def test_every_life_has_a_generation_of_its_own_over_one_store(store: dist.Store) -> None:
    """What torchrun's agent does: the store outlives the workers, and all that they wrote lies in it."""
    assert len({join_all(store, 3) for _ in range(4)}) == 4


def test_worlds_of_several_sizes_do_not_take_each_others_keys(store: dist.Store) -> None:
    assert len({join_all(store, size) for size in (2, 3, 2, 4)}) == 4


def test_stale_keys_of_dead_ranks_do_not_complete_a_roster(store: dist.Store) -> None:
    dead = join_all(store, 3)
    leader, follower = Joining(store, 0, 3), Joining(store, 1, 3)
    until(lambda: _roster(store)["generation"] != dead and _acknowledged(store, 1) == _roster(store)["generation"])
    assert leader.is_alive()
    assert follower.is_alive()
    late = Joining(store, 2, 3)
    generations = {one.ended().generation for one in (leader, follower, late)}
    assert len(generations) == 1
    assert dead not in generations
    assert "" not in generations


def test_a_follower_that_finds_a_complete_roster_of_the_dead_does_not_take_it(store: dist.Store) -> None:
    dead = join_all(store, 2)
    assert _roster(store)["complete"]
    follower = Joining(store, 1, 2)
    until(lambda: store.get("dist_train/join/2/1").decode() not in _roster(store)["ids"])
    assert follower.is_alive()
    leader = Joining(store, 0, 2)
    assert follower.ended().generation == leader.ended().generation != dead


def test_a_follower_that_was_replaced_while_joining_stays_out(store: dist.Store) -> None:
    leader, first = Joining(store, 0, 3), Joining(store, 1, 3, seconds=0.3)
    until(lambda: store.check(["dist_train/join/3/1"]))
    identity = store.get("dist_train/join/3/1").decode()
    second = Joining(store, 1, 3)
    until(lambda: store.get("dist_train/join/3/1").decode() != identity)
    last = Joining(store, 2, 3)
    generations = {one.ended().generation for one in (leader, second, last)}
    assert len(generations) == 1
    assert identity not in _roster(store)["ids"]
    assert first.ended().generation == ""
    assert isinstance(first.error, DeadlineError)


def test_a_leader_that_was_replaced_gives_up(store: dist.Store) -> None:
    old = Joining(store, 0, 2)
    until(lambda: store.check(["dist_train/join/2/0"]))
    identity = store.get("dist_train/join/2/0").decode()
    new = Joining(store, 0, 2)
    until(lambda: store.get("dist_train/join/2/0").decode() != identity)
    follower = Joining(store, 1, 2)
    assert new.ended().generation == follower.ended().generation != ""
    assert isinstance(old.ended().error, DisagreementError)
    assert f"this one ({identity}) is out of date" in str(old.error)


def test_a_leader_alone_names_the_ranks_that_did_not_come(store: dist.Store) -> None:
    with pytest.raises(DeadlineError, match=r"Rank 0 waited 0 s for all 3 ranks to join; missing: ranks \[1, 2\]\."):
        joining.join(store, 0, 3, timeout_seconds=0.05)


def test_a_leader_does_not_name_the_ranks_that_came(store: dist.Store) -> None:
    came = Joining(store, 1, 3, seconds=0.3)
    until(lambda: store.check(["dist_train/join/3/1"]))
    leader = Joining(store, 0, 3, seconds=0.3)
    assert "missing: ranks [2]." in str(leader.ended().error)
    assert isinstance(came.ended().error, DeadlineError)


def test_a_leader_names_a_rank_of_which_only_the_dead_ones_keys_are_there(store: dist.Store) -> None:
    join_all(store, 3)
    came = Joining(store, 1, 3, seconds=0.3)
    leader = Joining(store, 0, 3, seconds=0.3)
    assert "missing: ranks [2]." in str(leader.ended().error)
    came.ended()


def test_a_follower_without_a_leader_says_so_and_where_it_looked(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-7")
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(DeadlineError, match=r"rank 0 did not complete the roster\. .*node-7:1234\."):
        joining.join(store, 1, 2, timeout_seconds=0.05)


def _roster(store: dist.Store) -> dict[str, Any]:
    world_size = next(size for size in (2, 3) if store.check([f"dist_train/join/{size}/roster"]))
    roster: dict[str, Any] = json.loads(store.get(f"dist_train/join/{world_size}/roster"))
    return roster


def _acknowledged(store: dist.Store, rank: int) -> str:
    return store.get(f"dist_train/join/3/{rank}/acknowledged").decode()


# What is said of a lost peer


def test_a_process_group_that_was_destroyed_inside_the_run_is_named() -> None:
    """By accelerator.end_training(): torch's all_reduce then does nothing, and every rank would decide alone."""
    world = TorchWorld.__new__(TorchWorld)
    world._thread, world.rank, world.world_size = threading.get_ident(), 1, 2
    with pytest.raises(DisagreementError, match=r"Rank 1 of 2 cannot agree on whether.*end_training\(\).*after the"):
        world._run("whether to save or stop", lambda: None)


def test_a_collective_that_fails_says_what_was_waited_for_and_on_which_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    world = TorchWorld.__new__(TorchWorld)
    world._thread = threading.get_ident()
    world.rank, world.world_size, world._timeout_seconds = 3, 8, 1800.0

    def lose() -> None:
        raise RuntimeError("Connection closed by peer.\nException raised from ...")

    with pytest.raises(DeadlineError) as caught:
        world._run("whether to save or stop", lose)
    message = str(caught.value)
    assert message.startswith(
        "Rank 3 of 8 waited 0.0 s (of at most 1800) for the other ranks to agree on whether to save"
    )
    assert "and lost them: Connection closed by peer. Look at the first rank that failed" in message
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_collective_in_a_background_thread_is_refused() -> None:
    """Law 10, as an assertion of our own."""
    world = TorchWorld.__new__(TorchWorld)
    world._thread = threading.get_ident() + 1
    called: list[bool] = []
    with pytest.raises(AssertionError, match="law 10: whether to save was asked for in a background thread"):
        world._run("whether to save", lambda: called.append(True))
    assert called == []


def test_the_interface_cannot_be_used_without_its_collectives() -> None:
    with pytest.raises(TypeError, match="abstract"):
        World()  # type: ignore[abstract]
