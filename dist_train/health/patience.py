"""How long a rank may be at one thing before it counts as hung.

    steps, waits for data, agreements   the base: 5 minutes, more where steps are slow, or what the user says
    what runs the user's own code, compiles, saves or loads   six times the base, more where it was seen to take longer

Invariant: pure; what was observed makes a deadline longer, never shorter, and what the user says for steps holds
exactly. It reads no clock.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from statistics import median_low

from dist_train.errors import ConfigError
from dist_train.phases import Phase
from dist_train.units import parse_seconds

AUTO = "auto"
OFF = "off"
BASE_SECONDS = 300.0
"""A step of any model on any hardware that somebody trains on in earnest is over by then, or will be learned."""
LONG_SHARE = 6.0
"""With the default base 30 minutes, which is what the process group's collectives wait, too."""
TIMES_USUAL = 12.0
"""A step ten times slower than usual happens: a full page cache, a neighbour on the file system, a recompilation."""
TIMES_SLOWEST = 3.0
_REMEMBERED = 33


class Section(StrEnum):
    """What a rank is at, as far as its deadline goes."""

    FIRST_STEP = "the first step"
    STEP = "a step"
    DATA = "a wait for data"
    AGREEMENT = "an agreement of the ranks"
    EVALUATION = "an evaluation"
    SAVE = "a save"
    LOAD = "a load"
    OTHER = "the loop's own code"
    END = "the run's end"


SHORT = frozenset({Section.STEP, Section.DATA, Section.AGREEMENT})

_SECTIONS = {
    Phase.LOAD: Section.LOAD,
    Phase.DATA: Section.DATA,
    Phase.STEP: Section.STEP,
    Phase.EVALUATION: Section.EVALUATION,
    Phase.CAPTURE: Section.SAVE,
    Phase.SAVE_WAIT: Section.SAVE,
    Phase.OTHER: Section.OTHER,
    Phase.END: Section.END,
}


def section_of(phase: Phase, *, awaits: bool, has_stepped: bool) -> Section | None:
    """None where nobody watches: before a run and after it, and in the rendezvous, which has a deadline of its own.

    Args:
        awaits: the rank only waits for the others to agree.
        has_stepped: this attempt has an optimizer update behind it; what was to be compiled for steps is.
    """
    section = _SECTIONS.get(phase)
    if section is not None and awaits:
        return Section.AGREEMENT
    if section in (Section.STEP, Section.DATA) and not has_stepped:
        return Section.FIRST_STEP
    return section


class Patience:
    """The deadlines of one rank.

    Args:
        told_seconds: what the user says for steps, waits for data and agreements; None learns them.
    """

    def __init__(self, told_seconds: float | None = None) -> None:
        self.base_seconds = BASE_SECONDS if told_seconds is None else told_seconds
        self._is_told = told_seconds is not None
        self._observed: dict[Section, deque[float]] = {}
        self._slowest: dict[Section, float] = {}

    @staticmethod
    def parse(hang_timeout: str | float | None) -> Patience | None:
        """Of `RunOptions.hang_timeout`; None where nothing is to be watched.

        Raises:
            ConfigError: it is no duration of a second or more.
        """
        if hang_timeout is None or hang_timeout == OFF:
            return None
        if hang_timeout == AUTO:
            return Patience()
        seconds = parse_seconds(hang_timeout)
        if not 1.0 <= seconds < float("inf"):
            raise ConfigError(
                f"{hang_timeout!r} is no time to wait for a step; give '10min' or 600 (seconds), a second at least, "
                f"'auto' to learn it from the steps, or 'off'."
            )
        return Patience(seconds)

    @property
    def longest_seconds(self) -> float:
        """Of all deadlines, as they are now."""
        return max(self.seconds(section) for section in Section)

    def observe(self, section: Section, seconds: float) -> None:
        """It has come further in `section` after so long. An agreement's length says what the other ranks were at."""
        if section is Section.AGREEMENT:
            return
        self._slowest[section] = max(self._slowest.get(section, 0.0), seconds)
        # Steps that are slow are first seen as the first one. It may have compiled, too: among them it is one of many.
        usual = Section.STEP if section is Section.FIRST_STEP else section
        self._observed.setdefault(usual, deque(maxlen=_REMEMBERED)).append(seconds)

    def seconds(self, section: Section) -> float:
        """The deadline of `section`."""
        if section not in SHORT:
            return max(LONG_SHARE * self.base_seconds, TIMES_SLOWEST * self._slowest.get(section, 0.0))
        if self._is_told or section not in self._observed:
            return self.base_seconds
        usual = median_low(self._observed[section])
        return max(self.base_seconds, TIMES_USUAL * usual, TIMES_SLOWEST * self._slowest.get(section, 0.0))
