"""Which connections are watched, and which silence counts as a lost machine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dist_train.connections import ConnectionWatch, Line

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="no TCP_INFO on this platform")
PATIENCE = 30.0
SILENT = Line(established=True, unanswered=True, silent_seconds=PATIENCE + 1)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(stack: ExitStack, *, apart: bool = True) -> tuple[socket.socket, socket.socket]:
    """Two ends; `apart` gives each an address of its own, as machines have."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    source = ("127.0.0.2", 0) if apart else None
    near = stack.enter_context(socket.create_connection(listener.getsockname(), 10, source_address=source))
    return near, stack.enter_context(listener.accept()[0])


def is_open(end: socket.socket) -> bool:
    end.settimeout(0.0)
    try:
        return end.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True


def test_a_connection_that_stays_silent_is_closed_at_the_second_look(stack: ExitStack) -> None:
    watch = ConnectionWatch(PATIENCE, look=lambda connection: SILENT)
    with watch.new_connections():
        near, far = connect(stack)
    assert (watch.close_silent(), is_open(near), is_open(far)) == ([], True, True)
    assert watch.close_silent() == ["127.0.0.1", "127.0.0.2"]
    assert not is_open(near)
    assert not is_open(far)
    assert watch.close_silent() == []


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(Line(established=True, unanswered=False, silent_seconds=500), id="nothing was sent: idle"),
        pytest.param(Line(established=True, unanswered=True, silent_seconds=PATIENCE - 1), id="not for long enough"),
        pytest.param(Line(established=False, unanswered=True, silent_seconds=500), id="closed already"),
    ],
)
def test_other_silence_closes_nothing(stack: ExitStack, line: Line) -> None:
    watch = ConnectionWatch(PATIENCE, look=lambda connection: line)
    with watch.new_connections():
        near, _ = connect(stack)
    for _ in range(3):
        assert watch.close_silent() == []
    assert is_open(near)


def test_an_answer_between_two_looks_clears_the_suspicion(stack: ExitStack) -> None:
    looks = iter([SILENT, SILENT, *[Line(established=True, unanswered=False, silent_seconds=0)] * 2, SILENT, SILENT])
    watch = ConnectionWatch(PATIENCE, look=lambda connection: next(looks))
    with watch.new_connections():
        near, _ = connect(stack)
    assert [watch.close_silent() for _ in range(3)] == [[], [], []]
    assert is_open(near)


def test_only_new_connections_to_other_machines_are_watched(stack: ExitStack) -> None:
    seen: list[tuple[str, int]] = []

    def look(connection: socket.socket) -> Line:
        seen.append(connection.getsockname())
        return Line(established=True, unanswered=False, silent_seconds=0)

    watch = ConnectionWatch(PATIENCE, look)
    before, _ = connect(stack)
    with watch.new_connections():
        near, far = connect(stack)
        connect(stack, apart=False)
        stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    watch.close_silent()
    assert sorted(seen) == sorted([near.getsockname(), far.getsockname()])
    assert [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for end in (before, near)] == [0, 1]
    assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10


def test_a_descriptor_that_became_another_file_is_let_go(stack: ExitStack) -> None:
    watch = ConnectionWatch(PATIENCE, look=lambda connection: SILENT)
    with watch.new_connections():
        near, far = connect(stack)
    kept = stack.enter_context(socket.socket())
    os.dup2(kept.fileno(), near.fileno())
    far.close()
    assert [watch.close_silent() for _ in range(3)] == [[], [], []]


def test_what_the_kernel_says_of_a_connection_is_read(stack: ExitStack) -> None:
    near, _ = connect(stack)
    line = Line.of(near)
    assert line.established
    assert not line.unanswered
    assert 0 <= line.silent_seconds < 60


def test_an_end_that_reads_nothing_is_not_silent(stack: ExitStack) -> None:
    """Its kernel answers the probes of its closed window; TCP_USER_TIMEOUT would give it up."""
    patience = 0.2
    watch = ConnectionWatch(patience)
    with watch.new_connections():
        near, _ = connect(stack)
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            near.send(b"x" * 65536)
    begun = time.monotonic()
    while time.monotonic() < begun + 4 * patience:
        assert watch.close_silent() == []
        time.sleep(0.02)
