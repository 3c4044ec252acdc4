"""Device -> host copies that the host does not wait for, on a stream of their own for each device.

    training's stream   ... update | waits for the copies | next step ...
    side stream                    '- copies, event -'
    host                           goes on at once; the writer's thread waits for the event, then reads

Invariant: a copy begins after everything that training had asked its device for, and ends before anything that it asks
for later: whatever training changes next, the bytes are those of the moment of `start`. What a device could not copy is
raised by `wait`, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from dist_train.errors import DeadlineError

Copy = tuple[torch.Tensor, torch.Tensor]
"""Page-locked host memory, and the tensor of a device whose elements go there."""
_LOOK_SECONDS = 0.001


class SideStreams:
    """The copies of one image."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._under_way: list[torch.cuda.Event] = []
        self._refused: RuntimeError | None = None

    def start(self, copies: Iterable[Copy]) -> None:
        """Enqueues the copies and returns; `wait` tells when they are done, and what went wrong."""
        by_device: dict[torch.device, list[Copy]] = {}
        for target, source in copies:
            by_device.setdefault(source.device, []).append((target, source))
        for device, members in by_device.items():
            try:
                self._start_on(device, members)
            except RuntimeError as error:  # out of memory for a tensor that has gaps, for one: the save fails alone
                self._refused = error

    def _start_on(self, device: torch.device, copies: list[Copy]) -> None:
        training = torch.cuda.current_stream(device)
        side = self._streams.get(device)
        if side is None:
            side = self._streams[device] = torch.cuda.Stream(device)
        side.wait_stream(training)
        try:
            with torch.cuda.stream(side):
                for target, source in copies:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(side)  # freed early, its memory is not given out again before it was copied
        finally:
            done = torch.cuda.Event()
            done.record(side)
            self._under_way.append(done)
            training.wait_event(done)

    def wait(self, timeout_seconds: float) -> None:
        """Until the copies are done; in any thread.

        Raises:
            RuntimeError: a device could not make one of them.
            DeadlineError: it has not made them in all that time.
        """
        deadline = time.monotonic() + timeout_seconds
        while self._under_way:
            if _is_done(self._under_way):
                continue
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"A GPU has not copied the state of a save to the host in {timeout_seconds:.0f} s: it seems to "
                    f"hang. Look at it (nvidia-smi, dmesg), then run the same command again."
                )
            time.sleep(_LOOK_SECONDS)
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused


def _is_done(under_way: list[torch.cuda.Event]) -> bool:
    """Takes the first event off once it has happened, or has failed and raises why."""
    event = under_way.pop(0)
    if event.query():
        return True
    under_way.insert(0, event)
    return False
