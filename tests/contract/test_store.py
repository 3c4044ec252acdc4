"""What every store promises. A store over something else than local files subclasses `StoreContract`."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.store import CHUNK_BYTES, Operation, Store, is_out_of_space
from dist_train.errors import StorageError

SIZES = [0, 1, 4095, 4096, 4097, CHUNK_BYTES + 1]


def image_of(length: int) -> mmap.mmap:
    """Page-aligned bytes that repeat with an odd period, rounded up to a page; the padding is not zero."""
    image = mmap.mmap(-1, max(-(-length // 4096) * 4096, 4096))
    pattern = bytes(range(251)) * (len(image) // 251 + 1)
    image[:] = pattern[: len(image)]
    return image


def write(store: Store, path: str, length: int) -> tuple[bytes, bytes]:
    """What was given and what was seen chunk by chunk."""
    image = image_of(length)
    seen: list[bytes] = []
    store.write_image(path, memoryview(image), length, lambda chunk: seen.append(bytes(chunk)))
    return image[:length], b"".join(seen)


class StoreContract:
    """Subclass it and give `make`."""

    def make(self, root: Path, **options: Any) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def log(self) -> list[Operation]:
        return []

    @pytest.fixture
    def store(self, tmp_path: Path, log: list[Operation]) -> Store:
        store = self.make(tmp_path / "run", observer=log.append)
        store.make_directory("")
        log.clear()
        return store

    # Whole files

    def test_replace_shows_the_old_or_the_new_and_never_a_part(self, store: Store) -> None:
        store.replace("a.json", b"old")
        seen: list[bytes] = []
        store.observer = lambda operation: seen.append(store.read("a.json"))
        store.replace("a.json", b"something new")
        assert set(seen) == {b"old", b"something new"}
        assert store.read("a.json") == b"something new"
        assert store.list() == ["a.json"]

    def test_a_durable_replace_syncs_the_data_before_and_the_name_after_the_rename(
        self, store: Store, log: list[Operation]
    ) -> None:
        store.make_directory("d")
        log.clear()
        store.replace("d/a.json", b"x")
        assert [one.kind for one in log] == ["create", "write", "fsync", "rename", "fsync_dir"]
        assert log[2].path == log[3].path
        assert (log[3].target, log[4].path) == ("d/a.json", "d")

    def test_a_passing_replace_is_whole_without_being_durable(self, store: Store, log: list[Operation]) -> None:
        store.replace("a.json", b"x", durable=False)
        assert "fsync" not in {one.kind for one in log}
        assert store.read("a.json") == b"x"

    @pytest.mark.parametrize("kind", ["create", "write", "fsync", "rename"])
    @pytest.mark.parametrize("also", ["", "unlink"])
    def test_a_failed_replace_leaves_the_old_and_says_why(self, store: Store, kind: str, also: str) -> None:
        store.replace("a.json", b"old")

        def fail(operation: Operation) -> None:
            if operation.kind in (kind, also):
                raise OSError(errno.ENOSPC if operation.kind == kind else errno.EIO, "injected")

        store.observer = fail
        with pytest.raises(OSError, match="injected") as caught:
            store.replace("a.json", b"new")
        assert caught.value.errno == errno.ENOSPC
        store.observer = None
        assert store.read("a.json") == b"old"
        assert also or store.list() == ["a.json"]

    def test_write_new_never_overwrites(self, store: Store) -> None:
        store.write_new("a", b"1")
        with pytest.raises(FileExistsError):
            store.write_new("a", b"2")
        assert store.read("a") == b"1"

    def test_create_exclusive_lets_one_win_and_is_durable(self, store: Store, log: list[Operation]) -> None:
        store.create_exclusive("000001")
        assert [(one.kind, one.path) for one in log] == [("create", "000001"), ("fsync", "000001"), ("fsync_dir", "")]
        with pytest.raises(FileExistsError):
            store.create_exclusive("000001")

    def test_link_points_and_replaces(self, store: Store) -> None:
        store.make_directory("one")
        store.make_directory("two")
        store.link("latest", "one")
        store.link("latest", "two")
        assert os.readlink(store.path("latest")) == "two"
        assert store.list() == ["latest", "one", "two"]

    # Appending

    def test_append_closes_a_torn_line(self, store: Store) -> None:
        store.append("log", '{"a":1}\n')
        with open(store.path("log"), "a") as file:
            file.write('{"b":')
        store.append("log", '{"c":3}\n')
        assert store.read("log").decode().splitlines() == ['{"a":1}', '{"b":', '{"c":3}']

    def test_append_makes_a_new_file_s_name_durable(self, store: Store, log: list[Operation]) -> None:
        store.append("log", "x\n")
        store.append("log", "y\n")
        assert [one.kind for one in log] == ["open", "write", "fsync_dir", "open", "write"]
        log.clear()
        store.sync_file("log")
        assert [one.kind for one in log] == ["fsync"]

    def test_sync_of_a_missing_file_is_no_error(self, store: Store) -> None:
        store.sync_file("nothing")

    # Images

    @pytest.mark.parametrize("direct", [True, False])
    @pytest.mark.parametrize("length", SIZES)
    def test_an_image_is_written_to_its_exact_length(self, tmp_path: Path, length: int, direct: bool) -> None:
        store = self.make(tmp_path, direct=direct)
        given, seen = write(store, "x", length)
        assert store.size("x") == length
        assert store.read("x") == given == seen

    def test_an_image_is_synced_after_its_last_change(self, store: Store, log: list[Operation]) -> None:
        write(store, "x", CHUNK_BYTES + 1)
        assert [one.kind for one in log] == ["create", "write", "write", "truncate", "fsync"]

    def test_an_image_never_overwrites(self, store: Store) -> None:
        write(store, "x", 10)
        with pytest.raises(FileExistsError):
            write(store, "x", 20)

    # Directories

    def test_a_new_directory_is_durable_in_its_parent(self, store: Store, log: list[Operation]) -> None:
        store.make_directory("a/b/c")
        assert [(one.kind, one.path) for one in log] == [
            ("mkdir", "a"),
            ("fsync_dir", ""),
            ("mkdir", "a/b"),
            ("fsync_dir", "a"),
            ("mkdir", "a/b/c"),
            ("fsync_dir", "a/b"),
        ]

    def test_a_root_with_missing_parents_is_durable_all_the_way_up(self, tmp_path: Path) -> None:
        log: list[Operation] = []
        store = self.make(tmp_path / "a" / "b", observer=log.append)
        store.make_directory("")
        assert store.is_directory("")
        told = [(one.kind, os.path.normpath(store.root / one.path)) for one in log]
        a, b = str(tmp_path / "a"), str(tmp_path / "a" / "b")
        assert told.index(("mkdir", a)) < told.index(("fsync_dir", str(tmp_path)))
        assert told.index(("mkdir", b)) < told.index(("fsync_dir", a))

    def test_a_directory_that_a_killed_process_made_is_made_durable_too(
        self, store: Store, log: list[Operation]
    ) -> None:
        """It may have died between the mkdir and the fsync of the parent."""
        os.mkdir(store.path("checkpoints"))
        store.make_directory("checkpoints")
        assert ("fsync_dir", "") in [(one.kind, one.path) for one in log]

    def test_make_directory_that_must_be_new_refuses_an_old_one(self, store: Store) -> None:
        store.make_directory("a", exist_ok=False)
        with pytest.raises(FileExistsError):
            store.make_directory("a", exist_ok=False)

    def test_list_is_sorted_and_empty_for_what_is_missing(self, store: Store) -> None:
        for name in ("b", "a", "c"):
            store.write_new(name, b"")
        assert store.list() == ["a", "b", "c"]
        assert store.list("nothing") == []
        assert store.list("a") == []

    def test_remove_tree_does_not_follow_links(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "x").write_text("x")
        store.make_directory("trash/deep")
        store.write_new("trash/deep/file", b"x")
        os.symlink(tmp_path / "precious", store.path("trash/deep/link"))
        os.symlink(tmp_path / "precious", store.path("top"))
        os.symlink("nowhere", store.path("trash/dangling"))
        store.remove_tree("trash")
        store.remove_tree("top")
        store.remove_tree("nothing")
        assert store.list() == []
        assert (tmp_path / "precious" / "x").read_text() == "x"

    def test_what_vanishes_while_a_tree_is_removed_is_no_error(self, store: Store) -> None:
        store.make_directory("trash/a")
        store.write_new("trash/a/x", b"")

        def race(operation: Operation) -> None:
            full = store.path(operation.path)
            if operation.kind == "unlink":
                full.unlink()
            elif operation.kind == "rmdir":
                full.rmdir()

        store.observer = race
        store.remove_tree("trash")
        assert store.list() == []

    # Reading

    def test_reads_agree(self, store: Store) -> None:
        data = bytes(range(256)) * 40
        store.write_new("x", data)
        assert b"".join(bytes(chunk) for chunk in store.read_chunks("x", 1000)) == data
        assert bytes(store.map("x")) == data
        assert store.size("x") == len(data)
        assert store.tree_bytes() == len(data)
        assert store.free_bytes() > 0
        assert store.exists("x")
        assert not store.exists("y")

    # Trouble

    def test_every_change_is_told_before_it_happens(self, store: Store) -> None:
        """An observer that always refuses leaves the directory as it was."""
        store.make_directory("d")
        store.write_new("d/x", b"x")

        def refuse(operation: Operation) -> None:
            raise OSError(errno.EROFS, "refused")

        store.observer = refuse
        changes: list[Callable[[], Any]] = [
            lambda: store.make_directory("e"),
            lambda: store.create_exclusive("f"),
            lambda: store.write_new("f", b""),
            lambda: store.replace("d/x", b"y"),
            lambda: store.replace("d/x", b"y", durable=False),
            lambda: store.append("d/x", "y"),
            lambda: write(store, "f", 5),
            lambda: store.rename("d", "e"),
            lambda: store.unlink("d/x"),
            lambda: store.remove_tree("d"),
            lambda: store.link("l", "d"),
            lambda: store.sync_directory("d"),
            lambda: store.sync_file("d/x"),
        ]
        for change in changes:
            with pytest.raises(OSError, match="refused"):
                change()
        assert store.list() == ["d"]
        assert store.read("d/x") == b"x"

    def test_a_root_that_cannot_be_made_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"file/run cannot be written.*Choose another run_dir"):
            self.make(tmp_path / "file" / "run").require_writable()

    def test_a_writable_root_is_left_empty(self, tmp_path: Path) -> None:
        store = self.make(tmp_path / "run")
        store.require_writable()
        assert store.list() == []


class TestStore(StoreContract):
    def make(self, root: Path, **options: Any) -> Store:
        return Store(root, **options)

    # What local files add: O_DIRECT, and file systems without it

    @pytest.mark.parametrize("length", SIZES)
    def test_o_direct_refused_at_open_falls_back_with_one_notice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, length: int
    ) -> None:
        real = os.open

        def refuse(path: str, flags: int, *rest: int) -> int:
            if flags & os.O_DIRECT:
                os.close(real(path, flags & ~os.O_DIRECT, *rest))  # some file systems create it all the same
                raise OSError(errno.EINVAL, "no O_DIRECT here", path)
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", refuse)
        store = Store(tmp_path)
        for name in ("x", "y"):
            given, seen = write(store, name, length)
            assert store.read(name) == given == seen
        assert not store.direct
        assert len(notices(caplog)) == 1

    @pytest.mark.parametrize("length", SIZES[1:])
    @pytest.mark.parametrize("good_writes", [0, 1])
    def test_o_direct_refused_at_write_falls_back_with_one_notice(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        length: int,
        good_writes: int,
    ) -> None:
        import fcntl

        real, calls = os.pwrite, 0

        def refuse(descriptor: int, data: Any, offset: int) -> int:
            nonlocal calls
            calls += 1
            if calls > good_writes and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", refuse)
        store = Store(tmp_path)
        for name in ("x", "y"):
            given, seen = write(store, name, length)
            assert store.read(name) == given == seen
        assert not store.direct
        assert len(notices(caplog)) == 1

    def test_a_platform_without_o_direct_writes_with_one_notice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.delattr(os, "O_DIRECT")
        store = Store(tmp_path)
        for name in ("x", "y"):
            given, _ = write(store, name, 5000)
            assert store.read(name) == given
        assert len(notices(caplog)) == 1

    def test_no_notice_where_the_caller_wanted_no_o_direct(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(Store(tmp_path, direct=False), "x", 5000)
        assert not notices(caplog)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_another_error_at_open_or_write_is_no_reason_to_fall_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refuse(*_: Any) -> int:
            raise OSError(code, "injected")

        store = Store(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            with pytest.raises(OSError, match="injected"):
                write(store, "x", 4096)
            patch.setattr(os, "open", refuse)
            with pytest.raises(OSError, match="injected"):
                write(store, "y", 4096)
        assert store.direct

    def test_short_writes_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:4096], offset))
        given, _ = write(Store(tmp_path), "x", 20_000)
        assert (tmp_path / "x").read_bytes() == given

    def test_a_file_system_without_directory_fsync_is_accepted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(descriptor: int) -> None:
            raise OSError(errno.EINVAL, "directories cannot be synced here")

        monkeypatch.setattr(os, "fsync", refuse)
        Store(tmp_path).sync_directory("")

    def test_a_read_only_root_says_so(self, tmp_path: Path) -> None:
        target = tmp_path / "run"
        target.mkdir()
        if os.getuid() == 0:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", target], capture_output=True, check=False
            )
            if done.returncode:
                pytest.skip(f"root may not mount here: {done.stderr.decode().strip()}")
        else:
            target.chmod(0o500)
        try:
            with pytest.raises(StorageError, match=r"cannot be written: (Read-only file system|Permission denied)"):
                Store(target).require_writable()
        finally:
            if os.getuid() == 0:
                subprocess.run(["umount", target], check=True)

    def test_a_full_disk_is_reported_as_out_of_space(self, small_disk: Path) -> None:
        store = Store(small_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            write(store, "x", 4 << 20)
        assert is_out_of_space(caught.value)
        store.unlink("x")
        given, _ = write(store, "x", 100_000)
        assert store.read("x") == given

    def test_a_full_disk_leaves_the_old_file_in_place(self, small_disk: Path) -> None:
        store = Store(small_disk)
        store.replace("a", b"old")
        with pytest.raises(OSError, match="No space left"):
            store.replace("a", bytes(4 << 20))
        assert store.read("a") == b"old"
        assert store.list() == ["a"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, ""), True),
        (OSError(errno.EDQUOT, ""), True),
        (OSError(errno.EIO, ""), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_out_of_space_is_told_from_other_errors(error: BaseException, full: bool) -> None:
    assert is_out_of_space(error) is full


def notices(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"root may not mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
