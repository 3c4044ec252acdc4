"""Settings of the data, the policy and the loop that change between two starts, and checkpoints made without a part:
what happens, what is shown, what is recorded.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.optim.lr_scheduler import CosineAnnealingLR

import dist_train as dt
from dist_train.checkpoint.manifest import Manifest
from dist_train.differences import compare_config
from dist_train.tree import encode, shown
from tests.support.small_run import (
    AT_THE_END,
    EACH_EPOCH,
    NUM_SAMPLES,
    Numbered,
    SmallRun,
    StandIn,
    events_of,
    manifests_of,
    small_model,
    small_optimizer,
    smooth_model,
    squared_error,
)

EACH_STEP = dt.CheckpointPolicy(every_steps=1, keep_last=50)


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state in singletons; each test begins and leaves without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def changes_of(run_dir: Path) -> dict[str, Any]:
    """Of the last resume."""
    changes: dict[str, Any] = events_of(run_dir, "resumed")[-1]["changes"]
    return changes


# Data


@pytest.mark.parametrize(
    ("then", "today", "updates"),
    [
        pytest.param((4, None), (6, None), 2, id="a larger batch"),
        pytest.param((4, None), (3, None), 4, id="a smaller batch"),
        pytest.param((4, 4), (4, 1), 3, id="more accumulation"),
        pytest.param((4, 1), (8, 4), 2, id="both"),
    ],
)
def test_another_batch_in_mid_epoch_uses_each_sample_once(
    then: tuple[int, int | None], today: tuple[int, int | None], updates: int, tmp_path: Path
) -> None:
    """The position in an epoch is a number of samples: eight of twenty are used."""

    def life(sizes: tuple[int, int | None], **options: Any) -> SmallRun:
        batches = {"global_batch_size": sizes[0], "micro_batch_size": sizes[1], "model": smooth_model()}
        loop = SmallRun(run_dir=tmp_path, policy=AT_THE_END, accelerator=StandIn(), **batches, **options)
        loop.train()
        return loop

    first, second = life(then, max_steps=2), life(today, epochs=1)
    used = Counter(index for _, indices in [*first.used, *second.used] for index in indices)
    assert used == dict.fromkeys(range(NUM_SAMPLES), 1)
    assert second.run is not None
    assert second.run.global_step == 2 + updates
    changes = changes_of(tmp_path)
    if then[0] != today[0]:
        assert changes["data.global_batch_size"] == [then[0], today[0]]
    steps = [batch // (micro or batch) for batch, micro in (then, today)]
    if steps[0] != steps[1]:
        assert changes["data.accumulation_steps"] == steps
    if then[1]:
        assert changes["data.micro_batch_size"] == [then[1], today[1]]


def test_data_that_has_become_shorter_than_the_position_ends_the_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=tmp_path, policy=AT_THE_END, max_steps=4).train()
    capsys.readouterr()
    second = SmallRun(run_dir=tmp_path, num_samples=12, epochs=2)
    run = second.train()
    said = capsys.readouterr()
    assert "16 samples of epoch 1 were used, and the data has 12 now: that epoch counts as complete." in said.out
    assert "this epoch mixes two orders" in said.err
    assert second.evaluated == [0, 1]
    assert Counter(index for _, indices in second.used for index in indices) == dict.fromkeys(range(12), 1)
    assert (run.epochs_completed, run.global_step) == (2, 4 + 3)
    assert changes_of(tmp_path)["data.num_samples"] == [20, 12]


def test_a_position_just_at_the_new_end_is_evaluated_and_not_trained(tmp_path: Path) -> None:
    SmallRun(run_dir=tmp_path, policy=AT_THE_END, max_steps=3).train()
    second = SmallRun(run_dir=tmp_path, num_samples=12, epochs=1)
    second.train()
    assert (second.used, second.evaluated) == ([], [0])


# Epochs, policy, the user's own


def test_more_epochs_and_another_policy_are_shown_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=tmp_path, epochs=2).train()
    capsys.readouterr()
    policy = replace(EACH_EPOCH, keep_last=5, monitor="val")
    run = SmallRun(run_dir=tmp_path, epochs=3, policy=policy, lr=0.1).train()
    assert run.epochs_completed == 3
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Settings changed since the checkpoint:")
    table = [line.split() for line in lines[start + 1 : start + 7]]
    assert table == [
        ["setting", "was", "now"],
        ["optimizer[0].lr", "0.05", "0.1"],
        ["optimizer[0].current_lr", "0.00625", "0.0125"],
        ["epochs", "2", "3"],
        ["policy.keep_last", "3", "5"],
        ["policy.monitor", "none", "val"],
    ]
    columns = {
        line.index(word) for line, word in zip(lines[start + 1 : start + 4], ("was", "0.05", "0.00625"), strict=True)
    }
    assert len(columns) == 1
    assert changes_of(tmp_path)["epochs"] == [2, 3]
    assert len([line for line in lines if line.startswith("Settings changed")]) == 1


def test_the_same_command_shows_no_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SmallRun(run_dir=tmp_path, max_steps=2).train()
    SmallRun(run_dir=tmp_path).train()
    assert changes_of(tmp_path) == {}
    assert events_of(tmp_path, "resumed")[-1]["notes"] == []
    assert "Settings changed" not in capsys.readouterr().out


def test_settings_of_the_user_s_own_are_compared() -> None:
    then = {"user": {"width": 3, "gone": 1, "seed": 1, "epochs": 20}, "data": {"seed": 1}}
    today = {"user": {"width": 4, "new": 1, "seed": 2, "epochs": 25}, "data": {"seed": 2}, "epochs": 25}
    assert compare_config(then, today, (1, 1), False) == {
        "data.seed": (1, 2),
        "epochs": (20, 25),
        "config.width": (3, 4),
    }


def test_accumulation_follows_from_the_world_size() -> None:
    data = {"global_batch_size": 8, "micro_batch_size": 2}
    assert compare_config({"data": data}, {"data": data}, (1, 4), False) == {"data.accumulation_steps": (4, 1)}
    assert compare_config({"data": {}}, {"data": data}, (1, 4), False) == {}


# The Trainer


def trainer(run_dir: Path, total: int = 10, **settings: Any) -> dt.Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    model = small_model()
    optimizer, _ = small_optimizer(model)
    given: dict[str, Any] = {"epochs": 2, "cpu": True, "log_every_steps": 1, "checkpoint": EACH_EPOCH}
    if "gradient_accumulation_steps" not in settings:
        given["global_batch_size"] = 4
    config = dt.TrainConfig(run_dir=str(run_dir), **{**given, **settings})
    schedule = CosineAnnealingLR(optimizer, total)
    return dt.Trainer(model, optimizer, train_data=Numbered(), loss=squared_error, scheduler=schedule, config=config)


def test_epochs_added_after_the_end_with_a_longer_schedule(tmp_path: Path) -> None:
    """The rates from there on are those of a run that had all epochs from the start."""
    trainer(tmp_path / "whole", total=15, epochs=3).fit()
    trainer(tmp_path / "added").fit()
    result = trainer(tmp_path / "added", total=15, epochs=3, max_grad_norm=1.0).fit()
    assert result.epochs_completed == 3
    rates = {
        name: [record["lr"] for record in dt.read_metrics(str(tmp_path / name)) if record["kind"] == "step"]
        for name in ("whole", "added")
    }
    assert rates["added"][10:] == rates["whole"][10:]
    changes = changes_of(tmp_path / "added")
    assert {key: changes[key] for key in ("scheduler.T_max", "epochs", "config.max_grad_norm")} == {
        "scheduler.T_max": [10, 15],
        "epochs": [2, 3],
        "config.max_grad_norm": [None, 1.0],
    }
    assert set(changes) == {"scheduler.T_max", "epochs", "config.max_grad_norm", "optimizer[0].current_lr"}


def test_the_fixed_global_batch_is_that_of_what_is_resumed_from(tmp_path: Path) -> None:
    """Two epochs in windows of four; then, in a run of their own accumulation, from the first of them."""
    accumulate = {"gradient_accumulation_steps": 2, "micro_batch_size": 2}
    trainer(tmp_path / "run", **accumulate, checkpoint=dt.CheckpointPolicy(every_epochs=1, keep_last=9)).fit()

    def batch_of(one: dt.Trainer) -> int:
        sampler: Any = one.train_loader.batch_sampler
        return int(sampler.global_batch_size)

    old = manifests_of(tmp_path / "run")[0]
    assert (old["progress"]["epochs_completed"], old["settings"]["config"]["data"]["global_batch_size"]) == (1, 4)
    rewrite(tmp_path / "run" / "checkpoints" / "step-00000005", lambda one: with_global_batch(one, 12))
    assert batch_of(trainer(tmp_path / "run", **accumulate)) == 4
    assert batch_of(trainer(tmp_path / "run", **accumulate, resume="epoch:1")) == 12
    assert batch_of(trainer(tmp_path / "run", **accumulate, resume="step-00000005")) == 12
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    search = [str(tmp_path / "*")]
    assert batch_of(trainer(tmp_path / "own" / "run", **accumulate, search=search)) == 12
    assert not (tmp_path / "own").exists(), "nothing is written before the run is entered"


def rewrite(folder: Path, change: Any) -> None:
    """Another manifest for the same files."""
    path = folder / "manifest.json"
    path.write_text(change(Manifest.from_json(path.read_bytes())).to_json())


def with_global_batch(manifest: Manifest, size: int) -> Manifest:
    config = manifest.settings["config"]
    data = {**config["data"], "global_batch_size": size}
    return replace(manifest, settings={**manifest.settings, "config": {**config, "data": data}})


# Checkpoints that were made without a part


def without(manifest: Manifest, *kinds: str) -> Manifest:
    """As an import makes it: no settings, no ranks, and not these kinds of state."""
    state = {key: value for key, value in manifest.state.items() if key.partition("/")[0] not in kinds}
    tensors = {name: one for name, one in manifest.tensors.items() if name.partition("/")[0] not in kinds}
    files = {name: one for name, one in manifest.files.items() if name.partition("-")[0] not in kinds}
    absent = {"absent": [*kinds]}
    return replace(manifest, state=state, tensors=tensors, files=files, settings=absent, rank_state=[])


class Registered:
    """Something that is registered."""

    value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("inside", [True, False], ids=["registered inside", "registered before"])
def test_a_resume_of_weights_alone_says_what_starts_fresh(
    inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SmallRun(run_dir=tmp_path, max_steps=5, policy=AT_THE_END).train()
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    rewrite(folder, lambda one: without(one, "optimizer", "scheduler", "scaler", "rng", "user"))
    capsys.readouterr()
    registered = {"ema": Registered()}
    torch.manual_seed(5)
    loop = SmallRun(run_dir=tmp_path, max_steps=8, **{"registered_inside" if inside else "registered": registered})
    run = loop.train()
    assert run.global_step == 8
    assert loop.rates == [0.05, 0.05, 0.05], "the schedule starts fresh"
    notes = [
        "The checkpoint has no optimizer state: it starts fresh.",
        "The checkpoint has no scheduler state: it starts fresh.",
        "The checkpoint has no state of the random generators: they are left as this process has seeded them.",
        "The checkpoint has no registered objects: they start fresh.",
    ]
    assert sorted(events_of(tmp_path, "resumed")[-1]["notes"]) == sorted(notes)
    assert set(notes) <= set(capsys.readouterr().out.splitlines())


def test_an_imported_state_goes_on_as_it_is(tmp_path: Path) -> None:
    """Optimizer and scheduler are there, settings and random generators are not."""
    whole = SmallRun(run_dir=tmp_path / "whole", max_steps=9)
    whole.train()
    SmallRun(run_dir=tmp_path / "run", max_steps=5, policy=AT_THE_END).train()
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    rewrite(folder, lambda one: without(one, "scaler", "rng", "user"))
    second = SmallRun(run_dir=tmp_path / "run", max_steps=9)
    second.train()
    assert second.rates == whole.rates[5:]
    assert second.used == whole.used[5:]
    assert changes_of(tmp_path / "run") == {}


# Words for people


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((0.9, 0.999), [0.9, 0.999]),
        (Counter({30: 1, 80: 2}), {"30": 1, "80": 2}),
        ({"a": (1, {2})}, {"a": [1, [2]]}),
        (float("inf"), "inf"),
        (None, None),
    ],
)
def test_values_are_shown_without_their_tags(value: Any, text: Any) -> None:
    assert shown(encode(value, "x", {})) == text
