"""Tells the demo: each model trained twice, once left alone and once with a worker killed in mid-epoch, then compared.

Invariant: exit code 0 only if both pairs of runs were equal and every command succeeded. Started by scripts/demo.sh.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import LAUNCHER, DemoError, Training

HOME = Path("runs/demo")
TRAINING_SECONDS = 600.0
COMMAND_SECONDS = 120.0
SHOWN = ("Epoch", "Resuming", "Settings changed", "Nothing is left")
"""Lines of a run that are shown; the others are counted or lie in the log."""
WARNING = re.compile(r"(\[rank [^]]+\] )?(WARNING|ERROR) ")
"""dist_train's own warnings, among what torchrun and the dying workers leave in the log."""
PRICE = "examples/price_prediction"


@dataclass(frozen=True)
class Chapter:
    """A model, and how its run is killed."""

    name: str
    title: str
    script: str
    victim: int
    """Rank of the worker that is killed."""
    commits: int
    """The kill waits for so many checkpoints and for a loss recorded after the newest of them: that is mid-epoch."""


CHAPTERS = [
    Chapter(
        name="price",
        title="A price model, 1 million parameters, on 6,000 SYNTHETIC product texts",
        script=f"{PRICE}/train.py --preset blazing --epochs 6 --cpu",
        victim=1,
        commits=2,
    ),
    Chapter(
        name="language",
        title="A byte-level GPT, 1 million parameters, on the source of Python's standard library",
        script="examples/language_model/train.py --steps 80 --checkpoint-every 8 --log-every 4 --cpu",
        victim=0,
        commits=4,
    ),
]

IS_TERMINAL = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if IS_TERMINAL else text


def say(text: str = "", code: str = "") -> None:
    print(paint(text, code) if code else text, flush=True)


def heading(text: str) -> None:
    say(f"\n{text}\n{'-' * len(text)}", "1")


def show(text: str) -> None:
    """A line of somebody else's, indented."""
    say(f"    {text}".rstrip())


def show_command(words: Sequence[str]) -> None:
    """As one would type it; a long one in two lines."""
    halves = (words[: len(LAUNCHER)], words[len(LAUNCHER) :]) if words[0] == LAUNCHER[0] else (words,)
    for number, half in enumerate(halves, 1):
        more = " \\" if number < len(halves) else ""
        show(paint(f"{'$' if number == 1 else ' '} {shlex.join(half)}{more}", "2"))


# What a run writes about itself


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON file that another process is appending to."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def events_of(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run_dir / "run.jsonl") if event["event"] in kinds]


def find_mid_epoch_step(run_dir: Path, commits: int) -> int | None:
    """The newest recorded update, if it lies after the newest of at least so many checkpoints."""
    committed = [event["global_step"] for event in events_of(run_dir, "committed")]
    recorded = [line["global_step"] for line in read_lines(run_dir / "metrics.jsonl") if line.get("kind") == "step"]
    return recorded[-1] if len(committed) >= commits and recorded and recorded[-1] > committed[-1] else None


# The acts


def train(chapter: Chapter, run_dir: Path, *, kill: bool) -> None:
    """Raises DemoError when the run does not end well, or could not be killed."""
    script = [*shlex.split(chapter.script), "--run-dir", str(run_dir)]
    show_command([*LAUNCHER, *script])
    started, killed = time.monotonic(), None
    with Training(script, HOME / f"{run_dir.name}.log", TRAINING_SECONDS) as training:
        for line in training.lines():
            if line is not None and line.startswith(SHOWN):
                show(line)
            elif kill and killed is None:
                killed = maybe_kill(training, chapter, run_dir)
        code = training.wait()
    seconds = time.monotonic() - started
    if code != 0:
        raise DemoError(f"the run ended with exit code {code}; see {training.log}")
    if kill:
        require_one_restart(run_dir, killed, training.log)
    for line in filter(WARNING.match, training.log.read_text(errors="replace").splitlines()):
        show(line)
    show(f"done in {seconds:.0f} s; {describe_saves(run_dir)}")


def maybe_kill(training: Training, chapter: Chapter, run_dir: Path) -> int | None:
    """Kills the victim once the run is in mid-epoch; the update after which it did."""
    step = find_mid_epoch_step(run_dir, chapter.commits)
    worker = training.find_worker(chapter.victim) if step is not None else None
    if step is None or worker is None:
        return None
    worker.kill()
    show(paint(f"kill -9 {worker.pid}: rank {chapter.victim} is dead, after update {step}", "1;31"))
    return step


def require_one_restart(run_dir: Path, killed: int | None, log: Path) -> None:
    """Raises DemoError unless the kill came in time and torchrun's restart went on from a checkpoint."""
    resumed = events_of(run_dir, "resumed")
    if killed is None:
        raise DemoError(f"the run was over before its worker could be killed; see {log}")
    if len(resumed) != 1:
        raise DemoError(f"one restart was expected and {len(resumed)} are on record; see {log}")
    went_on = resumed[0]["global_step"]
    show(f"torchrun started two new workers, which went on from update {went_on} (its own account: {log})")


def describe_saves(run_dir: Path) -> str:
    saves = events_of(run_dir, "committed")
    size = max(event["bytes"] for event in saves) / 1e6
    stall = max(event["stall_seconds"] for event in saves) * 1e3
    return f"{len(saves)} checkpoints of {size:.1f} MB, for each of which training waited {stall:.0f} ms or less"


def run_and_show(command: Sequence[str | Path], *, quiet: bool = False) -> int:
    """Runs a command of a few seconds; its exit code. Raises DemoError at the deadline."""
    words = [str(word) for word in command]
    shown = words if words[0] != sys.executable else ["python", *words[1:]]
    if not quiet:
        show_command(shown)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        raise DemoError(f"still running after {COMMAND_SECONDS:.0f} s: {shlex.join(shown)}") from None
    finally:
        process.kill()  # nothing, once it has ended
    for line in output.splitlines() if not quiet or process.returncode else ():
        show(line)
    return process.returncode


def tell(chapter: Chapter, number: int) -> bool:
    """One chapter; whether the killed run equals the other one. Raises DemoError."""
    alone, killed = HOME / chapter.name, HOME / f"{chapter.name}-killed"
    heading(f"{number}. {chapter.title}")
    say("\n  Left alone", "1")
    train(chapter, alone, kill=False)
    say("\n  The same again in another directory, and a worker is killed in mid-epoch", "1")
    train(chapter, killed, kill=True)
    say("\n  The two ends, bit for bit", "1")
    equal = run_and_show([sys.executable, "scripts/demo/compare.py", alone, killed]) == 0
    say("\n  The checkpoints of the killed run", "1")
    if run_and_show(["dist-train", "ls", killed]) != 0:
        raise DemoError("dist-train ls failed")
    return equal


def predict_prices(run_dir: Path) -> None:
    """A few products that the model has never seen. Raises DemoError."""
    test, out = HOME / "test.csv", HOME / "submission.csv"
    say("\n  Prices of products it has never seen", "1")
    making = [sys.executable, f"{PRICE}/data.py", "--out", test, "--samples", "5", "--seed", "1"]
    predicting = [sys.executable, f"{PRICE}/predict.py", "--run", run_dir, "--data", test, "--out", out]
    if run_and_show(making, quiet=True) != 0 or run_and_show(predicting) != 0:
        raise DemoError("the prediction failed")
    with test.open(newline="", encoding="utf-8") as products, out.open(newline="", encoding="utf-8") as prices:
        for product, predicted in zip(csv.DictReader(products), csv.DictReader(prices), strict=True):
            name = product["catalog_content"].splitlines()[0].removeprefix("Item Name: ")
            show(f"{float(predicted['price']):10.2f}  (true: {float(product['price']):8.2f})  {name}")


def run_demo() -> bool:
    """Whether everything was equal. Raises DemoError."""
    started = time.monotonic()
    say("dist_train: kill it, run it again, get the run that never died", "1")
    say(f"Two models, two CPU processes, plain torchrun; two to three minutes. Everything lies in {HOME.absolute()}.")
    equal = True
    for number, chapter in enumerate(CHAPTERS, 1):
        equal &= tell(chapter, number)
        if chapter.name == "price":
            predict_prices(HOME / f"{chapter.name}-killed")
    seconds = time.monotonic() - started
    if equal:
        verdict = f"Two workers killed, two runs finished, every bit equal. {seconds:.0f} s in all."
        say(f"\n{verdict}", "1;32")
    else:
        say(f"\nA killed run differs from the one left alone: see above. {seconds:.0f} s in all.", "1;31")
    return equal


def make_room() -> Any:
    """An empty runs/demo, held by a lock for as long as the result lives. Raises DemoError."""
    HOME.parent.mkdir(exist_ok=True)
    lock = open(HOME.parent / ".demo.lock", "w")  # noqa: SIM115  held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DemoError(f"another demo is using {HOME.absolute()}; wait for its end") from None
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    return lock


def leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        lock = make_room()
        equal = run_demo()
        lock.close()
    except DemoError as error:
        say(f"\nThe demo failed: {error}.", "1;31")
        return 1
    except KeyboardInterrupt:
        say(f"\nStopped; nothing is left running. What there is lies in {HOME.absolute()}.")
        return 130
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
