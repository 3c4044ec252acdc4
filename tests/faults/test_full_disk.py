"""A disk that fills up: training goes on, older checkpoints stay whole, the message says space, saves resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.console import EventLog, MetricsLog
from dist_train.errors import SaveFailedError, StorageError
from dist_train.history import read_metrics
from dist_train.run import Run
from tests.support.damage import events
from tests.support.launch import ROOT, run_command
from tests.support.saving_run import whole
from tests.support.solo import train_quietly
from tests.support.twins import assert_same_run

SOLO = str(ROOT / "tests/support/solo.py")
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ever happened to."""
    run_dir = tmp_path_factory.mktemp("twin") / "run"
    train_quietly(run_dir)
    return run_dir


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB of its own."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs root on Linux: mounts a tmpfs of 32 MB")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "dist_train-test", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], timeout=20, check=True)


def fill(disk: Path, *, leave: int = 0) -> None:
    """Writes until nothing (or so many bytes) are left."""
    with (disk / "filler").open("ab", buffering=0) as file:
        stats = os.statvfs(disk)
        file.write(bytes(max(stats.f_bavail * stats.f_frsize - leave, 0)))


def free(disk: Path) -> None:
    (disk / "filler").unlink()


class Filler:
    """Fills the disk after one update and frees it after another; notes which checkpoints were whole meanwhile."""

    def __init__(self, disk: Path, *, full: range, leave: int = 0) -> None:
        self.disk, self.full, self.leave = disk, full, leave
        self.whole: list[set[str]] = []

    def __call__(self, run: Run) -> None:
        run._checkpointer.wait()
        if run.global_step == self.full.start:
            fill(self.disk, leave=self.leave)
        if run.global_step == self.full.stop:
            free(self.disk)
        self.whole.append(set(whole(self.disk / "run")))


class Optimist(Store):
    """Always says that there is room: the check before a save passes, and the write itself meets the full disk."""

    def free_bytes(self) -> int:
        return 1 << 40


@pytest.mark.parametrize("seen", ["before", "in-mid-write"])
def test_a_disk_that_fills_up_does_not_end_training(seen: str, small_disk: Path, twin: Path) -> None:
    store = Store if seen == "before" else Optimist
    filler = Filler(small_disk, full=range(5, 11), leave=20_000)  # room for a first file, not for a checkpoint
    ended = train_quietly(small_disk / "run", on_step=filler, open_store=store)
    assert [run_event["global_step"] for run_event in events(small_disk / "run", "failed")] == [5, 6, 8, 10]
    for event in events(small_disk / "run", "failed"):
        assert event["out_of_space"]
        assert "space" in event["message"]
    assert "no space: " in ended.output
    assert "older checkpoints are whole, the newest is step 4" in ended.output
    assert all("checkpoints/step-00000004" in names for names in filler.whole[4:11])
    assert [one["global_step"] for one in events(small_disk / "run", "committed")] == [2, 4, 12, 14, 15]
    assert [name for name in os.listdir(small_disk / "run" / "checkpoints") if name.startswith(".")] == []
    assert_same_run(twin, small_disk / "run")


def test_a_disk_without_a_single_byte_left_loses_no_metrics(small_disk: Path, twin: Path) -> None:
    """What could not be appended to the history meanwhile is there when a later checkpoint counts on it."""
    filler = Filler(small_disk, full=range(5, 11))
    train_quietly(small_disk / "run", on_step=filler, open_store=Optimist)
    assert [event["global_step"] for event in events(small_disk / "run", "committed")] == [2, 4, 12, 14, 15]
    failed = events(small_disk / "run", "failed")
    assert [event["global_step"] for event in failed] == [5, 6, 8, 10]
    assert all(event["out_of_space"] for event in failed)
    assert_same_run(twin, small_disk / "run")
    train_quietly(small_disk / "run")  # the history is whole for a resume, too
    assert_same_run(twin, small_disk / "run")


def test_lines_that_a_full_disk_took_in_part_are_there_once_when_it_has_room_again(small_disk: Path) -> None:
    store = Store(small_disk)
    metrics, log = MetricsLog(store), EventLog(store)
    metrics.start(1, None, 0)
    for number in range(200):  # across several pages of both files
        if number == 20:
            fill(small_disk)
        if number == 170:  # room for a part of what is waiting
            free(small_disk)
            fill(small_disk, leave=4096)
        metrics.write(kind="step", global_step=number)
        log.write("failed", global_step=number)
    assert len(read_metrics(store)) < 200
    free(small_disk)
    log.write("committed", global_step=200)
    metrics.flush()
    raw = [line for line in (small_disk / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(raw) > 201, "no line was written twice: the fault did not fire"
    assert [record["global_step"] for record in read_metrics(store)] == list(range(200))
    lines = [line for line in (small_disk / "run.jsonl").read_text().splitlines() if line.endswith("}")]
    assert {json.loads(line)["global_step"] for line in lines} == set(range(201))


def test_more_failures_than_allowed_end_the_run_with_a_message(small_disk: Path, twin: Path) -> None:
    policy = CheckpointPolicy(every_steps=2, max_failed_saves=2)
    filler = Filler(small_disk, full=range(7, 100))
    with pytest.raises(SaveFailedError, match=r"3 saves failed in a row.*newest checkpoint is step 6.*Free space"):
        train_quietly(small_disk / "run", policy=policy, on_step=filler)
    assert set(whole(small_disk / "run")) == {f"checkpoints/step-0000000{step}" for step in (2, 4, 6)}
    free(small_disk)
    assert train_quietly(small_disk / "run").run.resumed_from == str(small_disk / "run/checkpoints/step-00000006")
    assert_same_run(twin, small_disk / "run")


def test_a_success_in_between_counts_the_failures_anew(small_disk: Path) -> None:
    policy = CheckpointPolicy(every_steps=1, max_failed_saves=2)

    def on_and_off(run: Run) -> None:
        """Full for the saves of 2 and 3, 5 and 6, 8 and 9 ..."""
        run._checkpointer.wait()
        if run.global_step % 3 == 1:
            fill(small_disk)
        if run.global_step % 3 == 0:
            free(small_disk)

    train_quietly(small_disk / "run", policy=policy, on_step=on_and_off, max_steps=9)
    assert [event["global_step"] for event in events(small_disk / "run", "failed")] == [2, 3, 5, 6, 8, 9]


@pytest.mark.distributed
def test_the_exit_code_of_a_run_that_cannot_save_is_not_zero(small_disk: Path) -> None:
    fill(small_disk, leave=200_000)  # enough to start, not to save
    command = [sys.executable, SOLO, "--run-dir", str(small_disk / "run"), "--max-failed-saves", "1"]
    ended = run_command(command, deadline_seconds=60)
    assert ended.returncode == 1
    assert "SaveFailedError: 2 saves failed in a row" in ended.output
    assert "no space: " in ended.output


def test_a_disk_that_is_full_at_start_is_refused_or_survived(small_disk: Path) -> None:
    """Without a byte left the run cannot even take its directory over; it says so."""
    fill(small_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        train_quietly(small_disk / "run")
