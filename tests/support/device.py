"""A device that does nothing until it is let, in place of `torch.cuda`: what a program may rely on is the order that
streams and events give, not when work happens to be done.

Each stream keeps what was asked of it in order; `run` does it, always from a stream of the test's choice first, as far
as the events that it waits for have happened. What is copied too early or too late shows in the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

COPY = torch.Tensor.copy_


class Event:
    """Happens when the stream that it was recorded on comes to it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.has_happened = False

    def record(self, stream: Stream) -> None:
        stream.ask("record", lambda: setattr(self, "has_happened", True))

    def query(self) -> bool:
        if self._device.fault:
            raise RuntimeError(self._device.fault)
        self._device.looks += 1
        if self._device.runs_when_looked_at:
            self._device.run()
        return self.has_happened


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.name = name
        self.asked: list[tuple[str, Callable[[], None], Event | None]] = []
        self._device = device

    def ask(self, what: str, work: Callable[[], None], after: Event | None = None) -> None:
        self._device.log.append(f"{self.name}: {what}")
        self.asked.append((what, work, after))

    def wait_event(self, event: Event) -> None:
        self.ask("wait", lambda: None, event)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self._device)
        event.record(other)
        self.wait_event(event)

    def advance(self) -> bool:
        """Does the next thing, if it may; whether it did."""
        if not self.asked or (self.asked[0][2] is not None and not self.asked[0][2].has_happened):
            return False
        self.asked.pop(0)[1]()
        return True


class Device:
    """Stands for the GPU that every CPU tensor of the test lies on."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fault = ""
        self.looks = 0
        self.runs_when_looked_at = True
        self.training = self.current = Stream(self, "training")
        self.streams = [self.training]
        self.recorded: list[torch.Tensor] = []

    def launch(self, kernel: Callable[[], Any]) -> None:
        """What a training step asks of its device."""
        self.training.ask("kernel", kernel)  # type: ignore[arg-type]

    def run(self) -> None:
        """Everything that was asked for, the first stream as far as it can before another."""
        while any(stream.advance() for stream in self.streams):
            pass

    def make_stream(self, device: object) -> Stream:
        self.streams.append(Stream(self, "side"))
        return self.streams[-1]

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def copy_method(self) -> Callable[..., torch.Tensor]:
        """In place of `Tensor.copy_`."""

        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return COPY(target, source)
            self.current.ask("copy", lambda: COPY(target, source))  # type: ignore[arg-type, return-value]
            return target

        return copy


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Device:
    """From now on streams, events and copies that do not block are those of a `Device`."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device_of_it: device.training)
    monkeypatch.setattr(torch.cuda, "Stream", device.make_stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(device))
    monkeypatch.setattr(torch.cuda, "stream", device.use)
    monkeypatch.setattr(torch.Tensor, "copy_", device.copy_method())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.recorded.append(tensor))
    return device
