"""Laws 1 and 2 under power loss: SIGKILL proves nothing about fsync, since the page cache survives it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from dist_train.checkpoint import ownership
from dist_train.checkpoint.checkpointer import Checkpointer
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.writer import Committed, Event
from tests.support.crash_states import CrashState, Mark, Recorder, RecordingStore, Synced, crash_states
from tests.support.crash_states import Event as DiskEvent
from tests.support.saving_run import SoloRun, commits, listed, whole

RUN = "made/by/us/run"
"""Below the base; its parents are made by the run itself."""


@dataclass(frozen=True)
class Promise:
    """A checkpoint that was acknowledged, and what it held then."""

    path: str
    sequence: int
    digest: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Story:
    """A run over two attempts, as the disk saw it."""

    recorder: Recorder
    events: list[DiskEvent]
    promises: list[Promise]


def tell_story(base: Path, keep_last: int) -> Story:
    recorder = Recorder(base)
    root = base / RUN
    promises: list[Promise] = []

    class Acknowledging(Checkpointer):
        """Marks the moment at which a commit is told."""

        def _after_commit(self, done: Committed) -> list[Event]:
            files = {path.name: path.read_bytes() for path in (root / done.path).iterdir()}
            promises.append(Promise(done.path, done.manifest.sequence, done.manifest.digest, files))
            recorder.mark("acknowledged", promises[-1])
            return super()._after_commit(done)

    class Telling(RecordingStore):
        """Marks the moment at which a checkpoint is given up by retention."""

        def rename(self, source: str, target: str) -> None:
            if "/.trash-" in target and "/step-" in source:
                recorder.mark("given up", source)
            super().rename(source, target)

    policy = CheckpointPolicy(keep_last=keep_last, keep_best=0)
    for steps in ([1, 2, 3], [4]):
        run = SoloRun(Telling(root, recorder), policy, Acknowledging).open()
        for step in steps:
            run.note(f"step {step}")
            assert len(commits(run.save(step))) == 1
        run.close()
    recorder.settle()
    return Story(recorder, recorder.events, promises)


@pytest.fixture(scope="module", params=[1, 2], ids=["keep_last=1", "keep_last=2"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ownership, "BEAT_SECONDS", 3600.0)
        base = tmp_path_factory.mktemp("disk")
        return tell_story(base, request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the states are laid out, one after the other: in memory where there is such a place."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dist_train-crash-") as name:
        yield Path(name)


def promised(events: list[DiskEvent], moment: int) -> tuple[list[Promise], Promise | None]:
    """What must be there if the power fails at a moment, and the last that was acknowledged."""
    standing: dict[str, Promise] = {}
    last = None
    for event in events[:moment]:
        if isinstance(event, Mark) and event.kind == "acknowledged":
            last = standing[event.value.path] = event.value
        elif isinstance(event, Mark):
            standing.pop(event.value, None)
    return list(standing.values()), last


def violations(root: Path, story: Story, standing: list[Promise], last: Promise | None) -> Iterator[str]:
    """How a disk breaks laws 1 and 2."""
    found, verifying = listed(root), whole(root)
    truth = {promise.digest: promise.files for promise in story.promises}
    for promise in standing:
        if promise.path not in found or found[promise.path].digest != promise.digest:
            yield f"{promise.path} was acknowledged and is not committed"
        elif promise.path not in verifying:
            yield f"{promise.path} was acknowledged and does not verify"
    if last is not None and max((one.sequence for one in verifying.values()), default=0) < last.sequence:
        yield f"nothing as new as {last.path}"
    for path, manifest in verifying.items():
        here = {name: (root / path / name).read_bytes() for name in [*manifest.files, "manifest.json"]}
        if here != truth[manifest.digest]:
            yield f"{path} verifies and holds other bytes"


def examine(
    story: Story, events: list[DiskEvent], folder: Path, every: int = 1
) -> Iterator[tuple[CrashState, Path, list[str]]]:
    """Every so-manyth crash state on a real disk, with what is wrong there."""
    for state in islice(crash_states(story.recorder, events), 0, None, every):
        state.materialise(folder)
        standing, last = promised(events, state.moment)
        yield state, folder / RUN, list(violations(folder / RUN, story, standing, last))
        shutil.rmtree(folder)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_no_power_loss_takes_what_was_acknowledged(story: Story, folder: Path, every: int) -> None:
    outcomes: Counter[str] = Counter()
    for state, root, wrong in examine(story, story.events, folder / "state", every):
        assert not wrong, f"after event {state.moment} ({state.how}): {wrong}"
        outcomes["tried"] += 1
        outcomes["torn, and found out"] += bool(listed(root).keys() - whole(root).keys())
        outcomes["nothing yet"] += not whole(root)
    assert outcomes["tried"] > 1000 // every, outcomes
    assert outcomes["nothing yet"], "the states before the first commit are missing"


def test_the_next_attempt_resumes_from_what_was_acknowledged(
    story: Story, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 20th state, in the way that a real restart takes."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600.0)
    monkeypatch.setenv("DIST_TRAIN_OWNER_PATIENCE", "0.001")  # the owner's file is not durable and may be an older one
    for number, state in enumerate(crash_states(story.recorder, story.events)):
        if number % 20:
            continue
        state.materialise(folder / str(number))
        _, last = promised(story.events, state.moment)
        run = SoloRun(Store(folder / str(number) / RUN), CheckpointPolicy(keep_last=2)).open()
        resumed = run.resumed.sequence if run.resumed else 0
        assert resumed >= (last.sequence if last else 0), f"after event {state.moment} ({state.how})"
        if run.resumed:
            assert run.model.weight[0, 0].item() == run.resumed.progress.global_step
        step = run.checkpointer.committed_step + 1
        assert commits(run.save(step)), f"after event {state.moment} ({state.how})"
        run.close()


OMISSIONS: dict[str, Callable[[Synced], bool]] = {
    "fsync of the tensors": lambda sync: sync.kind == "fsync" and sync.path.endswith(".safetensors"),
    "fsync of the model's index": lambda sync: sync.kind == "fsync" and sync.path.endswith(".index.json"),
    "fsync of the manifest": lambda sync: sync.kind == "fsync" and sync.path.endswith("manifest.json"),
    "fsync of the staging folder": lambda sync: sync.kind == "fsync_dir" and "/.saving-" in sync.path,
    "fsync of checkpoints/": lambda sync: sync.kind == "fsync_dir" and sync.path.endswith("/checkpoints"),
    "fsync of the run directory": lambda sync: sync.kind == "fsync_dir" and sync.path == RUN,
    "fsync of the directory above it": lambda sync: sync.kind == "fsync_dir" and sync.path == str(Path(RUN).parent),
    "fsync of the directory that was there": lambda sync: sync.kind == "fsync_dir" and sync.path == ".",
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_leaving_out_any_one_sync_is_found(story: Story, folder: Path, omission: str) -> None:
    """The checker has teeth."""
    leave_out = OMISSIONS[omission]
    events = [event for event in story.events if not (isinstance(event, Synced) and leave_out(event))]
    assert len(events) < len(story.events), "there was no such sync"
    assert any(wrong for _, _, wrong in examine(story, events, folder / "state"))
