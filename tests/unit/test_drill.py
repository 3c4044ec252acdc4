"""The parts of a drill that need no process: its faults, its digests, what it says, what it refuses."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import cli
from dist_train.checkpoint.policy import DEFAULT_POLICY, CheckpointPolicy
from dist_train.drill.arrival import when_imported
from dist_train.drill.diagnosis import AUGMENTATION, KERNEL, ORDER, OUTSIDE, RATE, SEED
from dist_train.drill.digests import digest_of, digests_of_generators, digests_of_models, surroundings
from dist_train.drill.faults import KINDS, MOMENTS, Fired
from dist_train.drill.records import Life, read_records, shown_names
from dist_train.drill.rehearsal import Rehearsal, read_places
from dist_train.drill.rehearse import Drill, Order, Outcome, touched_directories
from dist_train.drill.report import _table, lines_of, restarts_of
from dist_train.drill.scenario import Course, plan_faults
from dist_train.drill.twins import differences_of_runs
from dist_train.drill.untouched import changed, listing
from dist_train.drill.uses import mentions_dist_train
from dist_train.options import RunOptions
from tests.support.launch import ROOT
from tests.support.small_run import SmallRun

CAUSES = (SEED, ORDER, AUGMENTATION, RATE, KERNEL, OUTSIDE, "evaluation")
COURSE = Course(last_step=40, save_every=4, saves_within_epochs=(4, 8, 12, 24, 28))


# Which faults


@pytest.mark.parametrize("seed", range(20))
def test_one_kill_always_makes_the_run_go_on_from_within_an_epoch(tmp_path: Path, seed: int) -> None:
    for count in (1, 2, 6, 9):
        plan = plan_faults(tmp_path, count=count, seed=seed, course=COURSE)
        within = [
            fault
            for fault in plan.faults
            if fault.at_phase in ("after_commit", "retention") and fault.at_step in COURSE.saves_within_epochs
        ]
        assert within
        assert len(plan.faults) == count


def test_the_first_faults_are_one_of_each_kind_and_the_seed_decides(tmp_path: Path) -> None:
    plan = plan_faults(tmp_path, count=6, seed=1, course=COURSE)
    kinds = sorted(fault.kind for fault in plan.faults)
    assert kinds == ["corrupt_newest", "fail_io", "kill", "kill", "stop", "terminate"]
    assert plan.faults == plan_faults(tmp_path, count=6, seed=1, course=COURSE).faults
    assert plan.faults != plan_faults(tmp_path, count=6, seed=2, course=COURSE).faults
    assert plan.in_order


def test_a_run_too_short_for_two_checkpoints_is_spared_the_corrupted_one(tmp_path: Path) -> None:
    course = Course(last_step=6, save_every=4, saves_within_epochs=())
    plan = plan_faults(tmp_path, count=8, seed=0, course=course)
    assert all(fault.kind != "corrupt_newest" and fault.at_step <= 6 for fault in plan.faults)


# Digests


def test_a_digest_tells_every_bit_shape_and_dtype_apart() -> None:
    values = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(2, 3, dtype=torch.float64),
        -torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.bfloat16),
        np.zeros((2, 3)),
        {"x": torch.zeros(2, 3)},
        [torch.zeros(2, 3)],
        [1, "a"],
        [1, "b"],
        {"b", "a"},
    ]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of(torch.arange(6).reshape(2, 3).T) == digest_of(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert digest_of({"x": [1.5, None]}) == digest_of({"x": [1.5, None]})


def test_the_random_generators_are_looked_at_and_left_alone() -> None:
    before = digests_of_generators()
    assert before == digests_of_generators()
    draws = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(1)}
    for name, draw in draws.items():
        draw()
        now = digests_of_generators()
        assert [one for one in now if now[one] != before[one]] == [name]
        before = now


def test_weights_have_the_names_of_the_plain_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wrapped = nn.Module()
    wrapped.module = model
    assert list(digests_of_models({"": wrapped})) == list(digests_of_models({"": model}))
    assert "1.running_mean" in digests_of_models({"": model})
    assert "critic.0.weight" in digests_of_models({"critic": model})


class Average:
    def __init__(self) -> None:
        self.value = 0.5
        self.history = [1.0, 2.0]


def test_variables_of_the_script_are_seen_but_for_what_a_checkpoint_holds() -> None:
    count, average, known, ema = 3, Average(), nn.Linear(2, 2), nn.Linear(2, 2)
    found = surroundings([known])
    assert (found["count"], found["average.value"], found["average.history"]) == ("3", "0.5", "[1.0, 2.0]")
    assert found["ema"].startswith("Linear ")
    assert "known" not in found
    assert count == 3
    assert average.value
    assert ema is not known


# The user's directories


def test_a_directory_is_known_again_by_every_byte_name_and_time(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert listing(run_dir) == {}
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "a").write_bytes(b"1")
    before = listing(run_dir)
    assert list(before) == ["checkpoints/a"]
    assert changed(before, listing(run_dir)) == []
    facts = os.stat(run_dir / "checkpoints" / "a")
    (run_dir / "checkpoints" / "a").write_bytes(b"2")
    os.utime(run_dir / "checkpoints" / "a", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (run_dir / "b").write_bytes(b"")
    assert changed(before, listing(run_dir)) == changed(listing(run_dir), before) == ["b", "checkpoints/a"]


def test_where_the_drills_own_output_goes_is_known(tmp_path: Path) -> None:
    program = "from dist_train.drill.untouched import is_own_output as own; print([own(one) for one in 'abc'])"
    (tmp_path / "b").touch()
    with (tmp_path / "a").open("w") as file:
        subprocess.run(
            [sys.executable, "-c", program], stdout=file, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=60, check=True,
        )  # fmt: skip
    assert (tmp_path / "a").read_text() == "[True, False, False]\n"


def test_what_was_written_past_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    rehearsal = Rehearsal(folder=str(tmp_path / "scratch"), max_steps=5, save_every=1, log_every=1)
    (tmp_path / "scratch").mkdir()
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        rehearsal.redirect(tmp_path / name)
    assert touched_directories(tmp_path / "scratch") == {}
    (tmp_path / "x" / "mine.log").write_text("past the Run")
    touched = touched_directories(tmp_path / "scratch")
    assert touched == {str(tmp_path / "x"): ["mine.log"]}
    outcome = Outcome(
        verdict="unsafe", reason="so.", touched=touched, places=[str(tmp_path / "x"), str(tmp_path / "y")],
        changed=["x/mine.log"],
    )  # fmt: skip
    lines = "\n".join(lines_of(Order(script=["train.py"]), outcome))
    assert "CANNOT BE DRILLED SAFELY  train.py" in lines
    assert f"{tmp_path / 'x'}: CHANGED, not by a Run." in lines
    assert f"{tmp_path / 'y'}: untouched." in lines
    assert "Changed meanwhile below this directory: x/mine.log." in lines


def test_run_directories_are_redirected_once_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    rehearsal = Rehearsal(folder=str(tmp_path), max_steps=5, save_every=1, log_every=1)
    first, second = rehearsal.redirect("a/runs/x"), rehearsal.redirect("b/runs/x")
    assert first != second
    assert rehearsal.redirect(first) == first == rehearsal.redirect(os.path.abspath("a/runs/x"))
    assert [place["original"] for place in read_places(tmp_path)] == [os.path.abspath(f"{one}/runs/x") for one in "ab"]
    assert Rehearsal.from_environment(rehearsal.environment()) == rehearsal


@pytest.mark.parametrize(
    ("policy", "with_loader", "every_steps"),
    [
        (CheckpointPolicy(every_epochs=1), False, None),
        (CheckpointPolicy(every_epochs=1), True, 2),
        (CheckpointPolicy(every_epochs=1, every="10min"), False, 2),
        (CheckpointPolicy(every_steps=1), False, 1),
        (None, False, 2),
    ],
)
def test_a_rehearsal_saves_within_epochs_where_the_script_may(
    tmp_path: Path, policy: CheckpointPolicy | None, with_loader: bool, every_steps: int | None
) -> None:
    made: dict[str, Any] = {}

    class Made:
        def __init__(self, run_dir: str, **given: Any) -> None:
            made.update(given, run_dir=run_dir)

    module = ModuleType("a_stand_in")
    module.Run, module.DEFAULT_POLICY, module.RunOptions = Made, DEFAULT_POLICY, RunOptions  # type: ignore[attr-defined]
    Rehearsal(folder=str(tmp_path), max_steps=5, save_every=2, log_every=1)._wrap_run(module)
    loader = {"loader": object()} if with_loader else {}
    Made("runs/x", policy=policy, options=RunOptions(max_time="1h", max_steps=3), resume="must", **loader)
    assert made["policy"].every_steps == every_steps
    assert (made["options"].max_steps, made["options"].max_time, made["resume"]) == (3, None, "auto")
    assert Path(made["run_dir"]).parent == tmp_path / "runs"


# What it reads


def test_torn_lines_of_records_are_left_out(tmp_path: Path) -> None:
    place = tmp_path / "records" / "run"
    place.mkdir(parents=True)
    (place / "a000002-r1.jsonl").write_text('{"kind": "begin", "step": 3}\n{"kind": "step", "step": 4}\n{"kind": "st')
    (life,) = read_records(tmp_path)["run"]
    assert (life.attempt, life.rank, life.began_at, list(life.steps)) == (2, 1, 3, [4])


def test_a_restart_is_measured_from_the_fault_to_the_next_lifes_first_step(tmp_path: Path) -> None:
    place = tmp_path / "records" / "run"
    place.mkdir(parents=True)
    for attempt, at in ((1, 10), (2, 20)):
        begin = f'{{"kind": "begin", "step": {attempt * 3 - 3}, "at": {at}}}\n'
        (place / f"a00000{attempt}-r0.jsonl").write_text(begin + f'{{"kind": "step", "step": 4, "at": {at + 2}}}\n')
    usual: dict[str, Any] = {"number": 0, "rank": 0, "attempt": 1, "global_step": 5, "phase": "step_done"}
    fired = [Fired(**usual, kind="fail_io", at=11.0), Fired(**usual, kind="kill", at=15.0)]
    went_on, restarted = restarts_of(fired, read_records(tmp_path))
    assert (went_on.back_at, went_on.seconds, went_on.lost) == (None, None, 0)
    assert (restarted.back_at, restarted.seconds, restarted.lost) == (3, 7.0, 2)


def test_a_restart_goes_on_in_the_run_that_the_fault_met() -> None:
    def life(attempt: int, began_at: int, at: float) -> Life:
        return Life(
            attempt, 0, {"step": began_at, "at": at}, {began_at + 1: {"at": at + 1}, began_at + 2: {"at": at + 2}}
        )

    records = {"a-0a1b2c": [life(1, 0, 10), life(2, 2, 20)], "b-3d4e5f": [life(1, 0, 30), life(2, 1, 40)]}
    usual: dict[str, Any] = {"number": 0, "kind": "kill", "rank": 0, "attempt": 1, "global_step": 2, "phase": "step"}
    fired = [Fired(**usual, at=at) for at in (5.0, 13.0, 23.0, 33.0)]
    found = restarts_of(fired, records)
    assert [one.run for one in found] == ["", "a-0a1b2c", "a-0a1b2c", "b-3d4e5f"]
    assert [one.back_at for one in found] == [0, 2, None, 1]
    rows = list(_table(found, shown_names(records)))
    assert rows[0].split()[:3] == ["fault", "run", "step"]
    assert rows[4].split()[:3] == ["SIGKILL", "b", "2"]
    assert "step 1" in rows[4]
    assert "run" not in next(iter(_table(found[:1], {"a-0a1b2c": "a"}))).split()


def test_what_differs_of_two_runs_is_named_with_the_weights_first(tmp_path: Path) -> None:
    for name, rate in (("one", 0.05), ("same", 0.05), ("other", 0.06)):
        SmallRun(run_dir=tmp_path / name, epochs=1, lr=rate).train()
    same, compared = differences_of_runs(tmp_path / "one", tmp_path / "same")
    assert same == []
    assert compared > 10
    found, _ = differences_of_runs(tmp_path / "one", tmp_path / "other")
    assert found[0].startswith("model/")
    assert any(line.startswith("the metrics of step 1: ") for line in found)
    assert "state differs" in found


def test_generators_that_nobody_seeds_may_be_left_out_of_a_comparison(tmp_path: Path) -> None:
    for name in ("one", "other"):
        SmallRun(run_dir=tmp_path / name, epochs=1, at_epoch=lambda run, name=name: random.seed(name)).train()
    runs = tmp_path / "one", tmp_path / "other"
    assert differences_of_runs(*runs)[0] == ["rank_state differs"]
    assert differences_of_runs(*runs, unseeded=["python"])[0] == []
    assert differences_of_runs(*runs, unseeded=["numpy"])[0] == ["rank_state differs"]


# What it refuses


@pytest.mark.parametrize(
    ("script", "beside", "uses"),
    [
        ("import torch", "", False),
        ("import dist_train as dt", "", True),
        ("from helper import train", "from dist_train import Run", True),
        ("from helper import train", "import torch", False),
        ("def broken(:", "", True),
    ],
)
def test_whether_a_script_uses_dist_train_is_seen_without_running_it(
    tmp_path: Path, script: str, beside: str, uses: bool
) -> None:
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "helper.py").write_text(beside)
    assert mentions_dist_train(tmp_path / "script.py") is uses


def test_a_script_without_dist_train_is_given_the_lines_to_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise AssertionError('it must not be run')")
    assert cli.main(["drill", "--", "train.py"]) == 2
    said = capsys.readouterr().out
    assert "CANNOT BE DRILLED  train.py: train.py does not use dist_train" in said
    assert "for batch in run.batches(loader):" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


@pytest.mark.parametrize("arguments", [["drill"], ["drill", "--", "nowhere.py"]])
def test_a_script_that_is_not_there_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "write `dist-train drill -- train.py ARGS`" in capsys.readouterr().err


def test_a_scratch_that_is_missing_is_made_and_one_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("import torch")
    assert cli.main(["drill", "--scratch", "a/b", "--keep", "--", "train.py"]) == 2
    (made,) = (tmp_path / "a" / "b").iterdir()
    assert f"Kept: {made}" in capsys.readouterr().out
    assert cli.main(["drill", "--scratch", "train.py/b", "--", "train.py"]) == 2
    assert "scratch folder cannot be made in train.py/b: Not a directory." in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_drill_and_takes_its_scratch_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def conduct(drill: Drill) -> Outcome:
        assert len(list((tmp_path / "scratch").iterdir())) == 1
        os.kill(os.getpid(), number)
        raise AssertionError("the signal must end it")

    def former(number: int, frame: object) -> None:
        raise AssertionError("the drill's own handler must be asked")

    monkeypatch.setattr(Drill, "conduct", conduct)
    before = signal.signal(number, former)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["drill", "--scratch", str(tmp_path / "scratch"), "--", __file__])
        assert signal.getsignal(number) is former
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_module_is_told_of_when_it_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_module_of_this_test.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    when_imported("a_module_of_this_test", lambda module: seen.append(module.value))
    assert seen == []
    import a_module_of_this_test  # noqa: F401

    assert seen == [1]
    when_imported("a_module_of_this_test", lambda module: seen.append(2))
    assert seen == [1, 2]


def test_the_page_names_every_option_and_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "drill.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["drill", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("examples:")[0])) - {"--help", "--"}
    assert options == set(re.findall(r"`(--[a-z-]+)", page.split("## Options")[1].split("## What")[0]))
    # `terminate_launcher` is for the tests of launchers.
    faults = {name for name in KINDS if name != "terminate_launcher"}
    assert faults <= set(re.findall(r"`([a-z_]+)[`(]", page.split("## Faults in your own tests")[1]))
    phases = set(re.findall(r"`([a-z_]+)`", page.split("`at_phase` is one of")[1].split(". A fault comes")[0]))
    assert phases <= set(MOMENTS)
    assert {cause for cause in CAUSES if f"| {cause} |" not in page} == set()
