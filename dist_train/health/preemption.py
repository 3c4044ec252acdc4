"""A platform, a launcher or a person tells this process to leave: a flag, for the ranks' next agreement.

    SIGTERM, SIGINT     leave; either of them again, a second later, means now
    SIGUSR1, SIGHUP     leave; sent ahead of time (SLURM's --signal=USR1@300), so that again means nothing new

    signal -> handler: the flag -> every rank's next boundary: stop, save, end
           -> wakeup descriptor -> `Vigil`: no boundary in the time given -> end without one

Invariant: the handler sets the flag and does nothing else, until it is told a second time: then the former handler is
back and the signal raised again. A signal that is ignored (nohup), or that the script handles itself, keeps its
meaning; all handlers are put back as they were. It decides nothing for other ranks.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from signal import Signals
from types import FrameType
from typing import Any

from dist_train.errors import StopReason
from dist_train.health.vigil import URGENT, WARNINGS, Told, Vigil

logger = logging.getLogger(__name__)


class Preemption:
    """The flag of this process, from `open` to `close`.

    Args:
        grace_seconds: from the signal to the end where no boundary comes; None takes what is known of the launcher.
        several: other ranks exist, which may be gone.
    """

    def __init__(
        self,
        *,
        grace_seconds: float | None = None,
        several: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._told = Told()
        self._clock = clock
        self._former: dict[Signals, Any] = {}
        self._vigil = Vigil(grace_seconds=grace_seconds, several=several)

    @property
    def signal(self) -> Signals | None:
        """What this rank was told; None as long as nobody tells it to leave."""
        return self._told.signal

    @property
    def reason(self) -> StopReason | None:
        """As which the run then ends; None while nobody told this rank to leave."""
        if self.signal is None:
            return None
        return StopReason.INTERRUPTED if self.signal is signal.SIGINT else StopReason.PREEMPTED

    def open(self) -> None:
        """Takes the signals over; where that cannot be, says so and leaves them alone."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "The run is not on the main thread, where signals are handled: SIGTERM and Ctrl-C end it as they end "
                "any program, without a last checkpoint."
            )
            return
        try:
            for name in (*URGENT, *WARNINGS):
                if hasattr(signal, name):
                    self._take(Signals[name])
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning(
                "Signals cannot be handled here (%s): SIGTERM ends the run without a last checkpoint.", error
            )
        self._vigil.numbers = frozenset(self._former)
        self._vigil.open()

    def close(self) -> None:
        """Puts all handlers back."""
        self._vigil.close()
        for number in list(self._former):
            self._put_back(number)

    def settle(self) -> None:
        """The stop is agreed: what comes now is the save, which has deadlines of its own."""
        self._vigil.end()

    def _take(self, number: Signals) -> None:
        former = signal.getsignal(number)
        if former is signal.SIG_IGN:
            return
        by_default = former in (signal.SIG_DFL, signal.default_int_handler)
        if not by_default and _preemption_of(former) is None:
            logger.warning(
                "%s has a handler of this script's, which keeps it. To save and stop on it, call "
                "run.stop(dist_train.StopReason.PREEMPTED) there.",
                number.name,
            )
            return
        signal.signal(number, self._hear)
        self._former[number] = former

    def _put_back(self, number: Signals) -> None:
        former = self._former.pop(number)
        if signal.getsignal(number) == self._hear:  # else somebody took it over meanwhile
            signal.signal(number, former)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        told = Signals(number)
        outer = _preemption_of(self._former.get(told))
        if self._told.hear(told, self._clock()):
            for one in [one for one in self._former if one.name in URGENT]:
                self._put_back(one)
            signal.raise_signal(told)
        elif outer is not None:  # a run around this one
            outer._hear(number, frame)


def _preemption_of(handler: Any) -> Preemption | None:
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Preemption) else None
