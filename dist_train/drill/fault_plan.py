"""FaultPlan: which faults a run meets, and which of them really came. [stdlib only]

    plan = FaultPlan("scratch/faults", seed=3).kill(rank=1, at_step=12).stop(rank="all", at_phase="capture")
    command = [sys.executable, "-m", "dist_train.drill.victim", "train.py"]
    subprocess.run(command, env={**os.environ, **plan.environment()}, timeout=600)
    plan.require_all_fired()

Invariant: a fault is noted in `fired.jsonl`, fsynced, before it is done, and is done once over all lives and ranks of
a run; those of `rank="all"` which are no signal once by each rank. The plan travels through one environment variable to
the workers, where `victim` arms it under any launcher; nothing happens in a process that was not started that way.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from dist_train.drill.faults import KINDS, Fault, Fired, Rank
from dist_train.errors import ConfigError, DistTrainError
from dist_train.phases import Phase, Point

Json = Any
VARIABLE: Final = "DIST_TRAIN_FAULTS"
"""Environment variable that a plan travels by."""
FIRED_LOG: Final = "fired.jsonl"
AT_A_STEP: Final = str(Point.STEP_DONE)
MOMENTS_OF_A_STEP: Final = (Phase.DATA, Phase.STEP, Point.STEP_DONE)
MOMENTS_OF_A_SAVE: Final = (
    Phase.CAPTURE,
    Point.WRITING,
    Point.BEFORE_COMMIT,
    Point.AFTER_COMMIT,
    Point.RETENTION,
)
HANG_SECONDS: Final = 600.0


class FaultsMissedError(DistTrainError, AssertionError):
    """Faults of a plan never came: what was tested is not what was meant."""


class FaultPlan:
    """Faults to inject into a run, built up by its methods, each of which returns the plan.

    When: `at_step=12` is when update 12 is counted, before the ranks have agreed on what follows. `at_phase="capture"`
    is when that `Phase` is entered or that `Point` reached, `nth` counts within one life; with both, the phase counts
    from that step on. Whom: a rank, "all", or "random", which the seed picks.

    Args:
        folder: where it is noted what has fired; one for each run, made when missing, on a file system all ranks share.
        seed: of `rank="random"` and `at_random`.
        in_order: a fault waits until all before it have come: `load` then is that of the life after a kill.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        seed: int = 0,
        in_order: bool = False,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.in_order = in_order
        self.folder = Path(os.path.abspath(folder))
        self.seed = seed
        self.faults: tuple[Fault, ...] = tuple(faults)

    # What happens

    def kill(self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """SIGKILL: the process is gone."""
        return self._add("kill", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def stop(self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """SIGSTOP: the process is there and does nothing more."""
        return self._add("stop", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def terminate(self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """SIGTERM: the process is asked to leave, as by a platform that wants its machine back."""
        return self._add("terminate", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def terminate_launcher(self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """SIGTERM to whoever started the rank's process: a launcher hands it on to its workers."""
        return self._add("terminate_launcher", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def hang(
        self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1, seconds: float = HANG_SECONDS
    ) -> FaultPlan:
        """The thread that comes there sleeps: a rank that is stuck in Python. Afterwards it goes on."""
        return self._add("hang", rank, at_step=at_step, at_phase=at_phase, nth=nth, seconds=seconds)

    def raise_error(
        self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1, message: str = "injected"
    ) -> FaultPlan:
        """An `InjectedError` comes out of the library's call, as a mistake of the script's would."""
        return self._add("raise_error", rank, at_step=at_step, at_phase=at_phase, nth=nth, message=message)

    def exit(
        self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1, code: int = 1
    ) -> FaultPlan:
        """`os._exit`: without a word, nothing is flushed or closed."""
        return self._add("exit", rank, at_step=at_step, at_phase=at_phase, nth=nth, code=code)

    def fail_io(
        self,
        errno: int,
        *,
        rank: Rank = 0,
        kind: str = "",
        path: str = "",
        nth: int = 1,
        at_step: int = 0,
        times: int = 1,
        lasting: bool = False,
    ) -> FaultPlan:
        """A file operation of the run directory's store fails in place of happening.

        Args:
            errno: for instance `errno.ENOSPC`.
            kind: create, open, write, truncate, fsync, fsync_dir, rename, mkdir, unlink, rmdir or symlink; else any.
            path: a part of the path, relative to the run directory; else any.
            nth: the first that fails, of those that match within one life.
            times: how many fail, from that one on.
            lasting: all that follow in that life fail.
        """
        times = 0 if lasting else times
        more = {"code": errno, "operation": kind, "path": path, "times": times}
        return self._add("fail_io", rank, at_step=at_step, nth=nth, **more)

    def kill_data_worker(self, rank: Rank, *, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """SIGKILL to one of the rank's DataLoader workers, as soon as there is one."""
        return self._add("kill_data_worker", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def corrupt_newest(self, *, rank: Rank = 0, at_step: int = 0, at_phase: str = AT_A_STEP, nth: int = 1) -> FaultPlan:
        """A byte in the newest checkpoint is flipped and all ranks are killed, so that the next life finds it so. It
        waits until there are two.
        """
        return self._add("corrupt_newest", rank, at_step=at_step, at_phase=at_phase, nth=nth)

    def at_random(self, kinds: Sequence[str], *, count: int, within_steps: int, rank: Rank = "random") -> FaultPlan:
        """`count` faults of the given kinds, each kind as often as another, at moments that the seed picks: two in
        three inside of a save, from a step below `within_steps` on.
        """
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ConfigError(f"There is no fault {', '.join(unknown)}; there are {', '.join(KINDS)}.")
        rng = random.Random(f"{self.seed}-{len(self.faults)}")
        for index in range(count):
            kind, step = kinds[index % len(kinds)], rng.randint(1, max(within_steps - 1, 1))
            moments = MOMENTS_OF_A_SAVE if rng.random() < 2 / 3 else MOMENTS_OF_A_STEP
            moment = rng.choice(moments)
            if kind == "fail_io":
                self.fail_io(28, kind="write", path="checkpoints/", at_step=step, rank=0)
            elif kind == "corrupt_newest":
                self.corrupt_newest(at_step=step)
            else:
                # The later points are the main rank's: only there a save is committed.
                on_main = moment in (Point.BEFORE_COMMIT, Point.AFTER_COMMIT, Point.RETENTION)
                whom: Rank = 0 if on_main and rank == "random" else rank
                self._add(kind, whom, at_step=step, at_phase=str(moment), **_DETAILS.get(kind, {}))
        return self

    def _add(self, kind: str, rank: Rank, **details: Json) -> FaultPlan:
        details = {name: str(value) if name == "at_phase" else value for name, value in details.items()}
        self.faults = (*self.faults, Fault(number=len(self.faults), kind=kind, rank=rank, **details))
        return self

    # How it travels

    def environment(self) -> dict[str, str]:
        """For the environment of the command that is to suffer; makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        faults = [fault.to_json() for fault in self.faults]
        return {
            VARIABLE: json.dumps(
                {"folder": str(self.folder), "seed": self.seed, "in_order": self.in_order, "faults": faults}
            )
        }

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> FaultPlan | None:
        """The plan that this process is to suffer, None where there is none."""
        text = environment.get(VARIABLE)
        if text is None:
            return None
        values = json.loads(text)
        faults = [Fault.from_json(one) for one in values["faults"]]
        return FaultPlan(values["folder"], seed=values["seed"], in_order=values["in_order"], faults=faults)

    # What came

    def fired(self) -> list[Fired]:
        """What has come so far, in order."""
        try:
            text = (self.folder / FIRED_LOG).read_text()
        except FileNotFoundError:
            return []
        # The last line may be torn by a power loss: then the deed was not done either.
        return [Fired(**json.loads(line)) for line in text.split("\n")[:-1]]

    def missed(self) -> list[Fault]:
        """What has not come yet."""
        came = {one.number for one in self.fired()}
        return [fault for fault in self.faults if fault.number not in came]

    def require_all_fired(self) -> FaultPlan:
        """Raises FaultsMissedError, which names the faults that never came."""
        if missed := self.missed():
            came = "; ".join(f"{one.kind} on rank {one.rank} at step {one.global_step}" for one in self.fired())
            raise FaultsMissedError(
                f"{len(missed)} of {len(self.faults)} faults never came: "
                f"{'; '.join(fault.describe() for fault in missed)}. Those that did: {came or 'none'}. Choose moments "
                f"that the run reaches, and start it through `python -m dist_train.drill.victim`."
            )
        return self

    def claim(self, fault: Fault, *, rank: int, attempt: int, global_step: int, phase: str) -> bool:
        """Notes durably that a fault comes now; False if it has come already."""
        at = time.time()
        note = Fired(
            number=fault.number,
            kind=fault.kind,
            rank=rank,
            attempt=attempt,
            global_step=global_step,
            phase=phase,
            at=at,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / FIRED_LOG, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if self.has_fired(fault, rank):
                return False
            os.write(descriptor, (json.dumps(asdict(note)) + "\n").encode())
            os.fsync(descriptor)
            return True
        finally:
            os.close(descriptor)

    def has_fired(self, fault: Fault, rank: int) -> bool:
        """Whether nothing is left for that rank to do."""
        return any(
            one.number == fault.number and (one.rank == rank or not fault.is_done_by_each) for one in self.fired()
        )

    def may_come(self, fault: Fault) -> bool:
        """Whether it is this fault's turn."""
        if not self.in_order:
            return True
        came = {one.number for one in self.fired()}
        return all(number in came for number in range(fault.number))


_DETAILS: dict[str, dict[str, Json]] = {
    "hang": {"seconds": HANG_SECONDS},
    "exit": {"code": 1},
    "raise_error": {"message": "injected"},
}
