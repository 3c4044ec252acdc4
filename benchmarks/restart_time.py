"""From the kill of a worker to the first new optimizer step: `dist-train launch` beside torchrun, in turn.

Two gloo ranks train the same model with Accelerate and DDP, a checkpoint every 5 steps: under `dist-train launch` by
dist_train (durable, verified, exact), under torchrun by torch.save in one file, as most scripts do. Rank 1 is killed
with SIGKILL in the middle of training; the clock stops when an optimizer update of the next attempt is done. torchrun
gets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, without which its restarted workers fail.

    python benchmarks/restart_time.py [--rounds 7] [--profile]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("restart_time_script.py")
LAUNCHERS = {
    "dist-train launch": [sys.executable, "-m", "dist_train.cli", "launch", "--nproc-per-node", "2"],
    "torchrun": [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        *["--max-restarts", "3"],
    ],
}
ROUND_SECONDS = 180.0
STEPS_BEFORE_KILL = 12


def measure(name: str, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of one restart, and the marks of both lives."""
    save_with = "dist_train" if name == "dist-train launch" else "torch"
    command = [*LAUNCHERS[name], str(SCRIPT), "--folder", str(folder), "--save-with", save_with]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + ROUND_SECONDS
            first = wait_for(folder, deadline, lambda marks: steps_of(marks) >= STEPS_BEFORE_KILL)
            victim = next(mark["pid"] for mark in first if mark["rank"] == 1)
            killed_at = time.time()
            os.kill(victim, signal.SIGKILL)
            lives = {mark["pid"] for mark in first}
            marks = wait_for(folder, deadline, lambda marks: steps_of(marks, besides=lives) >= 1)
            back_at = min(mark["at"] for mark in marks if mark["what"] == "step" and mark["pid"] not in lives)
            process.wait(timeout=ROUND_SECONDS)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60)
    return back_at - killed_at, [{**mark, "at": mark["at"] - killed_at} for mark in marks if mark["pid"] not in lives]


def wait_for(folder: Path, deadline: float, enough: Any) -> list[dict[str, Any]]:
    while not enough(marks := read_marks(folder)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing new in {ROUND_SECONDS:.0f} s:\n{(folder / 'output').read_text()[-4000:]}")
        time.sleep(0.005)
    return marks


def read_marks(folder: Path) -> list[dict[str, Any]]:
    path = folder / "marks.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps_of(marks: list[dict[str, Any]], besides: set[int] = frozenset()) -> int:  # type: ignore[assignment]
    """Updates that rank 0 has done, in lives other than those."""
    return sum(mark["what"] == "step" and mark["rank"] == 0 and mark["pid"] not in besides for mark in marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where the time of a restart goes, of the last round")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    for _ in range(args.rounds):
        for name in LAUNCHERS:
            with tempfile.TemporaryDirectory() as folder:
                taken, marks = measure(name, Path(folder))
            seconds[name].append(taken)
            print(f"{name}: {taken:.2f} s", flush=True)
            if args.profile:
                for mark in marks:
                    if mark["rank"] == 0 and mark["at"] <= taken + 0.01:
                        print(f"    {mark['at']:7.3f}  {mark['what']}")
    for name, values in seconds.items():
        print(f"{name:18} median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f}")
    ours, theirs = (statistics.median(values) for values in seconds.values())
    print(f"ratio {ours / theirs:.2f} (medians of {args.rounds}, in turn)")


if __name__ == "__main__":
    main()
