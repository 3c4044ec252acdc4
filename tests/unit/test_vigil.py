"""Vigil: when a process that was told to leave is not waited for any longer, on an injected clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from signal import Signals
from typing import Any

import psutil
import pytest

from dist_train import phases
from dist_train.errors import ConfigError
from dist_train.health import vigil
from dist_train.health.vigil import GRACE, Vigil
from dist_train.phases import Phase


class Watched:
    """A vigil on a clock of its own."""

    def __init__(self, *, several: bool = True, grace: float | None = None) -> None:
        self.now = 100.0
        self.vigil = Vigil(several=several, grace_seconds=grace, clock=lambda: self.now)
        self.vigil.numbers = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT})

    def step(self, seconds: float, count: int = 1) -> None:
        """Steps of training, as the phases tell of them."""
        for _ in range(count):
            self.vigil._moved(Phase.OTHER, Phase.STEP)
            self.now += seconds
            self.vigil._moved(Phase.STEP, Phase.OTHER)

    def tell(self, number: int = signal.SIGTERM) -> None:
        self.vigil.hear(number)

    def after(self, seconds: float) -> str:
        """What is decided so many seconds later; nothing moves meanwhile."""
        self.now += seconds
        return self.vigil.find_reason()


@pytest.fixture(autouse=True)
def _in_a_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under torchrun, all workers alive."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv(GRACE, raising=False)
    monkeypatch.setattr(vigil, "_has_lost_a_sibling", lambda: False)
    with phases.within(Phase.STEP):
        yield


def test_who_was_told_nothing_is_never_ended() -> None:
    one = Watched()
    one.step(0.1, count=5)
    assert one.after(1e6) == ""


def test_a_group_that_moves_is_given_the_whole_grace() -> None:
    one = Watched()
    one.step(0.1, count=5)
    one.tell()
    for _ in range(27):
        one.step(1.0)
        assert one.after(0.0) == ""
    assert "SIGTERM came 28 s ago, and no step boundary since (in the phase step" in one.after(1.0)


def test_nothing_moves_much_longer_than_ever_before() -> None:
    """Under torchrun: the others are dead, and nothing says so (NCCL)."""
    one = Watched()
    one.step(60.0)  # the first compiles
    one.step(0.5, count=3)
    one.tell()
    assert one.after(9.9) == ""
    assert "nothing moves since 10 s, where 0.5 s were the longest so far" in one.after(0.1)


def test_a_step_that_was_always_slow_is_waited_for() -> None:
    one = Watched()
    one.step(8.0, count=3)
    one.tell()
    assert one.after(20.0) == ""
    assert "nothing moves since 24 s" in one.after(4.0)


def test_the_first_step_has_no_measure_but_the_grace() -> None:
    one = Watched()
    one.tell()
    assert one.after(27.0) == ""
    assert "28 s ago" in one.after(1.0)


@pytest.mark.parametrize("phase", [Phase.EVALUATION, Phase.CAPTURE, Phase.SAVE_WAIT])
def test_what_takes_its_own_time_is_waited_for(phase: Phase) -> None:
    one = Watched()
    one.step(0.1, count=5)
    one.tell()
    with phases.within(phase):
        assert one.after(27.0) == ""
        assert one.after(1.0) != ""


def test_a_worker_of_this_machine_that_is_gone_shortens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "_has_lost_a_sibling", lambda: True)
    one = Watched()
    one.tell()
    assert one.after(1.9) == ""
    assert "another worker of this machine is gone, and nothing moves since 2 s" in one.after(0.1)


@pytest.mark.parametrize("by_dist_train", [True, False])
def test_whoever_is_started_otherwise_has_ten_minutes(by_dist_train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dist-train launch` knows better, and kills."""
    if by_dist_train:
        monkeypatch.setenv("DIST_TRAIN_LAUNCH_DIR", "/nowhere")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(vigil, "_has_lost_a_sibling", lambda: True)
    one = Watched()
    one.step(0.1, count=5)
    one.tell(signal.SIGUSR1)
    assert one.after(599.0) == ""
    assert "SIGUSR1 came 600 s ago" in one.after(1.0)


def test_a_second_signal_is_heard_although_the_main_thread_hangs() -> None:
    one = Watched()
    one.tell(signal.SIGINT)
    one.now += 1.0
    one.tell(signal.SIGINT)
    assert one.after(1.9) == ""
    assert "SIGINT came a second time, and the main thread does not answer" in one.after(0.1)


def test_an_agreed_stop_and_the_end_of_the_block_end_the_vigil() -> None:
    one, other = Watched(), Watched()
    one.tell()
    other.tell()
    one.vigil.end()
    other.vigil._moved(Phase.OTHER, Phase.END)
    assert (one.after(1e6), other.after(1e6)) == ("", "")


def test_the_grace_comes_from_the_option_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE, "5")
    for one, seconds in ((Watched(), 5.0), (Watched(grace=50.0), 50.0)):
        one.tell()
        assert one.after(seconds - 0.1) == ""
        assert one.after(0.1) != ""
    monkeypatch.setenv(GRACE, "1min")
    one = Watched()
    one.tell()
    assert (one.after(59.9), one.after(0.1) != "") == ("", True)
    for wrong in ("", "soon", "0", "-3"):
        monkeypatch.setenv(GRACE, wrong)
        with pytest.raises(ConfigError, match="must be a time above 0"):
            Watched()


def test_siblings_are_counted_among_the_launcher_s_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    alive = psutil.Process(os.getppid()).children()
    for count, lost in ((1, False), (len(alive) + 1, True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
        assert vigil._has_lost_a_sibling() is lost


def test_a_signal_is_heard_while_the_main_thread_is_blocked_in_c() -> None:
    """No handler of Python's can run there; the watching thread ends the process, and shows where it hung."""
    script = (
        "import ctypes, signal, threading, os, time\n"
        "from dist_train.health.preemption import Preemption\n"
        "one = Preemption(grace_seconds=0.5)\n"
        "one.open()\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "libc = ctypes.CDLL(None)\n"
        "end = time.monotonic() + 30\n"
        "while time.monotonic() < end: libc.pause()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert "SIGTERM came" in ended.stderr
    assert "most recent call first" in ended.stderr


def test_the_descriptor_of_an_event_loop_still_hears_of_signals() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    assert signal.set_wakeup_fd(writing) == -1
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    heard: list[Any] = []
    one = Vigil()
    one.open()
    signal.raise_signal(Signals.SIGUSR2)
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        try:
            heard += os.read(reading, 16)
        except BlockingIOError:
            time.sleep(0.01)
    one.close()
    assert heard == [signal.SIGUSR2]
    assert signal.set_wakeup_fd(-1) == writing
    signal.signal(signal.SIGUSR2, before)
    for end in (reading, writing):
        os.close(end)
    assert not [thread for thread in threading.enumerate() if "vigil" in thread.name]
