"""A packed run: verified on the way, whole or not at all, and a run directory again where it is unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint import archive
from dist_train.checkpoint.archive import Choice, pack
from dist_train.checkpoint.inference import load_model
from dist_train.checkpoint.ownership import OWNER
from dist_train.checkpoint.pins import add_pin
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.cli import main
from dist_train.errors import ConfigError, CorruptCheckpointError, NoCheckpointError, StorageError
from dist_train.history import read_metrics
from tests.support.small_run import SmallRun, manifests_of, small_model
from tests.support.twins import assert_same_run, same_bits

KEEP_ALL = CheckpointPolicy(every_epochs=1, keep_last=9)
FIRST, BEST, LAST = "step-00000005", "step-00000010", "step-00000015"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, of which the second is the best; nothing may change it."""
    loop = SmallRun(run_dir=tmp_path_factory.mktemp("trained") / "ultra", policy=KEEP_ALL)
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train()
    return loop.run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "ultra", symlinks=True))


def unpack(path: Path, folder: Path) -> Path:
    """As on the machine that downloaded it, with the tools that are there: the sums are checked first."""
    check = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, capture_output=True, text=True)
    assert check.stdout == f"{path.name}: OK\n"
    with zipfile.ZipFile(path) as one:
        assert {info.compress_type for info in one.infolist()} == {zipfile.ZIP_STORED}
        one.extractall(folder)
    (run,) = folder.iterdir()
    check = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=run, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    return run


def packed_steps(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as one:
        return sorted({name.split("/")[2] for name in one.namelist() if "/checkpoints/" in name})


@pytest.mark.parametrize(
    ("choice", "steps"),
    [("best", [BEST]), ("latest", [LAST]), ("both", [BEST, LAST]), ("all", [FIRST, BEST, LAST])],
)
def test_what_is_chosen_is_packed(choice: Choice, steps: list[str], trained: Path, tmp_path: Path) -> None:
    done = pack(str(trained), str(tmp_path / "a.zip"), choice=choice)
    assert packed_steps(tmp_path / "a.zip") == steps
    assert [os.path.basename(one.path) for one in done.checkpoints] == steps
    assert done.sha256 == hashlib.sha256((tmp_path / "a.zip").read_bytes()).hexdigest()


def test_what_is_unpacked_is_a_run_that_can_be_listed_loaded_and_trained_on(trained: Path, tmp_path: Path) -> None:
    pack(str(trained), str(tmp_path / "a.zip"))
    run = unpack(tmp_path / "a.zip", tmp_path / "elsewhere")
    assert run.name == "ultra"
    for command in ("ls", "show", "verify"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([command, str(run)]) == 0
    one, other = small_model(), small_model()
    load_model(str(run), "best", one)
    load_model(str(trained), "best", other)
    assert all(same_bits(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert read_metrics(run) == read_metrics(trained)


def test_a_run_that_goes_on_from_its_archive_is_the_one_that_was_never_moved(trained: Path, tmp_path: Path) -> None:
    pack(str(trained), str(tmp_path / "a.zip"), choice="latest")
    moved = unpack(tmp_path / "a.zip", tmp_path / "elsewhere")
    stayed = Path(shutil.copytree(trained, tmp_path / "stayed", symlinks=True))
    for run_dir in (moved, stayed):
        with contextlib.redirect_stdout(io.StringIO()):
            run = SmallRun(run_dir=run_dir, epochs=5, policy=KEEP_ALL, resume="must").train()
        assert run.attempt == 2, "a number of its own: the history is folded by it"
    assert_same_run(moved, stayed)


def test_weights_only_leaves_the_optimizer_out_and_still_verifies(trained: Path, tmp_path: Path) -> None:
    done = pack(str(trained), str(tmp_path / "w.zip"), weights_only=True)
    run = unpack(tmp_path / "w.zip", tmp_path / "elsewhere")
    assert not list(run.rglob("optimizer-*"))
    assert {tuple(one["settings"]["absent"]) for one in manifests_of(run)} == {("optimizer", "scheduler")}
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["verify", str(run)]) == 0
    load_model(str(run), "best", small_model())
    assert sum(one.num_bytes for one in done.checkpoints) < sum(
        path.stat().st_size for path in trained.rglob("*.safetensors")
    )


def test_without_a_metric_the_latest_is_packed_and_best_is_refused(tmp_path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        SmallRun(run_dir=tmp_path / "plain", metrics=lambda run: {}).train()
    done = pack(str(tmp_path / "plain"), str(tmp_path / "a.zip"))
    assert [one.marks for one in done.checkpoints] == [["latest"]]
    with pytest.raises(NoCheckpointError, match="no best checkpoint: no monitored metric is recorded"):
        pack(str(tmp_path / "plain"), str(tmp_path / "b.zip"), choice="best")


@pytest.mark.parametrize(
    ("choice", "weights_only", "name"),
    [("both", False, "ultra.zip"), ("best", True, "ultra-best-weights.zip"), ("all", False, "ultra-all.zip")],
)
def test_an_archive_that_nobody_named_is_called_after_the_run(
    choice: Choice, weights_only: bool, name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pack(str(trained), choice=choice, weights_only=weights_only).path == name
    (tmp_path / "downloads").mkdir()
    done = pack(str(trained), "downloads", choice=choice, weights_only=weights_only)
    assert done.path == f"downloads/{name}"
    assert sorted(os.listdir("downloads")) == [name, f"{name}.sha256"]


def test_packing_changes_nothing_in_the_run(run_dir: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]}
    pack(str(run_dir), str(tmp_path / "a.zip"), choice="all")
    assert {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]} == before


def test_pins_go_along_and_who_holds_the_run_does_not(run_dir: Path, tmp_path: Path) -> None:
    digest = manifests_of(run_dir)[1]["digest"]
    add_pin(Store(run_dir), f"checkpoints/{BEST}", digest)
    assert (run_dir / OWNER).exists()
    for weights_only in (False, True):
        pack(str(run_dir), str(tmp_path / "a.zip"), weights_only=weights_only, force=True)
        run = unpack(tmp_path / "a.zip", tmp_path / f"elsewhere-{weights_only}")
        assert (run / "pins" / digest).exists()
        assert not (run / OWNER).exists()


def test_a_run_that_trains_is_packed_without_what_it_is_writing(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "status.json").write_text('{"status": "running", "global_step": 15}')
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"attempt": 1, "record": 99, "ki')
    (run_dir / "checkpoints" / ".saving-step-00000020-a000001").mkdir()
    pack(str(run_dir), str(tmp_path / "a.zip"), choice="all")
    run = unpack(tmp_path / "a.zip", tmp_path / "elsewhere")
    assert packed_steps(tmp_path / "a.zip") == [FIRST, BEST, LAST]
    assert not (run / "status.json").exists()
    assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")


def prune_when(run_dir: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The training deletes the oldest checkpoint before or after its files are opened."""
    real = archive._opened

    @contextlib.contextmanager
    def opened(store: Store, contents: Any) -> Iterator[Any]:
        if moment == "before":
            shutil.rmtree(run_dir / "checkpoints" / FIRST, ignore_errors=True)
        with real(store, contents) as sources:
            shutil.rmtree(run_dir / "checkpoints" / FIRST, ignore_errors=True)
            yield sources

    monkeypatch.setattr(archive, "_opened", opened)


@pytest.mark.parametrize(("moment", "steps"), [("before", [BEST, LAST]), ("after", [FIRST, BEST, LAST])])
def test_a_checkpoint_that_is_pruned_meanwhile_is_packed_or_the_choice_is_made_anew(
    moment: str, steps: list[str], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_when(run_dir, monkeypatch, moment)
    done = pack(str(run_dir), str(tmp_path / "a.zip"), choice="all")
    assert not (run_dir / "checkpoints" / FIRST).exists()
    assert [os.path.basename(one.path) for one in done.checkpoints] == steps
    unpack(tmp_path / "a.zip", tmp_path / "elsewhere")


def test_more_files_than_may_be_open_are_opened_one_by_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_MOST_OPEN", 2)
    pack(str(trained), str(tmp_path / "a.zip"), choice="all")
    unpack(tmp_path / "a.zip", tmp_path / "elsewhere")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"), [(flip, "with digest"), (os.unlink, "is missing"), (lambda p: os.truncate(p, 9), "9 bytes")]
)
def test_a_damaged_checkpoint_is_not_packed(
    damage: Callable[[Path], None], message: str, run_dir: Path, tmp_path: Path
) -> None:
    (path,) = (run_dir / "checkpoints" / LAST).glob("optimizer-*")
    damage(path)
    with pytest.raises(CorruptCheckpointError, match=rf"{path.name} .*{message}.*Nothing was packed"):
        pack(str(run_dir), str(tmp_path / "a.zip"))
    assert os.listdir(tmp_path) == ["ultra"]
    pack(str(run_dir), str(tmp_path / "a.zip"), choice="best")


def test_a_disk_that_fills_up_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda store: 1000)
    with pytest.raises(StorageError, match=r"a.zip was not written: it needs .*, 1.0 kB are free"):
        pack(str(trained), str(tmp_path / "a.zip"))
    monkeypatch.setattr(Store, "free_bytes", lambda store: 1 << 40)
    writes = iter(range(5))

    def fail_late(self: Any, data: Any, write: Any = zipfile._ZipWriteFile.write) -> Any:  # type: ignore[attr-defined]
        if next(writes, None) is None:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(zipfile._ZipWriteFile, "write", fail_late)  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"a.zip was not written: the disk is full or a quota is exceeded"):
        pack(str(trained), str(tmp_path / "a.zip"))
    assert os.listdir(tmp_path) == []


def test_an_archive_that_is_there_is_replaced_only_when_asked(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("mine")
    with pytest.raises(ConfigError, match=r"a\.zip is there already"):
        pack(str(trained), str(tmp_path / "a.zip"))
    assert (tmp_path / "a.zip").read_text() == "mine"
    pack(str(trained), str(tmp_path / "a.zip"), force=True)
    unpack(tmp_path / "a.zip", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "place", ["", "run.json", "new.zip", "checkpoints/step-00000010/manifest.json", "latest/a.zip"]
)
def test_an_archive_inside_of_a_run_is_refused_whatever_is_forced(place: str, run_dir: Path) -> None:
    before = {one: one.read_bytes() for one in run_dir.rglob("*") if one.is_file()}
    with pytest.raises(ConfigError, match=r"in which only the training itself writes\. Nothing was changed there"):
        pack(str(run_dir), str(run_dir / place), force=True)
    assert {one: one.read_bytes() for one in run_dir.rglob("*") if one.is_file()} == before


def test_files_beyond_four_gigabytes_have_the_form_of_64_bits(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    pack(str(trained), str(tmp_path / "a.zip"))
    run = unpack(tmp_path / "a.zip", tmp_path / "elsewhere")
    assert [one["progress"]["global_step"] for one in manifests_of(run)] == [10, 15]


# The command


def call(*args: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(one) for one in args])
    return code, out.getvalue(), err.getvalue()


def test_the_command_says_what_it_packed_and_how_to_check_it(trained: Path, tmp_path: Path) -> None:
    code, out, err = call("pack", trained, "--to", tmp_path / "a.zip")
    assert (code, err) == (0, "")
    assert f"Packed {tmp_path}/a.zip" in out
    assert f"  {BEST}: epoch 2, step 10" in out
    assert f"  {LAST}: epoch 3, step 15" in out
    assert "sha256sum -c a.zip.sha256" in out
    assert "It unpacks into ultra/" in out


def test_the_command_speaks_json_and_refuses_in_one_paragraph(trained: Path, tmp_path: Path) -> None:
    code, out, _ = call("pack", trained, "--best", "--weights-only", "--to", tmp_path / "a.zip", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["folder"], facts["weights_only"], len(facts["checkpoints"])) == ("ultra", True, 1)
    code, out, err = call("pack", trained, "--to", tmp_path / "a.zip")
    assert (code, out) == (1, "")
    assert err.startswith("dist-train: ")
    assert err.count("\n") == 1
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main(["pack", str(trained), "--best", "--latest"])
