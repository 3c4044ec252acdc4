"""A Kaggle session: what it finds, what it starts, what it says. No process but a stand-in of nvidia-smi."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_train.cluster import kaggle
from dist_train.cluster.kaggle import Gpu, Session, find_gpus
from dist_train.errors import ConfigError

T4 = Gpu("Tesla T4", (7, 5))


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine of the tests has."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "CUDA_VISIBLE_DEVICES", kaggle.ROOT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "working").mkdir()
    (tmp_path / "input").mkdir()
    monkeypatch.setenv(kaggle.ROOT_VARIABLE, str(tmp_path))
    return tmp_path


class Started(list[tuple[list[str], dict[str, str], float]]):
    """Stands for `run_child`: notes the command, the environment and the time it was given."""

    code = 0

    def __call__(
        self,
        command: Sequence[str],
        say: Any,
        *,
        environment: Mapping[str, str],
        seconds: float = float("inf"),
    ) -> int:
        self.append((list(command), dict(environment), seconds))
        return self.code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(kaggle, "run_child", started)
    return started


def attach(root: Path, path: str) -> Path:
    file = root / "input" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    return file


def stand_in_for_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# Where it is


def test_elsewhere_than_on_kaggle_it_says_how_to_try_the_notebook(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"working is not there: this is no Kaggle session.*DIST_TRAIN_KAGGLE_ROOT"):
        Session(root=tmp_path)


def test_the_root_comes_from_the_call_then_the_environment_then_is_kaggles(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "working").mkdir(parents=True)
    assert Session().root == root
    assert Session(root=other).root == other
    assert kaggle.ROOT == "/kaggle"


def test_a_session_elsewhere_begins_with_the_kernel(root: Path) -> None:
    assert Session().started == psutil.Process().create_time()
    assert Session(started=5.0).started == 5.0


def test_a_session_on_kaggle_begins_with_the_container() -> None:
    container, own = psutil.Process(1).create_time(), psutil.Process().create_time()
    age = time.time() - container
    assert kaggle._session_start(True, age + 100.0) == container
    # A machine that is older than a session can be is no container of one.
    assert kaggle._session_start(True, max(age - 100.0, 0.0)) == own
    assert kaggle._session_start(False, age + 100.0) == own


def test_it_says_what_there_is(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(kaggle, "find_gpus", lambda: (T4, T4))
    (root / "working/file").write_bytes(bytes(2_000_000))
    attach(root, "wheels/x.whl")
    attach(root, "last-version/run.json")
    Session(started=time.time() - 3600, quota_bytes=10 * 10**9).describe()
    assert capsys.readouterr().out.splitlines() == [
        "Session:  Batch, 1 h 00 min old of 12 h 00 min",
        "Devices:  Tesla T4 (fp16: it has no bf16), Tesla T4 (fp16: it has no bf16)",
        f"Working:  {root}/working, 2.0 MB of 10.0 GB used",
        "Inputs:   last-version, wheels",
    ]


# GPUs


def test_gpus_are_as_nvidia_smi_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_nvidia_smi(tmp_path, monkeypatch, "Tesla T4, 7.5\nNVIDIA A100-SXM4-80GB, 8.0")
    assert find_gpus() == (T4, Gpu("NVIDIA A100-SXM4-80GB", (8, 0)))
    assert [gpu.has_bf16 for gpu in find_gpus()] == [False, True]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(find_gpus()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == ()


def test_a_gpu_whose_capability_is_not_told_has_no_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_nvidia_smi(tmp_path, monkeypatch, "Tesla K80, [N/A]")
    assert find_gpus() == (Gpu("Tesla K80", (0, 0)),)


@pytest.mark.parametrize("code", ["exit 9", "kill -9 $$"])
def test_a_driver_that_does_not_answer_means_no_gpu(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_nvidia_smi(tmp_path, monkeypatch, "")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{code}\n")
    assert find_gpus() == ()


# What is attached


def test_the_working_directory_comes_before_the_inputs(root: Path) -> None:
    session, attached = Session(), attach(root, "library/train.py")
    assert session.find("train.py") == attached
    (root / "working/train.py").write_text("")
    assert session.find("train.py") == root / "working/train.py"


def test_the_file_that_lies_highest_is_found(root: Path) -> None:
    deep, high = attach(root, "notebooks/me/price/train.py"), attach(root, "datasets/library/train.py")
    assert Session().find("train.py") == high
    high.unlink()
    assert Session().find("train.py") == deep


def test_two_files_of_one_name_are_named(root: Path) -> None:
    one, other = attach(root, "a/train.py"), attach(root, "b/train.py")
    with pytest.raises(ConfigError, match=r"train\.py lies at several places") as caught:
        Session().find("train.py")
    assert str(one) in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_file_that_is_nowhere_is_asked_for(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.py is neither in .*working nor .*Attach the dataset"):
        Session().find("train.py")


def test_earlier_outputs_are_searched_below_the_inputs(root: Path) -> None:
    assert Session().search == (f"{root}/input/*",)


# Training


def test_one_process_a_gpu_and_restarts_through_torchrun(
    root: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle, "find_gpus", lambda: (T4, T4))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = attach(root, "library/train.py")
    assert Session().train("train.py", "--epochs", 3) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    Session().train("train.py")
    assert [environment["OMP_NUM_THREADS"] for _, environment, _ in started] == ["1", "2"]
    options = ["--nproc-per-node=2", "--max-restarts=3", str(script), "--epochs", "3"]
    assert started[0][0] == [*launcher, *options]


def test_a_single_process_without_restarts_needs_no_launcher(root: Path, started: Started) -> None:
    script = attach(root, "library/train.py")
    Session().train(str(script), restarts=0)
    assert started[0][0] == [sys.executable, str(script)]


def test_the_training_knows_when_the_session_began_and_may_not_outlast_it(
    root: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    began = time.time() - 1000
    attach(root, "library/train.py")
    Session(started=began).train("train.py")
    _, environment, seconds = started[0]
    assert environment["DIST_TRAIN_SESSION_START"] == str(began)
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert "MPLBACKEND" not in environment
    left = 12 * 3600 - 1000 - kaggle.LAST_SECONDS
    assert seconds == pytest.approx(left, abs=5)


def test_a_training_that_fails_is_told_and_not_raised(
    root: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    started.code = 1
    attach(root, "library/train.py")
    assert Session().train("train.py") == 1
    assert "Training ended with exit code 1; the cause stands above." in capsys.readouterr().out


# What to do next


@pytest.mark.parametrize(
    ("status", "exit_code", "error", "expected"),
    [
        ("done", 0, "", "done at step 7, 2 epochs done. Training is finished."),
        ("early_stopped", 0, "", "Training is finished."),
        ("time_limit", 0, "", "Training is not finished. To go on: save this version, attach its output"),
        ("running", None, "", "It was stopped from outside. To go on"),
        ("error", 1, "ValueError: no", "ValueError: no To go on"),
    ],
)
def test_the_status_is_explained(
    status: str,
    exit_code: int | None,
    error: str,
    expected: str,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = {"status": status, "exit_code": exit_code, "error": error, "global_step": 7, "epochs_completed": 2}
    (root / "run").mkdir()
    (root / "run/status.json").write_text(json.dumps(said))
    session = Session()
    monkeypatch.setattr(session, "find_best", lambda run: root / "input/earlier" if status == "done" else Path(run))
    assert session.status(root / "run") == said
    session.explain(root / "run")
    said_all = capsys.readouterr().out
    assert expected in said_all
    assert ("The best model so far lies in" in said_all) == (status == "done")


def test_a_run_that_has_not_begun_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Session().explain(root / "run")
    assert "has not begun" in capsys.readouterr().out


def test_pack_writes_into_the_working_directory(
    root: Path, started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    target = root / "working/price-best-weights-only.zip"
    session = Session()
    monkeypatch.setattr(session, "find_best", Path)
    assert session.pack("runs/price", "--best", "--weights-only") is None  # nothing was written
    target.write_bytes(bytes(3000))
    assert session.pack("runs/price", "--best", "--weights-only") == target
    cli = [sys.executable, "-m", "dist_train.cli"]
    assert started[0][0] == [*cli, "pack", "runs/price", "--best", "--weights-only", "--force", "--to", str(target)]
    started.code = 1
    assert session.pack("runs/price", "--best", "--weights-only") is None
    session.link(None)
    session.link(target)
    assert capsys.readouterr().out.splitlines()[-2:] == ["There is nothing to link to.", f"{target} (3.0 kB)"]
