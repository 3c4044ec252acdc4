"""What a drilled script is made to do otherwise: its run directories go to scratch, few steps, many saves.

    drill: Rehearsal(...).environment() -> victim: Rehearsal.from_environment().arm()

Invariant: the script is not changed and its run directories are not touched; everything that decides what is trained
(data, seeds, schedules, epochs) stays as the script has it. It is undone by starting the script itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dist_train.drill.arrival import when_imported
from dist_train.drill.untouched import listing

Json = Any
VARIABLE: Final = "DIST_TRAIN_DRILL"
RUNS: Final = "runs"
PLACES: Final = "places.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One run of the script, to its end, over as many lives as that takes."""

    folder: str
    """Scratch: run directories, records and what the script said."""
    max_steps: int
    save_every: int
    """Optimizer updates between saves, at most."""
    log_every: int
    """Optimizer updates between records of the loss, at most."""

    def environment(self) -> dict[str, str]:
        """For the environment of the command."""
        # A tracker that reports to a server would tell it of runs that are none.
        return {VARIABLE: json.dumps(asdict(self)), "WANDB_MODE": "offline"}

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Rehearsal | None:
        """What this process is to do, None for a usual start."""
        text = environment.get(VARIABLE)
        return None if text is None else Rehearsal(**json.loads(text))

    def arm(self) -> None:
        """In the victim, before its script begins."""
        when_imported("dist_train.run", self._wrap_run)
        when_imported("dist_train.trainer", self._wrap_trainer)

    def redirect(self, run_dir: str | os.PathLike[str]) -> str:
        """Where the run lives in the drill; the same for the same directory, and for what was redirected already."""
        original = os.path.abspath(run_dir)
        runs = Path(self.folder, RUNS)
        if Path(original).is_relative_to(runs):
            return original
        place = runs / f"{os.path.basename(original)}-{hashlib.sha1(original.encode()).hexdigest()[:6]}"
        if os.environ.get("RANK", "0") == "0":
            self._note_place(original, place.name)
        return str(place)

    def _note_place(self, original: str, name: str) -> None:
        """Once a run directory: how it was before anything of the script could touch it."""
        if any(place["name"] == name for place in read_places(self.folder)):
            return
        note = {"name": name, "original": original, "files": listing(Path(original))}
        with open(Path(self.folder, PLACES), "a") as file:
            file.write(json.dumps(note) + "\n")

    def _wrap_run(self, module: ModuleType) -> None:
        init = module.Run.__init__

        def rehearsing_init(run: Any, run_dir: Any, **given: Any) -> None:
            policy = given.get("policy") or module.DEFAULT_POLICY
            options = given.get("options") or module.RunOptions()
            if not _saves_between_epochs_only(policy, given.get("loader")):
                policy = replace(policy, every_steps=min(policy.every_steps or self.save_every, self.save_every))
            given["policy"] = policy
            given["options"] = replace(
                options,
                max_steps=min(options.max_steps or self.max_steps, self.max_steps),
                log_every_steps=min(options.log_every_steps, self.log_every),
                max_time=None,
                time_reserve=None,
            )
            given["resume"] = "auto"
            init(run, self.redirect(run_dir), **given)

        module.Run.__init__ = rehearsing_init

    def _wrap_trainer(self, module: ModuleType) -> None:
        """It uses its run directory before there is a `Run`."""
        init = module.Trainer.__init__

        def rehearsing_init(trainer: Any, *given: Any, config: Any, **more: Any) -> None:
            init(trainer, *given, config=replace(config, run_dir=self.redirect(config.run_dir), resume="auto"), **more)

        module.Trainer.__init__ = rehearsing_init


def _saves_between_epochs_only(policy: Any, loader: Any) -> bool:
    """A loop that iterates batches of its own has no place within an epoch that could be found again; where its policy
    never saves there, the drill does not either.
    """
    return loader is None and policy.every_epochs is not None and policy.every_steps is None and policy.every is None


def read_places(folder: str | os.PathLike[str]) -> list[dict[str, Json]]:
    """The run directories that a script has asked for: name in scratch, original path, what was there before."""
    try:
        lines = Path(folder, PLACES).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]
