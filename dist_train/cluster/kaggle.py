"""A session of a Kaggle notebook: what there is, training in processes of its own, and what to do with the result.

    session = kaggle.Session()
    session.train("train.py", "--run-dir", "runs/price", "--max-time", "11h30m", "--search", *session.search)
    session.explain("runs/price")
    session.link(session.pack("runs/price", "--best"))
    session.finish()

Invariant: it raises for mistakes in the settings, before anything is started. A training or a pack that fails is told
and the notebook goes on; `finish`, in the last cell, raises when all is packed. Inputs are only read, and
nothing is deleted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from dist_train.cluster.best_model import SEARCH_LEVELS, BestModel, find_best_model
from dist_train.cluster.child import run_child
from dist_train.cluster.gpus import find_gpus
from dist_train.console import bytes_text, print_text, seconds_text
from dist_train.errors import ConfigError, DistTrainError, ExitCode, StopReason
from dist_train.units import parse_bytes, parse_seconds

ROOT = "/kaggle"
ROOT_VARIABLE = "DIST_TRAIN_KAGGLE_ROOT"
"""Environment variable: another place for `working` and `input`, to try a notebook elsewhere."""
QUOTA_BYTES = 20 * 10**9
SESSION_SECONDS = 12 * 3600.0
LAST_SECONDS = 120.0
"""Training that still runs so shortly before the session's end hangs, or was given too much time: it is interrupted."""
ANSWER_SECONDS = 120.0
"""How long the command line may take to look into a run directory."""
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?(?:[a-z_][\w]*\.)*([A-Z]\w*(?:Error|Exception|Interrupt)(?:: .*)?)$")
"""The last line of a traceback."""


class Session:
    """What this session offers, and what one does in it.

    Args:
        quota_bytes: what the working directory may hold at the session's end, "20GB" for instance.
        session_seconds: how long Kaggle lets a session run.
        max_time: what the training will be given as `max_time`; only checked, before anything is started.
        root: the folder of `working` and `input`; None takes DIST_TRAIN_KAGGLE_ROOT, else /kaggle.
        started: Unix time at which the session began; None takes the start of the container on Kaggle, of the
            notebook's kernel elsewhere.

    Raises:
        ConfigError: there is no working directory below root, or a setting that cannot be.
    """

    def __init__(
        self,
        *,
        quota_bytes: str | float = QUOTA_BYTES,
        session_seconds: float = SESSION_SECONDS,
        max_time: str | float | None = None,
        root: str | os.PathLike[str] | None = None,
        started: float | None = None,
    ) -> None:
        self.root = Path(root or os.environ.get(ROOT_VARIABLE) or ROOT)
        self.working, self.inputs = self.root / "working", self.root / "input"
        self.kind = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "")
        """`Interactive`, `Batch` (Save & Run All), or "" elsewhere than on Kaggle."""
        self.quota_bytes, self.session_seconds = parse_bytes(quota_bytes), session_seconds
        self.exit_code: int | None = None
        """Of the last training; None before it."""
        self.cause = ""
        """The last error that the training told."""
        self._require_settings(max_time)
        if not self.working.is_dir():
            raise ConfigError(
                f"{self.working} is not there: this is no Kaggle session. To try the notebook elsewhere, make a folder "
                f"with `working` and `input` in it and set {ROOT_VARIABLE} to its path, or give root=."
            )
        on_kaggle = bool(self.kind) and str(self.root) == ROOT
        self.started = _session_start(on_kaggle, session_seconds) if started is None else started
        self.gpus = find_gpus()

    def _require_settings(self, max_time: str | float | None) -> None:
        if self.quota_bytes <= 0:
            raise ConfigError(f"The quota is {self.quota_bytes} bytes; give what the working directory may hold: 20GB.")
        seconds = self.session_seconds if max_time is None else parse_seconds(max_time)
        if not 0 < seconds <= self.session_seconds:
            limit = seconds_text(self.session_seconds)
            raise ConfigError(f"max_time is {max_time!r}; give more than nothing and at most the session's {limit}.")

    @property
    def age_seconds(self) -> float:
        return time.time() - self.started

    @property
    def used_bytes(self) -> int:
        """What lies in the working directory and counts towards the quota."""
        return sum(_sizes_below(self.working))

    @property
    def search(self) -> tuple[str, ...]:
        """Where the attached output of an earlier version may lie, as patterns for `TrainConfig.search`."""
        return (f"{self.inputs}/*",)

    @property
    def _usage(self) -> str:
        return f"{bytes_text(self.used_bytes)} of {bytes_text(self.quota_bytes)} used"

    def describe(self) -> None:
        """Prints what there is: GPUs, time and space."""
        gpus = ", ".join(f"{gpu.name} ({'bf16' if gpu.has_bf16 else 'fp16: it has no bf16'})" for gpu in self.gpus)
        attached = sorted(one.name for one in self.inputs.iterdir()) if self.inputs.is_dir() else []
        limit = seconds_text(self.session_seconds)
        print_text(f"Session:  {self.kind or 'not on Kaggle'}, {seconds_text(self.age_seconds)} old of {limit}")
        print_text(f"Devices:  {gpus or 'no GPU: training runs on the CPU'}")
        print_text(f"Working:  {self.working}, {self._usage}")
        print_text(f"Inputs:   {', '.join(attached) or 'none attached'}")

    def find(self, name: str) -> Path:
        """A file of the working directory, else of the attached inputs.

        Raises:
            ConfigError: it is nowhere, or at several places of the inputs.
        """
        if (here := self.working / name).is_file():
            return here
        for depth in range(1, SEARCH_LEVELS + 1):
            found = sorted(self.inputs.glob("*/" * depth + name))
            if len(found) == 1:
                return found[0]
            if found:
                places = ", ".join(str(one) for one in found)
                raise ConfigError(
                    f"{name} lies at several places ({places}). Give the path of one, or copy it to {self.working}."
                )
        raise ConfigError(
            f"{name} is neither in {self.working} nor in what is attached below {self.inputs} (down to "
            f"{SEARCH_LEVELS} levels). Attach the dataset that holds it (Add Input), or write it with %%writefile."
        )

    def train(self, script: str, *arguments: object, processes: int | None = None, restarts: int = 3) -> int:
        """Runs a training script in processes of its own, its lines in the cell; returns its exit code.

        Args:
            script: a path, or a name for `find`.
            arguments: of the script.
            processes: None starts one a GPU, one without a GPU.
            restarts: how often a training that crashed is started again, from its newest checkpoint; only where it has
                saved one since it was started, in the directory that follows `--run-dir` in the arguments.

        Raises:
            ConfigError: the script is not found, or processes is no number that can be.
            KeyboardInterrupt: the cell was interrupted; training has ended, nothing of it is left running.
        """
        if processes is not None and (not isinstance(processes, int) or processes < 1):
            raise ConfigError(f"processes is {processes!r}; give a whole number of at least 1, or None for one a GPU.")
        if self.gpus and processes is not None and processes > len(self.gpus):
            raise ConfigError(f"processes is {processes}, but there are {len(self.gpus)} GPUs; None starts one a GPU.")
        path = script if os.path.isfile(script) else str(self.find(script))
        count = processes or max(len(self.gpus), 1)
        launcher = ["-m", "dist_train.cluster.launcher", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *launcher, path, *map(str, arguments)]
        environment = self._environment()
        if count > 1:  # torchrun gives each rank one thread otherwise, and says so at length
            environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
        print_text(f"Training in {count} process{'es' if count > 1 else ''}: {path}")
        run = _run_directory([str(one) for one in arguments])
        for number in range(1, restarts + 2):
            before, self.cause, self.exit_code = _checkpoints(run), "", int(ExitCode.INTERRUPTED)
            code = run_child(command, self._hear, environment=environment, seconds=max(self._left, 0.0))
            self.exit_code = code
            if code == ExitCode.OK or number > restarts or not self._may_restart(_checkpoints(run) - before):
                break
            print_text(f"{self._failure} It goes on from its newest checkpoint (restart {number} of {restarts}).")
        if code not in (ExitCode.OK, ExitCode.REQUEUE):
            print_text(f"{self._failure} What it saved is whole.")
        return code

    @property
    def _left(self) -> float:
        """Seconds that a training may still take."""
        return self.session_seconds - LAST_SECONDS - self.age_seconds

    @property
    def _has_failed(self) -> bool:
        return self.exit_code not in (None, ExitCode.OK, ExitCode.INTERRUPTED, ExitCode.REQUEUE)

    @property
    def _failure(self) -> str:
        cause = f": {self.cause.removesuffix('.')}" if self.cause else "; the cause stands above"
        return f"Training ended with exit code {self.exit_code}{cause}."

    def _may_restart(self, saved: Collection[str]) -> bool:
        """A mistake in the settings or the script ends every start before the first save: it is not tried again."""
        wanted = self.exit_code in (ExitCode.INTERRUPTED, ExitCode.REQUEUE, ExitCode.DO_NOT_REQUEUE)
        return bool(saved) and not wanted and self._left > 0

    def _hear(self, line: str) -> None:
        """A line of the training; the last error that it tells is remembered."""
        if match := _ERROR.match(line):
            self.cause = match[1]
        print_text(line)

    def status(self, run: str | os.PathLike[str]) -> dict[str, Any]:
        """What the run's status.json says; empty where it has not begun."""
        try:
            status: dict[str, Any] = json.loads((Path(run) / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return status

    def explain(self, run: str | os.PathLike[str]) -> None:
        """Prints how the run stands and what to do next."""
        status = self.status(run)
        if not status:
            why = f": {self.cause}" if self.cause else "; the cause stands in the output of the training."
            print_text(f"{run} has not begun{why}")
            return
        where = f"{run}: {status['status']} at step {status['global_step']}, {status['epochs_completed']} epochs done."
        later = "save this version, attach its output to the notebook as an input (Add Input, Notebook Output)"
        again = f"To go on: {later}, and run it again."
        if self._has_failed and status["status"] != StopReason.ERROR:  # before it had begun: the status is older
            print_text(f"{where} {self._failure} Correct that and run the training cell again.")
        elif status["status"] in ("done", "early_stopped"):
            print_text(f"{where} Training is finished.")
        elif status["exit_code"] in (ExitCode.OK, ExitCode.REQUEUE):
            print_text(f"{where} Training is not finished. {again}")
        elif status["status"] == StopReason.INTERRUPTED:
            print_text(f"{where} To go on: run the training cell again; in a new session, {later} first.")
        else:
            print_text(f"{where} {status['error'] or 'It was stopped from outside.'} {again}")
        best = self.find_best(run)
        if best is not None and best.better:
            here = f"the best that is here has {best.value_text}, after epoch {best.epochs_completed}"
            print_text(f"{best.better_text}; {here}. Attach the version that holds it.")
        if best is not None and best.run != Path(run):
            what = "best model so far" if best.better is None else "best that is here"
            print_text(f"The {what} lies in {best.run}: keep that version attached, too.")

    def finish(self) -> None:
        """In the last cell, when everything is packed: a training that failed makes the version a failed one.

        Raises:
            DistTrainError: it failed; what lies in the working directory is kept all the same.
        """
        if self._has_failed:
            raise DistTrainError(f"{self._failure} What it saved is whole and in this version's output.")

    def dist_train(self, *arguments: object) -> int:
        """Runs the command line, for instance `session.dist_train("ls", RUN)`; returns its exit code."""
        command = [sys.executable, "-m", "dist_train.cli", *map(str, arguments)]
        return run_child(command, print_text, environment=self._environment())

    def find_best(self, run: str | os.PathLike[str]) -> BestModel | None:
        """The best model that there is, in this session's directory or in the attached output of an earlier one."""
        return find_best_model(Path(run), self.inputs, self._ask)

    def pack(self, run: str | os.PathLike[str], *options: str) -> Path | None:
        """Packs a run into one zip of the working directory, in place of the last one; None where that failed, and the
        cause is printed.

        Args:
            options: of `dist-train pack`: `--best`, `--latest` or `--all`; `--weights-only`.
        """
        what = "-".join(option.strip("-") for option in options)
        target = self.working / f"{Path(run).name}{'-' if what else ''}{what}.zip"
        best = self.find_best(run) if "--best" in options else None
        if best is not None and best.better:
            instead = f"packing {best.value_text} of epoch {best.epochs_completed} instead"
            print_text(f"{best.better_text}; {instead}. Attach the version that holds it.")
        room = max(self.quota_bytes - self.used_bytes, 0)
        source = best.run if best is not None else run
        code = self.dist_train("pack", source, *options, "--force", "--max-bytes", room, "--to", target)
        print_text(f"Working:  {self._usage}")
        return target if code == ExitCode.OK and target.is_file() else None

    def link(self, path: Path | None) -> None:
        """A link to download a file with, in the cell; the path elsewhere than in a notebook."""
        if path is None:
            print_text("There is nothing to link to.")
            return
        print_text(f"{path} ({bytes_text(path.stat().st_size)})")
        if "IPython" in sys.modules:
            from IPython.display import FileLink, display

            display(FileLink(os.path.relpath(path)))

    def _ask(self, command: str, run: str | os.PathLike[str]) -> Any:
        """What the command line answers in JSON; None where it cannot."""
        asked = [sys.executable, "-m", "dist_train.cli", command, str(run), "--json"]
        done = subprocess.run(asked, capture_output=True, timeout=ANSWER_SECONDS, check=False)
        return json.loads(done.stdout) if done.returncode == ExitCode.OK else None

    def _environment(self) -> dict[str, str]:
        # The kernel's plotting backend draws into cells, which a child has none of.
        inherited = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
        return {**inherited, "DIST_TRAIN_SESSION_START": str(self.started), "PYTHONUNBUFFERED": "1"}


def _session_start(on_kaggle: bool, session_seconds: float) -> float:
    """On Kaggle the container begins with the session; a kernel may have been restarted in it."""
    own = float(psutil.Process().create_time())
    if not on_kaggle:
        return own
    try:
        container = float(psutil.Process(1).create_time())
    except psutil.Error:
        return own
    return container if time.time() - container < session_seconds else own


def _sizes_below(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue


def _run_directory(arguments: Sequence[str]) -> str | None:
    """What follows `--run-dir`, where the training saves."""
    for index, word in enumerate(arguments):
        if word == "--run-dir":
            return next(iter(arguments[index + 1 : index + 2]), None)
        if word.startswith("--run-dir="):
            return word.partition("=")[2]
    return None


def _checkpoints(run: str | None) -> set[str]:
    return {one.name for one in Path(run, "checkpoints").glob("step-*")} if run else set()
