"""Every fault at every phase of a run under `dist-train launch`: what is tried, what must come of it, and the table.

    python -m tests.support.fault_table docs/fault-table.md LOG     tries all (half an hour) and writes the page; what
                                                                    the log holds already is not tried again

A cell is one fault at one phase. The run is launched with that fault planned; where it may end before its end (a
signal that asks it to, an error before the run was entered) the same command is given once more. Whatever happened, the
end must equal, bit for bit, the run that met no fault.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dist_train.drill import FaultPlan
from dist_train.errors import ExitCode
from tests.support.launch import ROOT, Outcome, run_command
from tests.support.twins import assert_same_run

WORLD_SIZES = (2, 4)
EPOCHS = 3
LAST_STEP = 21
"""Seven updates an epoch."""
MID_EPOCH = 10
HANG_SECONDS = 8
DEADLINE_SECONDS = 150.0
Json = Any

Arm = Callable[[FaultPlan, int, dict[str, Json]], FaultPlan]
FAULTS: dict[str, tuple[str, Arm]] = {
    "kill-0": ("SIGKILL of rank 0", lambda plan, last, when: plan.kill(0, **when)),
    "kill-k": ("SIGKILL of the last rank", lambda plan, last, when: plan.kill(last, **when)),
    "kill-all": ("SIGKILL of all ranks", lambda plan, last, when: plan.kill("all", **when)),
    "stop-k": ("SIGSTOP of the last rank", lambda plan, last, when: plan.stop(last, **when)),
    "error": ("an exception", lambda plan, last, when: plan.raise_error(_reaches(when, last), **when)),
    "exit": ("`os._exit(1)`", lambda plan, last, when: plan.exit(_reaches(when, last), **when)),
    "term": ("SIGTERM to the launcher", lambda plan, last, when: plan.terminate_launcher(0, **when)),
    "worker": ("SIGKILL of a DataLoader worker", lambda plan, last, when: plan.kill_data_worker(0, **when)),
}
PHASES: dict[str, tuple[str, dict[str, Json]]] = {
    "rendezvous": ("rendezvous", {"at_phase": "rendezvous"}),
    "rejoin": ("rendezvous after a kill", {"at_phase": "rendezvous"}),
    "load": ("load", {"at_phase": "load"}),
    "first-step": ("first step", {"at_phase": "step"}),
    "mid-epoch": ("mid-epoch", {"at_phase": "step", "at_step": MID_EPOCH}),
    "capture": ("capture", {"at_phase": "capture", "at_step": MID_EPOCH}),
    "writing": ("writing", {"at_phase": "writing", "at_step": MID_EPOCH}),
    "before-commit": ("before the commit", {"at_phase": "before_commit", "at_step": MID_EPOCH}),
    "after-commit": ("after the commit", {"at_phase": "after_commit", "at_step": MID_EPOCH}),
    "retention": ("retention", {"at_phase": "retention", "at_step": MID_EPOCH}),
    "evaluation": ("evaluation", {"at_phase": "evaluation"}),
}
AFTER_A_KILL = ("rejoin", "load")
ON_THE_MAIN_RANK = ("before_commit", "after_commit", "retention")
SECOND_COMMANDS: dict[tuple[str, str], str] = {
    ("error", "rendezvous"): "an error before the run was entered is not restarted",
    ("exit", "rendezvous"): "an error before the run was entered is not restarted",
}
"""Cells whose launch ends with an error, and why; a SIGTERM to the launcher ends every one, as it should."""
INTRODUCTION = """\
# Fault by phase

What comes of each fault at each phase of a run under `dist-train launch`, as it was tried. This page is written by
`python -m tests.support.fault_table docs/fault-table.md LOG`, which runs every cell; so does `scripts/check.sh --all`,
and `scripts/check.sh` runs a sample. Whatever a cell says, the finished run equalled the one that met no fault, bit for
bit: weights, buffers, optimizer, scheduler, random generators and the history of metrics.

*n attempts*: the launcher started the workers again by itself. *stops*: the launch ended, with that status and newest
checkpoint, and the same command went on. Committing and retention are the main rank's: there the fault comes while the
main rank does it, and an exception or an exit is the main rank's own. An exception in the thread that writes a
checkpoint costs that one save; the process trains on.""".splitlines()
NO_WORKERS = ("rendezvous", "rejoin", "load", "evaluation")
"""Where there is no DataLoader worker yet, or none any more."""


_ATTEMPTS = re.compile(r"after (\d+) attempts")
"""In the launcher's summary."""


def _reaches(when: dict[str, Json], last: int) -> int:
    return 0 if when["at_phase"] in ON_THE_MAIN_RANK else last


@dataclass(frozen=True, slots=True)
class Cell:
    fault: str
    phase: str
    world_size: int

    @property
    def id(self) -> str:
        return f"{self.fault}-at-{self.phase}-of-{self.world_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a cell, one line of the table."""

    cell: Cell
    launches: int
    attempts: int
    first_exit: int
    status: str
    """After the first launch."""
    newest_step: int
    """Committed when the first launch had ended; -1 for none."""

    @property
    def text(self) -> str:
        if self.launches == 1:
            return f"goes on, {self.attempts} attempts" if self.attempts > 1 else "goes on"
        where = f"newest checkpoint step {self.newest_step}" if self.newest_step >= 0 else "no checkpoint yet"
        return f"stops: {self.status}, exit {self.first_exit}, {where}; the same command goes on"


def all_cells() -> list[Cell]:
    return [
        Cell(fault, phase, world_size)
        for world_size in WORLD_SIZES
        for fault in FAULTS
        for phase in PHASES
        if not (fault == "worker" and phase in NO_WORKERS)
    ]


def sample_cells(count: int, seed: int) -> list[Cell]:
    """Of two ranks, each phase about as often as another, each fault, too."""
    rng = random.Random(seed)
    cells = [cell for cell in all_cells() if cell.world_size == 2]
    rng.shuffle(cells)
    chosen: list[Cell] = []
    uses: dict[str, int] = {}
    while cells and len(chosen) < count:
        cells.sort(key=lambda cell: uses.get(cell.fault, 0) + uses.get(cell.phase, 0))
        cell = cells.pop(0)
        chosen.append(cell)
        for name in (cell.fault, cell.phase):
            uses[name] = uses.get(name, 0) + 1
    return chosen


def command(world_size: int, run_dir: Path) -> list[str]:
    """The specimen; with four ranks without BatchNorm, which cannot train on a single sample."""
    launch = [sys.executable, "-m", "dist_train.cli", "launch", "--standalone", "--nproc-per-node", str(world_size)]
    script = ["-m", "dist_train.drill.victim", str(ROOT / "tests/support/specimen.py"), "--run-dir", str(run_dir)]
    options = ["--epochs", str(EPOCHS), "--hang-timeout", f"{HANG_SECONDS}s", *(["--plain"] if world_size > 2 else [])]
    return [*launch, *script, *options]


@cache
def twin(world_size: int) -> Path:
    """The run that met no fault, made once a process."""
    run_dir = Path(tempfile.mkdtemp(prefix="fault-table-")) / "run"
    run_command(command(world_size, run_dir), deadline_seconds=DEADLINE_SECONDS).require_success()
    return run_dir


def make_plan(cell: Cell, folder: Path) -> FaultPlan:
    plan = FaultPlan(folder, in_order=cell.phase in AFTER_A_KILL)
    if cell.phase in AFTER_A_KILL:
        plan.kill(0, at_step=MID_EPOCH)
    return FAULTS[cell.fault][1](plan, cell.world_size - 1, PHASES[cell.phase][1])


def try_cell(cell: Cell, folder: Path) -> Result:
    """Runs it to its end and requires all that the page says of it."""
    plan, run_dir = make_plan(cell, folder / "faults"), folder / "run"
    workers = ["--workers", "1"] if cell.fault == "worker" else []
    line = [*command(cell.world_size, run_dir), *workers]
    first = run_command(line, deadline_seconds=DEADLINE_SECONDS, extra=plan.environment())
    plan.require_all_fired()
    result = _note(cell, first, run_dir)
    if first.returncode != 0 or result.status != "done":
        require_good_stop(cell, first, result)
        run_command(line, deadline_seconds=DEADLINE_SECONDS, extra=plan.environment()).require_success()
        result = _note(cell, first, run_dir, before=result)
    assert _status(run_dir)["status"] == "done"
    assert_same_run(twin(cell.world_size), run_dir)
    return result


def require_good_stop(cell: Cell, first: Outcome, result: Result) -> None:
    """Only where the page says so, with the status and the newest checkpoint that belong to it."""
    if cell.fault == "term":
        early = cell.phase in ("rendezvous", "rejoin")  # nobody is there yet who could save
        assert first.returncode in ({ExitCode.OK, 143} if early else {ExitCode.OK}), first.output[-4000:]
        assert early or result.status == "preempted", first.output[-4000:]
        assert cell.phase == "rendezvous" or result.newest_step >= 0
        return
    assert (cell.fault, cell.phase) in SECOND_COMMANDS, f"{cell.id} stopped:\n{first.output[-6000:]}"
    assert first.returncode == ExitCode.ERROR, first.output[-4000:]
    assert result.newest_step == -1


def _note(cell: Cell, first: Outcome, run_dir: Path, before: Result | None = None) -> Result:
    return Result(
        cell=cell,
        launches=1 if before is None else 2,
        attempts=int(found[1]) if (found := _ATTEMPTS.search(first.output)) else 1,
        first_exit=first.returncode,
        status=_status(run_dir)["status"] if before is None else before.status,
        newest_step=_newest_step(run_dir) if before is None else before.newest_step,
    )


def _status(run_dir: Path) -> dict[str, Json]:
    try:
        status: dict[str, Json] = json.loads((run_dir / "status.json").read_text())
    except OSError:
        return {"status": "not begun"}
    return status


def _newest_step(run_dir: Path) -> int:
    manifests = (json.loads(one.read_text()) for one in run_dir.glob("checkpoints/step-*/manifest.json"))
    return max((one["progress"]["global_step"] for one in manifests), default=-1)


def page(told: Mapping[str, str]) -> str:
    """docs/fault-table.md, from what came of each cell, by its id."""
    lines = [*INTRODUCTION]
    for world_size in WORLD_SIZES:
        names = [name for name, _ in FAULTS.values()]
        lines += ["", f"## {world_size} ranks", "", f"| phase | {' | '.join(names)} |"]
        lines += ["|---" * (len(FAULTS) + 1) + "|"]
        for phase, (name, _) in PHASES.items():
            cells = [told.get(Cell(fault, phase, world_size).id, "-") for fault in FAULTS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """All cells that the log does not hold yet; those that fail are told and left out, and there is no page then."""
    target, log = Path(sys.argv[1]), Path(sys.argv[2])
    lines = log.read_text().splitlines() if log.exists() else []
    told = dict(line.split(": ", 1) for line in lines)
    cells = all_cells()
    for cell in [cell for cell in cells if cell.id not in told]:
        with tempfile.TemporaryDirectory(prefix="fault-table-") as folder:
            try:
                told[cell.id] = try_cell(cell, Path(folder)).text
            except AssertionError as error:
                print(f"{cell.id} FAILED: {error}", flush=True)
                continue
        with log.open("a") as file:
            file.write(f"{cell.id}: {told[cell.id]}\n")
        print(f"{len(told)}/{len(cells)} {cell.id}: {told[cell.id]}", flush=True)
    if len(told) < len(cells):
        return 1
    target.write_text(page(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
