"""The watchdog: a thread of each rank that notices when the rank, or one that it waits for, does not come further.

    poll: come further? -> the time begins anew
          near the deadline: ask the others -> who is at work and has time left says so, and nobody is hung
          past it, and nobody said so: the verdict -> every rank writes its stacks -> all leave, to be restarted

Invariant: it only looks (`phases`, /proc, a folder) and touches nothing of the training; a rank that merely waits for
one that is at work is never hung. Time in which this process did not run (a laptop's lid, SIGSTOP and SIGCONT of a
whole group, a suspended job) is no time. It saves nothing: the restart goes on from the newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dist_train import launched, phases
from dist_train.console import print_text, seconds_text
from dist_train.health import stacks
from dist_train.health.hang_folder import HangFolder
from dist_train.health.leaving import Departure, Leave
from dist_train.health.patience import Patience, Section, section_of
from dist_train.health.stacks import Peer
from dist_train.phases import Phase

Json = Any
logger = logging.getLogger(__name__)
MOST_TICK_SECONDS = 1.0
MOST_WINDOW_SECONDS = 60.0
"""How long before its deadline a rank asks the others. Longer than NFS believes that a folder is as it was (30 s)."""
GRACE_SECONDS = 5.0
"""How long the ranks wait for each other's stacks before they leave."""
BACKUP_MARGIN_SECONDS = 60.0
_LEAVING_SECONDS = 10.0
_PLACE = "main thread "
_MOST_PLACES = 8
_ASLEEP_SECONDS = 2.0
_ASLEEP_TICKS = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Where the main thread is."""

    beats: int
    phase: Phase
    awaited: str
    global_step: int

    @staticmethod
    def of_this_process() -> Place:
        return Place(phases.beats(), phases.current(), phases.awaited(), phases.global_step())


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a watchdog is told of its rank."""

    rank: int
    world_size: int
    attempt: int
    shown: str
    """The hang folder as people are told of it."""
    peers: Sequence[Peer] = ()
    """Where each rank runs."""
    leaves: bool = False
    """Whether a hung process ends: where a launcher restarts it, or other processes wait for it. A notebook is never
    ended."""


class AwakeClock:
    """Seconds in which this process ran: a poll that came much too late was no poll but a sleep."""

    def __init__(self, tick_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._tick = tick_seconds
        self._clock = clock
        self._last = clock()
        self._asleep = 0.0

    def read(self) -> float:
        """Once a tick."""
        now = self._clock()
        gap, self._last = now - self._last, now
        if gap > max(_ASLEEP_TICKS * self._tick, _ASLEEP_SECONDS):
            self._asleep += gap - self._tick
        return now - self._asleep


class Watchdog:
    """Of one attempt on one rank.

    Args:
        write_event: into run.jsonl; does nothing but on the main rank.
        look: where the main thread is.
        leave: ends the process with a code.
    """

    def __init__(
        self,
        patience: Patience,
        folder: HangFolder,
        surroundings: Surroundings,
        write_event: Callable[..., None],
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[], Place] = Place.of_this_process,
        leave: Leave = os._exit,
    ) -> None:
        base = patience.base_seconds
        self.tick_seconds = min(max(base / 20, 0.05), MOST_TICK_SECONDS)
        self._window = min(max(base / 3, 2.0), base / 2, MOST_WINDOW_SECONDS)
        self._patience = patience
        self._folder = folder
        self._told = surroundings
        self._write_event = write_event
        self._look = look
        self._leave = leave
        self._clock = AwakeClock(self.tick_seconds, clock)
        self._step_at_start: int | None = None
        self._place = look()
        self._since = self._looked = self._clock.read()
        self._armed = -math.inf
        self._last_words: dict[int, tuple[bytes, float]] = {}
        self._is_asked = self._has_warned = self._has_failed = False
        self._next_warning = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dist_train-watchdog", daemon=True)

    def start(self) -> None:
        if self._told.leaves and not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # SIGABRT then shows the stacks of a rank in which no Python runs any more
        self._thread.start()

    def loop_begins(self, global_step: int) -> None:
        """From here on the first optimizer update is waited for."""
        self._step_at_start = global_step

    def close(self) -> None:
        """Nothing is watched any more."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)
        if self._told.leaves:
            faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            self._folder.withdraw()

    def _watch(self) -> None:
        while not self._stop.wait(self.tick_seconds):
            try:
                self.poll()
            except Exception:  # whatever it could not do, training must not notice
                if not self._has_failed:
                    self._has_failed = True
                    logger.warning("Rank %d: the watchdog failed and goes on.", self._told.rank, exc_info=True)

    def poll(self) -> None:
        """Looks once, and acts."""
        now, place = self._clock.read(), self._look()
        self._arm_backup(now)
        if place.beats != self._place.beats or place.phase is not self._place.phase:
            self._note_progress(place, now)
        section = self._section(place)
        if section is None:
            return
        seconds, deadline = now - self._since, self._patience.seconds(section)
        names = self._names(now, seconds, deadline)
        self._answer(section, seconds, deadline)
        if verdict := self._folder.verdict(names):
            self._end(verdict, section, seconds, deadline)
        elif seconds >= max(deadline, self._next_warning) and not self._is_excused(names, now):
            self._declare(place, section, seconds, deadline)

    # Who is hung

    def _note_progress(self, place: Place, now: float) -> None:
        seconds, section = now - self._since, self._section(self._place)
        # What took longer than it may was excused, by a rank that was at work: it says nothing of this one.
        if section is not None and seconds <= self._patience.seconds(section):
            self._patience.observe(section, seconds)
        if self._has_warned:
            logger.warning("Rank %d goes on after %s.", self._told.rank, seconds_text(seconds))
        self._place, self._since = place, now
        self._has_warned, self._next_warning = False, 0.0
        with suppress(OSError):
            self._folder.withdraw()

    def _section(self, place: Place) -> Section | None:
        has_stepped = self._step_at_start is not None and place.global_step > self._step_at_start
        return section_of(place.phase, awaits=bool(place.awaited), has_stepped=has_stepped)

    def _names(self, now: float, seconds: float, deadline: float) -> frozenset[str]:
        """What lies in the folder, looked at when this rank or another one may be in trouble."""
        if self._told.world_size == 1:
            return frozenset()
        near = seconds >= deadline - self._window
        if near and not self._is_asked:
            with suppress(OSError):
                self._folder.ask()
        pause = 0.0 if near or self._is_asked else self._window / 4
        if seconds < pause or now - self._looked < pause:
            return frozenset()
        self._looked = now
        names = self._folder.names()
        self._is_asked = self._folder.is_asked(names)
        return names

    def _answer(self, section: Section, seconds: float, deadline: float) -> None:
        """A rank at work with time left says so when it is asked; one that waits for others, too, cannot help."""
        has_time = section is not Section.AGREEMENT and deadline - seconds > self._window
        with suppress(OSError):
            if self._is_asked and (has_time or stacks.is_debugged()):
                self._folder.say_working(section=section, seconds=seconds, deadline=deadline)
            else:
                self._folder.work_is_over()

    def _is_excused(self, names: frozenset[str], now: float) -> bool:
        """Whether a rank is at work and has renewed its word lately: one that was stopped since does not."""
        words, before = self._folder.working(names), self._last_words
        self._last_words = {
            rank: before[rank] if rank in before and before[rank][0] == word else (word, now)
            for rank, word in words.items()
        }
        return any(now - at <= self._window for _, at in self._last_words.values())

    # What happens then

    def _declare(self, place: Place, section: Section, seconds: float, deadline: float) -> None:
        stack = stacks.main_stack()
        verdict = {
            "at": time.time(),
            "attempt": self._told.attempt,
            "rank": self._told.rank,
            "global_step": place.global_step,
            "phase": str(place.phase),
            "section": str(section),
            "seconds": round(seconds, 3),
            "deadline": round(deadline, 3),
            "line": stacks.line_of_the_script(stack),
            "stacks": self._told.shown,
        }
        if place.awaited:
            verdict["awaited"] = place.awaited
        if self._told.leaves and not stacks.is_debugged():
            self._end(verdict, section, seconds, deadline)
        else:
            self._warn(verdict, seconds, deadline)

    def _warn(self, verdict: dict[str, Json], seconds: float, deadline: float) -> None:
        """Again when twice the time has passed."""
        self._has_warned, self._next_warning = True, 2 * seconds
        self._leave_stacks(verdict, seconds, deadline)
        advice = "Nobody would restart this process, so it is left as it is. To give up, interrupt it (Ctrl-C) and run "
        advice += "the same again: it goes on from the newest checkpoint. What hangs may need it a second time."
        _say(f"{self._paragraph(verdict)} {advice}")
        self._tell(verdict)

    def _end(self, verdict: dict[str, Json], section: Section, seconds: float, deadline: float) -> None:
        """Leaves, whatever hangs meanwhile: the file system may be what is hung. Stays where what hung goes on."""
        departure = Departure(_LEAVING_SECONDS, "it was hung, and so was writing down where", 1, leave=self._leave)
        leaves = True
        try:
            leaves = self._leave_word(verdict, section, seconds, deadline)
        finally:
            departure.cancel()
            if leaves:
                self._leave(1)

    def _leave_word(self, verdict: dict[str, Json], section: Section, seconds: float, deadline: float) -> bool:
        """Returns whether it is still so that this rank leaves."""
        is_first, was_passed = False, verdict["rank"] != self._told.rank
        with suppress(OSError):
            if not was_passed:
                is_first, was_passed = self._folder.pass_verdict(verdict), True
        if is_first:
            _say(f"{self._paragraph(verdict)} All ranks end now, to be restarted.")
        self._leave_stacks(verdict, seconds, deadline)
        self._note(verdict["rank"], section, seconds, deadline)
        missing = self._wait_for_stacks()
        if was_passed and self._is_overtaken(missing if is_first else ()):
            return False
        if self._told.rank == 0:
            self._tell(verdict)
        if is_first:
            self._sum_up(missing)
            for rank in missing:
                self._end_other(rank)
        stacks.kill_children()
        return True

    def _is_overtaken(self, missing: Sequence[int]) -> bool:
        """Whether what hung goes on. The rank that passed the verdict sees it, and takes it back as long as some rank
        (`missing`) has not begun to leave; the others see that it is gone.
        """
        before, now = self._place, self._look()
        ends = now.phase in (Phase.END, Phase.OUTSIDE)  # well or by an error, which is no progress
        moves = now.global_step > before.global_step or (now.beats != before.beats and not ends)
        if not (missing and moves) and not self._folder.is_verdict_gone():
            return False
        with suppress(OSError):
            self._folder.take_back_verdict()
        launched.note(error=None)
        _say(f"Rank {self._told.rank} is not ended: what hung goes on.")
        return True

    def _leave_stacks(self, verdict: dict[str, Json], seconds: float, deadline: float) -> None:
        text = f"{self._heading(seconds, deadline)}\n\n{stacks.stacks_of_all_threads()}\n"
        try:
            self._folder.write_stacks(text)
        except OSError as error:
            _say(f"{self._told.shown} could not be written ({error}); the stacks:\n{text}")

    def _tell(self, verdict: dict[str, Json]) -> None:
        with suppress(OSError):
            self._write_event("hung", **verdict)
            self._folder.mark_told()

    def _note(self, hung: int, section: Section, seconds: float, deadline: float) -> None:
        """For the launcher; the ranks that only wait, or were well, are not those whose error matters."""
        stack = stacks.main_stack()
        waits = section is Section.AGREEMENT or (self._told.world_size > 1 and stacks.waits_for_peers(stack))
        is_well = hung != self._told.rank and seconds < deadline / 2
        message = f"hung at step {self._place.global_step}: {section} took {_shown(seconds)} of at most "
        message += f"{_shown(deadline)}, at {stacks.line_of_the_script(stack)}; stacks in {self._told.shown}"
        launched.note(
            global_step=self._place.global_step,
            error={
                "type": "Hang",
                "message": message,
                "traceback": stacks.stacks_of_all_threads(),
                "phase": str(self._place.phase),
                "secondary": waits or is_well,
                "final": False,
            },
        )

    def _wait_for_stacks(self) -> list[int]:
        """Ranks that have written none in time, or cannot."""
        end = time.monotonic() + GRACE_SECONDS
        while True:
            there = self._folder.ranks_with_stacks(self._folder.names())
            if self._told.rank not in there:  # nobody can write there
                return []
            missing = [rank for rank in range(self._told.world_size) if rank not in there]
            if all(self._is_out(rank) for rank in missing) or time.monotonic() >= end:
                return missing
            time.sleep(0.05)

    def _end_other(self, rank: int) -> None:
        """A rank of this host that cannot leave by itself: the launcher would give it another half a minute to."""
        peers, mine = self._told.peers, self._told.rank
        if rank == mine or rank >= len(peers) or not peers[rank].is_alive(peers[mine]):
            return
        is_stopped = self._state(rank) == stacks.STOPPED
        with suppress(OSError):
            os.kill(peers[rank].pid, signal.SIGKILL if is_stopped else signal.SIGABRT)

    # In words

    def _paragraph(self, verdict: dict[str, Json]) -> str:
        what = f"the agreement on {verdict['awaited']}" if "awaited" in verdict else verdict["section"]
        text = (
            f"Rank {verdict['rank']} of {self._told.world_size} hangs at step {verdict['global_step']}: {what} has "
            f"taken {_shown(verdict['seconds'])}, and its deadline is {_shown(verdict['deadline'])}. It is at "
            f"{verdict['line']}."
        )
        ranks = [self._named(rank) for rank in range(self._told.world_size) if self._is_out(rank)]
        text += f" Not running: {', '.join(ranks)}." if ranks else ""
        return f"{text} Where all threads are stands in {self._told.shown}."

    def _heading(self, seconds: float, deadline: float) -> str:
        told, place = self._told, self._place
        lines = [
            f"rank {told.rank} of {told.world_size}, process {os.getpid()} on {Peer.of_this_process().name}, attempt "
            f"{told.attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}",
            f"step {place.global_step}, phase {place.phase}, for {_shown(seconds)} of at most {_shown(deadline)}",
        ]
        if place.awaited:
            lines.append(f"waiting for the other ranks to agree on {place.awaited}")
        lines.append(f"{_PLACE}{self._line()}")
        others = [rank for rank in range(len(told.peers)) if rank != told.rank and self._state(rank)]
        lines += [f"beside it: {self._named(rank)}" for rank in others]
        return "\n".join([*lines, *stacks.children_lines()])

    def _line(self) -> str:
        stack = stacks.main_stack()
        waits = self._told.world_size > 1 and stacks.waits_for_peers(stack)
        return ("in a collective, at " if waits else "at ") + stacks.line_of_the_script(stack)

    def _sum_up(self, missing: Sequence[int]) -> None:
        """Who waits for whom, as far as that shows: the ranks outside of collectives first."""
        there = self._folder.ranks_with_stacks(self._folder.names())
        found = {rank: self._folder.line_of(rank, _PLACE) for rank in there}
        lines = sorted((line.startswith("in a coll"), rank, line) for rank, line in found.items() if line)
        places = [f"rank {rank} {line}" for _, rank, line in lines[:_MOST_PLACES]]
        text = f"Where the ranks are: {'; '.join(places)}." if places else "Nobody knows where the ranks are."
        if missing:
            text += f" No stacks came from {', '.join(self._named(rank) for rank in missing[:_MOST_PLACES])}."
        _say(text)

    def _state(self, rank: int) -> str:
        """How the process of a rank on this host stands."""
        peers = self._told.peers
        return peers[rank].state(peers[self._told.rank]) if rank < len(peers) else ""

    def _named(self, rank: int) -> str:
        """A rank with what can be known of it from here."""
        if rank >= len(self._told.peers):
            return f"rank {rank}"
        peer, state = self._told.peers[rank], self._state(rank)
        return f"rank {rank} (process {peer.pid} on {peer.name}{', ' if state else ''}{state})"

    def _is_out(self, rank: int) -> bool:
        """Whether it is known that no stacks will come from it."""
        return self._state(rank) in (stacks.STOPPED, stacks.DEAD)

    # Where no Python thread runs any more

    def _arm_backup(self, now: float) -> None:
        """A thread in C ends the process when this one cannot run, because the interpreter's lock is never let go."""
        pause = max(self._patience.base_seconds / 20, self.tick_seconds)
        if self._told.leaves and self._thread.ident is not None and now - self._armed >= pause:
            self._armed = now
            seconds = self._patience.longest_seconds + BACKUP_MARGIN_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # whoever read the output may be gone
        print_text(text, error=True)


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else seconds_text(seconds)
