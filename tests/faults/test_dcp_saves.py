"""What comes of a `dcp.save` that fails, is killed or loses its power, and of a checkpoint that was damaged since."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import dist_train as dt
from dist_train.checkpoint import dcp_writer
from dist_train.checkpoint.catalog import read_checkpoint
from dist_train.checkpoint.manifest import MANIFEST_NAME
from dist_train.checkpoint.publication import Publication
from dist_train.checkpoint.store import Operation, Store
from dist_train.checkpoint.verify import verify_checkpoint
from tests.support.crash_states import CrashState, Mark, Recorder, RecordingStore, Synced, crash_states
from tests.support.crash_states import Event as DiskEvent
from tests.support.dcp_saved import NAME, load, refusal, save
from tests.support.launch import run_command


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch warns of every save without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def use_store(patch: pytest.MonkeyPatch, make: Callable[[str], Store]) -> None:
    """Of the saves from now on."""
    patch.setattr(dcp_writer, "Store", make)


def without_exchange(patch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot swap two names."""
    patch.setattr(Store, "exchange", lambda self, source, target: False)


# A failing save


class FailingAt:
    """A fault before the so-manyth change to the disk; counts the changes where none is due."""

    def __init__(self, number: int | None = None, code: int = errno.ENOSPC) -> None:
        self.number = number
        self.code = code
        self.seen: list[Operation] = []

    def __call__(self, operation: Operation) -> None:
        self.seen.append(operation)
        if len(self.seen) - 1 == self.number:
            raise OSError(self.code, os.strerror(self.code), operation.path)


def told_by(call: Callable[[], Any]) -> str:
    """The error, "" where there was none."""
    try:
        call()
    except CheckpointException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)], ids=["no space", "I/O error"]
)
def test_an_error_at_any_operation_leaves_the_old_or_the_new_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, exchanges: bool
) -> None:
    if not exchanges:
        without_exchange(monkeypatch)
    save(tmp_path / "counted", 1)
    counter = FailingAt()
    use_store(monkeypatch, partial(Store, observer=counter))
    save(tmp_path / "counted", 2)
    outcomes: Counter[str] = Counter()
    for number in range(len(counter.seen)):
        root = tmp_path / str(number)
        use_store(monkeypatch, Store)
        save(root, 1)
        failing = FailingAt(number, code)
        use_store(monkeypatch, partial(Store, observer=failing))
        told = told_by(lambda root=root: save(root, 2))  # type: ignore[misc]
        outcomes["told" if told else "survived"] += 1
        assert not told or (str(root / NAME) in told and ("no space left" in told) == (code == errno.ENOSPC))
        assert len(failing.seen) > number, "the fault did not fire"
        assert load(root) == (1 if told else 2)
        use_store(monkeypatch, Store)
        save(root, 3)
        assert load(root) == 3
        assert os.listdir(root) == [NAME]
    assert outcomes["told"] > 10, outcomes
    assert outcomes["survived"], outcomes  # clearing up, and a failed fsync, after which the file is written again


def test_a_failed_save_leaves_no_litter_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    real = os.fsync

    def full(descriptor: int) -> None:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    text = refusal(lambda: save(tmp_path, 2))
    monkeypatch.undo()
    assert "failed on rank 0: the device has no space left or a quota is exceeded" in text
    assert "Nothing was published" in text
    assert os.listdir(tmp_path) == [NAME]
    assert load(tmp_path) == 1


def test_a_file_that_may_not_grow_fails_the_save(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a process of its own."""
    save(tmp_path, 1)
    script = tmp_path.parent / f"{tmp_path.name}.py"
    script.write_text(
        "import resource, signal, sys, torch, torch.distributed.checkpoint as dcp, dist_train as dt\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "dcp.save({'w': torch.ones(1 << 20)}, storage_writer=dt.StorageWriter(sys.argv[1]))\n"
    )
    done = run_command([sys.executable, str(script), str(tmp_path / NAME)], deadline_seconds=60)
    assert done.returncode == 1
    assert "File too large" in done.output
    assert os.listdir(tmp_path) == [NAME]
    assert load(tmp_path) == 1


# Damage


def data_file(root: Path) -> Path:
    return next((root / NAME).glob("model-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (lambda root: flip(data_file(root)), "model-00001-of-00001.safetensors: has digest"),
    "cut": (lambda root: os.truncate(data_file(root), 5000), "model-00001-of-00001.safetensors is 5000 bytes long"),
    "missing file": (lambda root: data_file(root).unlink(), "model-00001-of-00001.safetensors is missing"),
    "empty file": (lambda root: os.truncate(data_file(root), 0), "model-00001-of-00001.safetensors is 0 bytes long"),
    "no manifest": (lambda root: (root / NAME / MANIFEST_NAME).unlink(), "there is no manifest.json"),
    "flipped manifest": (lambda root: flip(root / NAME / MANIFEST_NAME), "the manifest"),
    "torch's": (lambda root: (root / NAME / MANIFEST_NAME).rename(root / NAME / ".metadata"), "FileSystemReader"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_by_file_and_reason(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    harm, words = DAMAGES[damage]
    harm(tmp_path)
    text = refusal(lambda: load(tmp_path))
    assert words in text
    assert str(tmp_path / NAME) in text


def test_a_damaged_checkpoint_may_be_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(tmp_path / NAME / MANIFEST_NAME)
    save(tmp_path, 2)
    assert load(tmp_path) == 2


def test_verification_can_be_turned_off_and_keeps_to_what_is_used(tmp_path: Path) -> None:
    save(tmp_path, 1)
    flip(data_file(tmp_path))
    pair = {"pair": None}
    dcp.load(pair, storage_reader=dt.StorageReader(tmp_path / NAME))
    assert pair["pair"][0] == 1  # type: ignore[index]
    weights = {"model": {"w": torch.zeros(700, 3)}}
    dcp.load(weights, storage_reader=dt.StorageReader(tmp_path / NAME, verify=False))
    assert (weights["model"]["w"] != 1).sum() == 1


# Kills


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, exchanges: bool) -> None:
    """Forked: each child is killed by itself before another change to the disk."""
    save(tmp_path / "0", 1)
    seen = set()
    number = 0
    while True:
        root = tmp_path / str(number)
        if number:
            save(root, 1)
        status = killed_before(number + 1, root, exchanges)
        seen.add(load(root))
        litter = set(os.listdir(root)) - {NAME}
        save(root, 3)
        assert load(root) == 3, litter
        assert os.listdir(root) == [NAME], litter
        if not os.WIFSIGNALED(status):
            break
        number += 1
    assert os.waitstatus_to_exitcode(status) == 0
    assert seen == {1, 2}
    assert number > 15


def killed_before(number: int, root: Path, exchanges: bool) -> int:
    """How a child ended that saves and kills itself before its so-manyth change to the disk."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = []

    def kill(operation: Operation) -> None:
        seen.append(operation)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        dcp_writer.Store = partial(Store, observer=kill)  # type: ignore[misc, assignment]
        if not exchanges:
            Store.exchange = lambda self, source, target: False  # type: ignore[method-assign]
        save(root, 2)
    finally:
        os._exit(0 if len(seen) < number else 1)


# Power loss


def whole(root: Path) -> int | None:
    """The number of the save that counts, None where there is none."""
    publication = Publication(root / NAME)
    place = publication.locate()
    found = None if place is None else read_checkpoint(publication.store, place).manifest
    if place is None or found is None or verify_checkpoint(publication.store, place, found):
        return None
    number = found.state["dcp"]["values"]["number"]
    assert isinstance(number, int)
    return number


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def story(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Recorder, list[DiskEvent]]:
    """Three saves under one name, the first of them new, as the disk saw them."""
    recorder = Recorder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            without_exchange(patch)
        use_store(patch, lambda root: RecordingStore(Path(root), recorder))
        for number in (1, 2, 3):
            save(tmp_path / "made/by", number)
            recorder.mark("acknowledged", number)
    recorder.settle()
    return recorder, recorder.events


@pytest.fixture
def folder() -> Iterator[Path]:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="dist_train-crash-") as name:
        yield Path(name) / "state"


def examine(recorder: Recorder, events: list[DiskEvent], folder: Path) -> Iterator[tuple[CrashState, int, int | None]]:
    """Every crash state: what had been acknowledged, and what is whole."""
    for state in crash_states(recorder, events):
        state.materialise(folder)
        marks = [event.value for event in events[: state.moment] if isinstance(event, Mark)]
        yield state, max(marks, default=0), whole(folder / "made/by")
        shutil.rmtree(folder)


def test_no_power_loss_takes_what_was_acknowledged(story: tuple[Recorder, list[DiskEvent]], folder: Path) -> None:
    outcomes: Counter[str] = Counter()
    for state, acknowledged, found in examine(*story, folder):
        where = f"after event {state.moment} ({state.how})"
        assert (found or 0) >= acknowledged, where
        outcomes["tried"] += 1
        outcomes["nothing yet"] += found is None
    assert outcomes["tried"] > 200, outcomes
    assert outcomes["nothing yet"], "the states before the first save are missing"


OMISSIONS: dict[str, Callable[[Synced], bool]] = {
    "fsync of the tensors": lambda sync: sync.kind == "fsync" and sync.path.endswith(".safetensors"),
    "fsync of the manifest": lambda sync: sync.kind == "fsync" and sync.path.endswith("manifest.json"),
    "fsync of the sealed folder": lambda sync: sync.kind == "fsync_dir" and "/.sealed-" in sync.path,
    "fsync of the folder above": lambda sync: sync.kind == "fsync_dir" and sync.path == "made/by",
    "fsync of the directory above that": lambda sync: sync.kind == "fsync_dir" and sync.path == "made",
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_leaving_out_any_one_sync_is_found(
    story: tuple[Recorder, list[DiskEvent]], folder: Path, omission: str
) -> None:
    """The checker has teeth."""
    recorder, events = story
    leave_out = OMISSIONS[omission]
    fewer = [event for event in events if not (isinstance(event, Synced) and leave_out(event))]
    assert len(fewer) < len(events), "there was no such sync"
    assert any((found or 0) < acknowledged for _, acknowledged, found in examine(recorder, fewer, folder))
