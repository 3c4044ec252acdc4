"""The Kaggle notebook, executed in a simulated session after session, until the training is finished."""

from __future__ import annotations

import shutil
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_train.cluster.kaggle import Session
from tests.support.damage import events
from tests.support.kaggle_tree import build_wheel, kaggle_tree, make_python, run_notebook, text_of
from tests.support.launch import ROOT, run_command, torchrun
from tests.support.small_run import SmallRun, manifests_of, status_of
from tests.support.twins import assert_same_run

pytestmark = pytest.mark.distributed
TRAIN = ROOT / "launch/kaggle/train.py"
SIZE = ["--samples", "512", "--batch-size", "64", "--epochs", "10"]
UPDATES = 80
QUOTA = 1_600_000
"""Four checkpoints, the one being written among them, and the packed best one."""
# A training of many hours in a session that ends so many seconds after it has begun, however busy this machine is.
SLOW = """
import os, runpy, sys, time
from pathlib import Path
from dist_train.run import Run

step = Run.step
def slow_step(run, loss=None):
    time.sleep(0.3)
    step(run, loss)
Run.step = slow_step
place = sys.argv.index("--max-time") + 1
age = time.time() - float(os.environ["DIST_TRAIN_SESSION_START"])
sys.argv[place] = f"{age + float(sys.argv[place].rstrip('s'))}s"
runpy.run_path(str(Path(__file__).with_name("price.py")), run_name="__main__")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def make_dataset(folder: Path, wheel: Path, *, slow: bool = False) -> Path:
    """What a person attaches: the wheel and the script."""
    folder.mkdir()
    shutil.copy(wheel, folder)
    shutil.copy(TRAIN, folder / ("price.py" if slow else "train.py"))
    if slow:
        (folder / "train.py").write_text(SLOW)
    return folder


def save_version(root: Path, folder: Path) -> Path:
    """What Kaggle keeps of a session: the working directory."""
    return Path(shutil.copytree(root / "working", folder, symlinks=True))


def require_quiet(notebook: Any) -> None:
    """No bars and no more lines than a training has to tell."""
    for name in ("train", "result", "pack"):
        text = text_of(notebook, name)
        assert "\r" not in text
        assert len(text.splitlines()) < 60, text


def test_the_notebook_run_twice_finishes_the_training_that_one_session_is_too_short_for(
    tmp_path: Path, wheel: Path
) -> None:
    twin = tmp_path / "twin"
    command = [sys.executable, str(TRAIN), "--run-dir", str(twin), *SIZE]
    with ThreadPoolExecutor() as pool:
        uninterrupted = pool.submit(run_command, command, deadline_seconds=120)
        slow = make_dataset(tmp_path / "slow", wheel, slow=True)
        first, version = tmp_path / "first", tmp_path / "version"
        with kaggle_tree(first, {"library": slow}, quota_megabytes=3):
            python = make_python(tmp_path / "python1")
            notebook = run_notebook(first, python, {"MAX_TIME": "8s", "QUOTA": QUOTA, "ARGUMENTS": SIZE})
            save_version(first, version)
        assert list((tmp_path / "python1").glob("lib/*/site-packages/dist_train/__init__.py")), "not from the wheel"
        uninterrupted.result().require_success()

    status = status_of(version / "runs/price")
    assert (status["status"], status["exit_code"]) == ("time_limit", 0), text_of(notebook, "train")
    assert 0 < status["global_step"] < UPDATES
    said = text_of(notebook, "train")
    assert "Time limit: the session has run" in said
    assert "Training is not finished. To go on: save this version" in text_of(notebook, "result")
    assert f"time_limit at step {status['global_step']}" in text_of(notebook, "result")
    require_quiet(notebook)

    second = tmp_path / "second"
    attached = {"library": make_dataset(tmp_path / "fast", wheel), "price-notebook": version}
    with kaggle_tree(second, attached, quota_megabytes=3):
        python = make_python(tmp_path / "python2")
        notebook = run_notebook(second, python, {"MAX_TIME": "1h", "QUOTA": QUOTA, "ARGUMENTS": SIZE})
        kept = save_version(second, tmp_path / "kept")

    run_dir = kept / "runs/price"
    assert (status_of(run_dir)["status"], status_of(run_dir)["exit_code"]) == ("done", 0), text_of(notebook, "train")
    assert "Training is finished." in text_of(notebook, "result")
    require_quiet(notebook)
    (resumed,) = events(run_dir, "resumed")
    assert resumed["global_step"] == status["global_step"]
    assert resumed["path"].startswith(str(second / "input/price-notebook/runs/price/checkpoints/"))
    assert [event["event"] for event in events(run_dir)].count("failed") == 0
    assert events(run_dir, "committed")[-1]["global_step"] == UPDATES
    # Nothing was copied from the input: whatever lies in the working directory was saved after it.
    assert sequence_of_first_save(run_dir) == manifests_of(version / "runs/price")[-1]["sequence"] + 1
    assert_same_run(run_dir, twin)
    assert sum(file.stat().st_size for file in kept.rglob("*") if not file.is_symlink()) <= QUOTA
    assert manifests_of(run_dir)[-1]["settings"]["config"]["policy"]["max_bytes"] == QUOTA * 3 // 4
    require_packed(notebook, kept)


def sequence_of_first_save(run_dir: Path) -> int:
    """Most of them are pruned, the newest is not."""
    return int(manifests_of(run_dir)[-1]["sequence"]) - len(events(run_dir, "committed")) + 1


def test_a_best_model_of_an_earlier_session_is_found_where_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The metric is best after the second epoch; what the later sessions save does not beat it."""
    run = tmp_path / "working/price"
    first, second = tmp_path / "input/version-1/runs/price", tmp_path / "input/version-2/runs/price"
    run.parent.mkdir(parents=True)
    session = Session(root=tmp_path)
    assert session.find_best(run) is None  # it has not begun
    SmallRun(run_dir=first, epochs=2).train()
    SmallRun(run_dir=second, epochs=3, search=(str(first),)).train()
    SmallRun(run_dir=run, epochs=4, search=session.search).train()
    best = session.find_best(run)
    assert best is not None
    assert (best.run, best.better) == (first, None)
    packed = session.pack(run, "--best")
    assert packed is not None
    assert packed_checkpoints(packed) == ["step-00000010"]
    shutil.rmtree(first)  # no longer attached: of all that is left, the second session's is the best
    capsys.readouterr()
    best = session.find_best(run)
    assert best is not None
    assert (best.run, best.epochs_completed, best.better) == (second, 3, (2 / 7, 10))
    packed = session.pack(run, "--best")
    assert packed is not None
    assert packed_checkpoints(packed) == ["step-00000015"]
    said = capsys.readouterr().out
    assert "The best model (0.2857, step 10) is in no attached version; packing 0.4286 of epoch 3 instead." in said
    session.explain(run)
    assert "is in no attached version; the best that is here has 0.4286, after epoch 3." in capsys.readouterr().out
    poor = Session(root=tmp_path, quota_bytes=session.used_bytes + 1000)
    before = packed.read_bytes()
    assert poor.pack(run, "--latest") is None
    assert "was not written: it takes" in (said := capsys.readouterr().out)
    assert "Pack with --weights-only, or make room first" in said
    assert packed.read_bytes() == before


def require_packed(notebook: Any, kept: Path) -> None:
    """The best model is one zip, and the cell shows a link to it."""
    assert packed_checkpoints(kept / "price-best.zip") == [(kept / "runs/price/best").resolve().name]
    (cell,) = (one for one in notebook.cells if one.id == "pack")
    shown = "".join(str(output.get("data", {}).get("text/html", "")) for output in cell.outputs)
    assert "href='price-best.zip'" in shown


def packed_checkpoints(file: Path) -> list[str]:
    with zipfile.ZipFile(file) as inside:
        return sorted({Path(name).parent.name for name in inside.namelist() if Path(name).name == "manifest.json"})


def test_two_ranks_without_time_for_a_step_end_well_together(tmp_path: Path) -> None:
    command = torchrun(2, str(TRAIN), "--run-dir", str(tmp_path / "run"), "--max-time", "1h", *SIZE)
    long_ago = {"DIST_TRAIN_SESSION_START": str(time.time() - 3600)}
    ended = run_command(command, deadline_seconds=100, extra=long_ago).require_success()
    assert ended.output.count("There was no time for a single step") == 1
    status = status_of(tmp_path / "run")
    assert (status["status"], status["exit_code"], status["global_step"]) == ("time_limit", 0, 0)


def test_a_notebook_without_the_wheel_says_what_to_attach(tmp_path: Path) -> None:
    python = make_python(tmp_path / "python")
    alone = [str(python), "-I", "-c", "import torch, dist_train"]
    assert "No module named 'dist_train'" in run_command(alone, deadline_seconds=60).output
    refused = pytest.raises(Exception, match=r"Attach the dataset with the wheel: no dist_train-\*\.whl lies below")
    with kaggle_tree(tmp_path / "kaggle", {}, quota_megabytes=1) as root, refused:
        run_notebook(root, python, {})
