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
from dist_train.cluster.best_model import BestModel
from dist_train.cluster.gpus import Gpu, find_gpus
from dist_train.cluster.kaggle import Session
from dist_train.errors import ConfigError, DistTrainError

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
    said: Sequence[str] = ()
    saves: Path | None = None
    """Each start leaves one more checkpoint there."""

    def __call__(
        self,
        command: Sequence[str],
        say: Any,
        *,
        environment: Mapping[str, str],
        seconds: float = float("inf"),
    ) -> int:
        self.append((list(command), dict(environment), seconds))
        for line in self.said:
            say(line)
        if self.saves:
            (self.saves / f"step-{len(self):08}").mkdir(parents=True)
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


def test_one_process_a_gpu_through_torchrun(root: Path, started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaggle, "find_gpus", lambda: (T4, T4))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = attach(root, "library/train.py")
    assert Session().train("train.py", "--epochs", 3) == 0
    launcher = [sys.executable, "-m", "dist_train.cluster.launcher"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    Session().train("train.py")
    assert [environment["OMP_NUM_THREADS"] for _, environment, _ in started] == ["1", "2"]
    options = ["--nproc-per-node=2", str(script), "--epochs", "3"]
    assert started[0][0] == [*launcher, *options]


def test_a_single_process_needs_no_launcher(root: Path, started: Started) -> None:
    script = attach(root, "library/train.py")
    Session().train(str(script))
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
    session = Session()
    session.finish()  # nothing has failed yet
    assert session.train("train.py") == 1
    assert "Training ended with exit code 1; the cause stands above." in capsys.readouterr().out
    with pytest.raises(DistTrainError, match=r"exit code 1.*What it saved is whole and in this version's output"):
        session.finish()
    for started.code in (0, 130):
        session.train("train.py")
        session.finish()


def test_the_cause_is_told_at_the_end_and_a_mistake_in_the_settings_is_not_tried_again(
    root: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    started.code = 1
    started.said = [
        "[rank0]:   raise ConfigError(",
        "[rank0]: dist_train.errors.ConfigError: no such thing.",
        "",
        "W0101",
    ]
    attach(root, "library/train.py")
    session = Session()
    session.train("train.py", "--run-dir", str(root / "run"))
    assert len(started) == 1
    told = "Training ended with exit code 1: ConfigError: no such thing."
    assert capsys.readouterr().out.splitlines()[-1] == f"{told} What it saved is whole."
    session.explain(root / "run")
    assert capsys.readouterr().out == f"{root}/run has not begun: ConfigError: no such thing.\n"
    with pytest.raises(DistTrainError, match=told):
        session.finish()
    (root / "run").mkdir()
    old = {"status": "interrupted", "exit_code": 130, "error": "", "global_step": 7, "epochs_completed": 2}
    (root / "run/status.json").write_text(json.dumps(old))
    session.explain(root / "run")
    assert f"{told} Correct that and run the training cell again." in capsys.readouterr().out


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (137, 3), (130, 1), (93, 1)])
def test_what_crashed_after_a_save_is_started_again(
    code: int, starts: int, root: Path, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    started.code = code
    started.saves = root / "run/checkpoints"
    attach(root, "library/train.py")
    assert Session().train("train.py", f"--run-dir={root}/run", restarts=2) == code
    assert len(started) == starts
    assert ("(restart 2 of 2)" in capsys.readouterr().out) == (starts == 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_time": "11,5h"}, "'11,5h' is not a duration"),
        ({"max_time": "0s"}, "at most the session's 12 h"),
        ({"max_time": "13h"}, "at most the session's 12 h"),
        ({"quota_bytes": "twenty"}, "'twenty' is not a size"),
        ({"quota_bytes": 0}, "The quota is 0 bytes"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_started(
    settings: dict[str, Any], expected: str, root: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        Session(**settings)
    assert Session(quota_bytes="18GB", max_time="11h30m").quota_bytes == 18 * 10**9


@pytest.mark.parametrize(
    ("processes", "expected"), [(0, "whole number"), ("2", "whole number"), (3, "there are 2 GPUs")]
)
def test_a_number_of_processes_that_cannot_be_is_refused(
    processes: Any, expected: str, root: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle, "find_gpus", lambda: (T4, T4))
    attach(root, "library/train.py")
    with pytest.raises(ConfigError, match=f"processes is .*{expected}"):
        Session().train("train.py", processes=processes)
    assert not started


# What to do next


@pytest.mark.parametrize(
    ("status", "exit_code", "error", "expected"),
    [
        ("done", 0, "", "done at step 7, 2 epochs done. Training is finished."),
        ("early_stopped", 0, "", "Training is finished."),
        ("time_limit", 0, "", "Training is not finished. To go on: save this version, attach its output"),
        ("preempted", 75, "", "Training is not finished. To go on: save this version, attach its output"),
        ("running", None, "", "It was stopped from outside. To go on"),
        ("error", 1, "ValueError: no", "ValueError: no To go on"),
        ("interrupted", 130, "KeyboardInterrupt", "To go on: run the training cell again; in a new session, save this"),
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
    better = (9.26, 948) if status == "time_limit" else None
    place = root / ("input/earlier" if status == "done" else "run")
    best = BestModel(run=place, monitor="val_smape", value=9.99, epochs_completed=13, better=better)
    monkeypatch.setattr(session, "find_best", lambda run: best)
    assert session.status(root / "run") == said
    session.explain(root / "run")
    said_all = capsys.readouterr().out
    assert expected in said_all
    assert "KeyboardInterrupt" not in said_all
    assert ("The best model so far lies in" in said_all) == (status == "done")
    missing = (
        "The best model (9.26%, step 948) is in no attached version; the best that is here has 9.99%, after epoch 13. "
        "Attach the version that holds it."
    )
    assert (missing in said_all) == (status == "time_limit")


def test_a_run_that_has_not_begun_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Session().explain(root / "run")
    assert "has not begun" in capsys.readouterr().out


def test_pack_writes_into_the_working_directory(
    root: Path, started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    target = root / "working/price-best-weights-only.zip"
    session = Session()
    monkeypatch.setattr(session, "find_best", lambda run: None)
    assert session.pack("runs/price", "--best", "--weights-only") is None  # nothing was written
    target.write_bytes(bytes(3000))
    assert session.pack("runs/price", "--best", "--weights-only") == target
    cli = [sys.executable, "-m", "dist_train.cli"]
    room = ["--max-bytes", "20000000000"]
    packed = ["pack", "runs/price", "--best", "--weights-only", "--force", *room, "--to", str(target)]
    assert started[0][0] == [*cli, *packed]
    assert "19999997000" in started[1][0]
    best = BestModel(run=root / "other", monitor="val_smape", value=9.99, epochs_completed=13, better=(9.26, 948))
    monkeypatch.setattr(session, "find_best", lambda run: best)
    session.pack("runs/price", "--best")
    assert str(root / "other") in started[-1][0]
    said = capsys.readouterr().out
    assert said.endswith(f"Working:  {'3.0 kB'} of 20.0 GB used\n")
    assert "(9.26%, step 948) is in no attached version; packing 9.99% of epoch 13 instead. Attach the version" in said
    started.code = 1
    assert session.pack("runs/price", "--best", "--weights-only") is None
    session.link(None)
    session.link(target)
    assert capsys.readouterr().out.splitlines()[-2:] == ["There is nothing to link to.", f"{target} (3.0 kB)"]
