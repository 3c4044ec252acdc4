"""`show --plot`: what is in the picture, and what is said where there can be none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Store
from dist_train.cli import main
from dist_train.commands.plot import Curves, _Picture, read_curves, write_plot
from dist_train.errors import ConfigError, StorageError
from dist_train.history import read_metrics
from tests.support.launch import ROOT
from tests.support.small_run import SmallRun

POLICY = CheckpointPolicy(every_steps=2, every_epochs=1, monitor="val", keep_last=20)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three attempts, of which the last two began at steps 4 and 8; then a branch from step 10."""
    folder = tmp_path_factory.mktemp("plotted") / "ultra"
    for stop in (4, 8, 15):
        SmallRun(run_dir=folder, policy=POLICY, max_steps=stop).train()
    SmallRun(run_dir=folder, policy=POLICY, resume="epoch:2", lr=0.01).train()
    return folder


def drawn(*curves: Curves, log_scale: bool = False) -> Any:
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    _Picture(figure, curves, log_scale=log_scale).draw()
    return figure


def lines(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def test_the_curves_are_the_history_with_its_restarts_and_branches(run_dir: Path) -> None:
    curves = read_curves(Store(run_dir))
    history = read_metrics(run_dir)
    steps = [record for record in history if record["kind"] == "step"]
    epochs = [record for record in history if record["kind"] == "epoch"]
    assert curves.loss == (list(range(1, 16)), [record["loss"] for record in steps])
    assert curves.rate[1] == [record["lr"] for record in steps]
    assert curves.metrics == {"val": ([5, 10, 15], [record["val"] for record in epochs])}
    assert (curves.restarts, curves.branches) == ([4, 8], [10])
    assert curves.best is not None
    assert (curves.best.global_step, curves.best.epochs_completed) == (10, 2)


def test_the_picture_has_a_panel_for_losses_each_metric_and_the_learning_rate(run_dir: Path) -> None:
    curves = read_curves(Store(run_dir))
    loss, metric, rate = drawn(curves).axes
    assert [axis.get_ylabel() for axis in (loss, metric, rate)] == ["loss", "Val", "learning rate"]
    assert lines(loss)["training"] == curves.loss
    assert lines(loss)["training, mean of epoch"] == curves.train_loss
    assert lines(metric)["Val"] == curves.metrics["val"]
    assert lines(rate)["learning rate"] == curves.rate
    for axis in (loss, metric, rate):
        marks = [line.get_xdata()[0] for line in axis.get_lines() if list(line.get_ydata()) == [0, 1]]
        assert marks == [4, 8, 10]
    assert [text.get_text() for text in metric.texts] == ["best 0.2857, epoch 2"]
    assert loss.get_title(loc="right") == "15 steps, 3 epochs, 2 restarts, 1 branch"


def test_losses_share_the_first_panel_whose_scale_is_logarithmic_on_request(run_dir: Path) -> None:
    curves = read_curves(Store(run_dir))
    renamed = Curves(
        **{name: getattr(curves, name) for name in curves.__slots__} | {"metrics": {"val_loss": ([5], [1.0])}}
    )
    loss, rate = drawn(renamed, log_scale=True).axes
    assert "Val Loss" in lines(loss)
    assert (loss.get_yscale(), rate.get_yscale()) == ("log", "linear")


def test_several_runs_are_drawn_over_each_other(run_dir: Path, tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path / "other", policy=POLICY, epochs=1).train()
    figure = drawn(read_curves(Store(run_dir)), read_curves(Store(tmp_path / "other")))
    assert {"ultra: training", "other: training"} <= set(lines(figure.axes[0]))


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = SmallRun(run_dir=tmp_path / "run", policy=POLICY, epochs=1, metrics=lambda run: {"val": math.inf}).train()
    assert run.exit_code == 0
    (value,) = read_curves(Store(tmp_path / "run")).metrics["val"][1]
    assert math.isnan(value)
    write_plot([Store(tmp_path / "run")], str(tmp_path / "a.png"))


def test_show_writes_the_picture_and_changes_nothing_in_the_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(run_dir.rglob("*"))
    assert main(["show", str(run_dir), "--plot"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Plot written: ultra.png"
    assert (tmp_path / "ultra.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", str(run_dir), "--plot", "b.svg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plot"] == "b.svg"
    assert sorted(run_dir.rglob("*")) == before


def test_a_picture_that_cannot_be_is_explained_in_one_paragraph(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(run_dir), "--plot", str(tmp_path / "a.doc")]) == 1
    assert "the name must end in one of" in capsys.readouterr().err
    assert main(["show", str(run_dir), "--plot", str(tmp_path / "no" / "a.png")]) == 1
    assert "a.png cannot be written: No such file or directory. Give another file." in capsys.readouterr().err
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"holds no metrics\.jsonl"):
        write_plot([Store(tmp_path / "empty")], str(tmp_path / "a.png"))
    with pytest.raises(ConfigError, match="must end in one of"):
        write_plot([Store(run_dir)], str(tmp_path / "noending"))


def test_without_matplotlib_the_other_way_to_the_numbers_is_named(run_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; from dist_train.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "show", str(run_dir)]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert plain.returncode == 0
    plotted = subprocess.run([*command, "--plot"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert plotted.returncode == 1
    assert "A plot needs matplotlib, which is not installed" in plotted.stderr
    assert "pip install 'dist-train[plot]'" in plotted.stderr
