"""A disk that does not answer is no damage: what could not be read is never set aside, and never begun anew over."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint import restorer
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.errors import StorageError
from tests.support.damage import checkpoint_names, contents, copy_run
from tests.support.small_run import SmallRun

KEEP = CheckpointPolicy(every_epochs=1, keep_last=9)
NAMES = ["step-00000005", "step-00000010", "step-00000015"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unread") / "run"
    SmallRun(run_dir=run_dir, epochs=3, policy=KEEP).train()
    assert checkpoint_names(run_dir) == NAMES
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(restorer, "_PATIENCE_SECONDS", (0.0, 0.0))
    return copy_run(trained, tmp_path / "run")


def deaf_store(code: int, is_deaf: Callable[[str], bool], times: int = 1 << 30) -> type[Store]:
    """A store whose disk answers so many reads of certain files with an error."""
    left = times

    class Deaf(Store):
        def refuse(self, path: str) -> None:
            nonlocal left
            if is_deaf(path) and left:
                left -= 1
                raise OSError(code, os.strerror(code), path)

        def read(self, path: str) -> bytes:
            self.refuse(path)
            return super().read(path)

        def read_chunks(self, path: str, *arguments: Any) -> Iterator[memoryview]:
            self.refuse(path)
            return super().read_chunks(path, *arguments)

    return Deaf


def is_manifest(path: str) -> bool:
    return path.endswith("manifest.json")


def train_on(run_dir: Path, store: type[Store], **policy: Any) -> Any:
    keep = CheckpointPolicy(every_epochs=1, keep_last=9, **policy)
    return SmallRun(run_dir=run_dir, epochs=4, policy=keep, open_store=store).train()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_start_that_cannot_read_its_checkpoints_is_an_error_and_changes_none(code: int, run_dir: Path) -> None:
    """A budget that could then delete them would take all of the run's work."""
    before = contents(run_dir / "checkpoints")
    with pytest.raises(StorageError, match=r"none was resumed from.*step-00000015.*Run the same command again"):
        train_on(run_dir, deaf_store(code, is_manifest), max_bytes="40kB")
    assert contents(run_dir / "checkpoints") == before
    assert train_on(run_dir, Store).resumed_from.endswith(NAMES[-1])


def test_an_error_that_passes_is_waited_for(run_dir: Path) -> None:
    newest = f"{NAMES[-1]}/manifest.json"
    run = train_on(run_dir, deaf_store(errno.ESTALE, lambda path: path.endswith(newest), times=1))
    assert run.resumed_from.endswith(NAMES[-1])


def test_a_bad_sector_under_the_newest_manifest_leaves_it_and_takes_the_older_one(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = f"{NAMES[-1]}/manifest.json"
    run = train_on(run_dir, deaf_store(errno.EIO, lambda path: path.endswith(newest)))
    assert run.resumed_from.endswith(NAMES[-2])
    assert NAMES[-1] in checkpoint_names(run_dir)
    assert not list((run_dir / "checkpoints").glob(".corrupt-*"))


def test_data_that_the_disk_does_not_give_is_left_as_it_is(run_dir: Path) -> None:
    before = contents(run_dir / "checkpoints")
    with pytest.raises(StorageError, match=r"none was resumed from.*optimizer-00001-of-00001"):
        train_on(run_dir, deaf_store(errno.EIO, lambda path: "/optimizer-" in path))
    assert contents(run_dir / "checkpoints") == before


def test_the_identity_of_a_run_is_not_made_anew_because_the_disk_did_not_give_it(run_dir: Path) -> None:
    before = (run_dir / "run.json").read_bytes()
    with pytest.raises(StorageError):
        train_on(run_dir, deaf_store(errno.EIO, lambda path: path.endswith(("run.json", "manifest.json"))))
    assert (run_dir / "run.json").read_bytes() == before


def test_a_copy_without_the_files_of_attempts_goes_on_counting(run_dir: Path) -> None:
    """Tools leave empty files out; the same number twice would fold the history in a circle."""
    train_on(run_dir, Store)
    for path in (run_dir / "attempts").iterdir():
        path.unlink()
    run = SmallRun(run_dir=run_dir, epochs=5, policy=KEEP).train()
    assert run.attempt == 3
