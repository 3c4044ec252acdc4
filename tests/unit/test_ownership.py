"""Who may write in a run directory. Time is injected: nothing here waits."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dist_train.checkpoint import ownership
from dist_train.checkpoint.ownership import OWNER, Owner, Ownership, newest_attempt, read_owner
from dist_train.checkpoint.store import Operation, Store
from dist_train.errors import RunInUseError

HERE = Owner.of_this_process()
ELSEWHERE = replace(HERE, host="another machine", hostname="node7", pid=4242, pid_started="1", launch="another launch")


class Clock:
    """Monotonic seconds that pass only in `sleep`, where something else may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.now = 1000.0
        self.meanwhile = meanwhile

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.make_directory("attempts")
    return store


@pytest.fixture(autouse=True)
def _slow_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat thread beats only when a test asks for it."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600.0)


def record(store: Store, owner: Owner, attempt: int = 1) -> None:
    """What a process leaves behind that holds (or held) the directory."""
    if newest_attempt(store) < attempt:
        store.create_exclusive(f"attempts/{attempt:06d}")
    store.replace(OWNER, json.dumps(asdict(replace(owner, attempt=attempt))).encode())


def beat(store: Store) -> None:
    owner = read_owner(store)
    assert owner is not None
    record(store, replace(owner, beats=owner.beats + 1), owner.attempt)


def claim(store: Store, clock: Clock | None = None, owner: Owner = HERE, patience: float = 15.0) -> Ownership:
    clock = clock or Clock(lambda: pytest.fail("it waited"))
    return Ownership(store, owner, patience_seconds=patience, clock=clock, sleep=clock.sleep)


def test_attempts_count_up(store: Store) -> None:
    first = claim(store)
    assert first.acquire() == 1
    first.release()
    second = claim(store)
    assert second.acquire() == 2
    assert second.attempt == 2
    assert store.list("attempts") == ["000001", "000002", "owner.json"]
    second.release()


def test_an_attempt_is_durable_before_anything_is_done_with_it(tmp_path: Path) -> None:
    log: list[Operation] = []
    one = claim(Store(tmp_path, observer=log.append))
    one.acquire()
    kinds = [(operation.kind, operation.path) for operation in log]
    assert kinds.index(("fsync_dir", "attempts")) > kinds.index(("create", "attempts/000001"))
    one.release()


def test_an_owner_that_shows_life_is_not_disturbed(store: Store) -> None:
    record(store, ELSEWHERE)
    clock = Clock(lambda: beat(store))
    with pytest.raises(RunInUseError, match=r"process 4242 on node7 \(attempt 1\) is training there"):
        claim(store, clock).acquire()
    assert store.list("attempts") == ["000001", "owner.json"]


def test_a_slow_heart_is_life(store: Store) -> None:
    """One beat just before patience ends."""
    record(store, ELSEWHERE)
    clock = Clock()
    clock.meanwhile = lambda: beat(store) if clock.now > 1000 + 14 else None
    with pytest.raises(RunInUseError):
        claim(store, clock).acquire()


def test_a_silent_owner_is_replaced_after_patience(store: Store) -> None:
    record(store, ELSEWHERE)
    clock = Clock()
    one = claim(store, clock)
    assert one.acquire() == 2
    assert 15.0 <= clock.now - 1000.0 < 20.0
    one.release()


def test_an_owner_that_leaves_while_it_is_watched_is_replaced(store: Store) -> None:
    record(store, ELSEWHERE)
    clock = Clock(lambda: record(store, replace(ELSEWHERE, released=True)))
    one = claim(store, clock)
    assert one.acquire() == 2
    assert clock.now - 1000.0 < 15.0
    one.release()


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(replace(ELSEWHERE, released=True), id="released"),
        pytest.param(replace(ELSEWHERE, launch=HERE.launch), id="the same launch, on another node"),
        pytest.param(replace(HERE, launch="an older launch"), id="the same process"),
        pytest.param(replace(HERE, launch="x", pid=2**22 + 7), id="a dead process of this machine"),
        pytest.param(replace(HERE, launch="x", pid=os.getppid(), pid_started="0"), id="its number was given away"),
    ],
)
def test_an_owner_that_is_known_to_be_gone_is_replaced_at_once(store: Store, owner: Owner) -> None:
    record(store, owner)
    one = claim(store)
    assert one.acquire() == 2
    one.release()


def test_a_live_process_of_this_machine_is_watched(store: Store) -> None:
    alive = replace(HERE, launch="x", pid=os.getppid(), pid_started=ownership._started(os.getppid()))
    record(store, alive)
    with pytest.raises(RunInUseError):
        claim(store, Clock(lambda: beat(store))).acquire()


def test_an_unreadable_owner_is_nobody(store: Store) -> None:
    for text in (b"", b"{", b"[]", b'{"surprise": 1}'):
        store.replace(OWNER, text)
        assert read_owner(store) is None
    one = claim(store)
    assert one.acquire() == 1
    one.release()


def test_of_two_launches_at_the_same_moment_one_is_refused(store: Store) -> None:
    def overtake(operation: Operation) -> None:
        if operation.kind == "create" and operation.path == "attempts/000001":
            Store(store.root).create_exclusive("attempts/000001")

    store.observer = overtake
    with pytest.raises(RunInUseError, match="another launch started at the same moment"):
        claim(store).acquire()
    assert read_owner(store) is None


def test_a_zombie_holds_nothing(store: Store) -> None:
    zombie = claim(store)
    zombie.acquire()
    zombie.require_held()
    assert zombie.is_held()
    newer = claim(store)
    newer.acquire()
    assert not zombie.is_held()
    with pytest.raises(RunInUseError, match=r"Attempt 2 has taken over .* from this one .attempt 1"):
        zombie.require_held()
    zombie.release()
    owner = read_owner(store)
    assert owner is not None
    assert (owner.attempt, owner.released) == (2, False)
    newer.release()


def test_release_says_that_the_directory_is_free(store: Store) -> None:
    one = claim(store)
    one.acquire()
    one.release()
    owner = read_owner(store)
    assert owner is not None
    assert owner.released


def test_a_full_disk_does_not_keep_a_run_from_leaving(store: Store) -> None:
    one = claim(store)
    one.acquire()

    def refuse(operation: Operation) -> None:
        raise OSError(28, "No space left on device")

    store.observer = refuse
    one.release()


class Beats(threading.Event):
    """In place of the stop event: lets a set number of beats through at once."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        return self.left < 0


def test_the_heart_beats_on_through_a_full_disk(store: Store) -> None:
    one = claim(store)
    one.acquire()
    failures = []

    def fail_once(operation: Operation) -> None:
        if operation.kind == "create" and not failures:
            failures.append(operation)
            raise OSError(28, "No space left on device")

    store.observer = fail_once
    one._stop = Beats(3)
    one._keep_beating()
    owner = read_owner(store)
    assert failures
    assert owner is not None
    assert owner.beats == 3
    one._stop = threading.Event()


def test_the_heart_of_a_zombie_stops_and_leaves_the_new_owner_alone(store: Store) -> None:
    zombie = claim(store)
    zombie.acquire()
    newer = claim(store)
    newer.acquire()
    before = store.read(OWNER)
    beats = zombie._stop = Beats(5)
    zombie._keep_beating()
    assert beats.left == 4, "it went on after it was replaced"
    assert store.read(OWNER) == before
    newer.release()


def test_launches_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(**environment: str) -> str:
        return Owner.of_this_process(environment).launch

    elastic = {"TORCHELASTIC_RUN_ID": "job-7", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert launch(**elastic) == launch(**elastic)
    assert launch(**elastic) != launch(**{**elastic, "MASTER_PORT": "29501"})
    here = {**elastic, "MASTER_ADDR": "127.0.0.1"}
    assert launch(**here) == launch(**here)
    assert HERE.host in launch(**here), "the same address and port on each machine"
    local = {**elastic, "TORCHELASTIC_RUN_ID": "none"}
    assert launch(**local) == launch(**{**local, "MASTER_PORT": "29501"}), "one agent on this machine"
    assert launch(**local) != launch()
    monkeypatch.setattr(os, "getpid", lambda: os.getppid())
    assert launch() != HERE.launch
