"""What a platform lacks is done without, with one notice."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint import ownership, snapshot
from dist_train.checkpoint.store import Store
from tests.support.saving_run import commits, solo_run, whole


@pytest.fixture(autouse=True)
def _no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 3600.0)


def require_saves_with_one_notice(root: Path, caplog: pytest.LogCaptureFixture, about: str) -> None:
    """Two saves and a resume work; the log mentions the lack once."""
    caplog.clear()
    with solo_run(root) as run:
        assert commits(run.save(1))
        assert commits(run.save(2))
    notices = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(notices) == 1, notices
    assert about in notices[0]
    assert len(whole(root)) == 2
    with solo_run(root) as run:
        assert run.resumed is not None
        assert run.model.weight[0, 0].item() == 2


def test_a_complete_platform_gives_no_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with solo_run(tmp_path / "run") as run:
        assert commits(run.save(1))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    require_saves_with_one_notice(tmp_path / "run", caplog, "page cache")


def test_on_a_file_system_that_refuses_o_direct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    require_saves_with_one_notice(tmp_path / "run", caplog, "page cache")


def test_without_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", str(tmp_path / "no such place"))
    require_saves_with_one_notice(tmp_path / "run", caplog, "private memory")


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    require_saves_with_one_notice(tmp_path / "run", caplog, "private memory")


def test_with_shared_memory_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full_memory: Path
) -> None:
    """As with Docker's 64 MB: `ftruncate` would succeed there, and the first touch be a SIGBUS."""
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", str(full_memory))
    require_saves_with_one_notice(tmp_path / "run", caplog, "No space left")
    assert not list(full_memory.glob("dist_train-*")), "memory is left taken"


def test_images_leave_no_name_behind(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    with pytest.MonkeyPatch.context() as patch, solo_run(tmp_path / "run") as run:
        patch.setattr(snapshot, "SHARED_MEMORY", str(shared))
        assert commits(run.save(1))
        assert list(shared.iterdir()) == []


def test_without_symbolic_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    require_saves_with_one_notice(tmp_path / "run", caplog, "links")


def test_without_directory_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with solo_run(tmp_path / "run") as run:
        assert commits(run.save(1))
    assert len(whole(tmp_path / "run")) == 1


def test_a_disk_that_is_really_full_costs_the_save_and_not_the_run(small_disk: Path) -> None:
    """A real file system, and errors that come from where they come from."""
    root = small_disk / "run"
    with solo_run(root) as run:
        assert commits(run.save(1))
        ballast = small_disk / "ballast"
        # 20 kB fit, so that the check before the save (patched out below) is not what stops it.
        ballast.write_bytes(bytes(Store(small_disk).free_bytes() - 20_480))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "free_bytes", lambda _: 1 << 40)
            (failed,) = run.save(2)
        assert getattr(failed, "out_of_space", False)
        assert list(whole(root)) == ["checkpoints/step-00000001"]
        (refused,) = run.save(3)
        assert getattr(refused, "out_of_space", False)
        ballast.unlink()
        assert commits(run.save(4))
    assert len(whole(root)) == 2


def mounted(folder: Path, size: str) -> Iterator[Path]:
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small tmpfs")
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"root may not mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for a few checkpoints of the specimen and the slack that a save asks for."""
    yield from mounted(tmp_path / "disk", "2m")


@pytest.fixture
def full_memory(tmp_path: Path) -> Iterator[Path]:
    """Shared memory of a single page."""
    yield from mounted(tmp_path / "shm", "4k")
