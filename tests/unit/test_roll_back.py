"""Going back to a checkpoint that proved good, without the samples that ruined the run: exact, and never forgotten."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import Operation, Store
from dist_train.cli import main
from dist_train.errors import StopReason
from dist_train.health.policy import HealthPolicy
from dist_train.history import read_metrics
from dist_train.ledger import SkipLedger, Skipped
from dist_train.options import RunOptions
from dist_train.run import Run
from dist_train.time_ledger import read_time
from tests.support.bad_batches import BadRun
from tests.support.small_run import Numbered, SmallRun, events_of, manifests_of, status_of

HEALTH = HealthPolicy(not_finite="roll_back", clean_steps=2)
EVERY_STEP = CheckpointPolicy(every_steps=1, keep_last=3)
BAD_WINDOWS = (7, 12)
"""Of the clean run's fifteen: the third of the second epoch and the third of the third one."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    small = SmallRun(run_dir=tmp_path_factory.mktemp("clean") / "run")
    small.train()
    return small


def first_sample_of(clean: SmallRun, window: int) -> tuple[int, int]:
    epoch, indices = clean.used[window]
    return epoch, indices[0]


def entry_of(clean: SmallRun, window: int) -> Skipped:
    epoch, first = clean.used[window][0], window % 5 * 4
    return Skipped(epoch=epoch, first=first, last=first + 3, global_step=window + 1, kind="not_finite", back_to=5)


def bad_run(run_dir: Path, clean: SmallRun, windows: tuple[int, ...] = BAD_WINDOWS[:1], **options: Any) -> BadRun:
    samples = [first_sample_of(clean, window) for window in windows]
    return BadRun(run_dir=run_dir, bad_samples=samples, **{"health": HEALTH, **options})


def reference(run_dir: Path, clean: SmallRun, windows: tuple[int, ...] = BAD_WINDOWS[:1]) -> SmallRun:
    """A run to which nothing ever happened, and that knew from the start what to leave out."""

    def tell(run: Run) -> None:
        for window in windows:
            run._intake.ledger.add(entry_of(clean, window))

    small = BadRun(run_dir=run_dir, at_epoch=tell)
    small.train()
    return small


def assert_same_end(small: SmallRun, other: SmallRun) -> None:
    """Weights, optimizer, schedule, random generators, history: bit for bit."""
    for one, two in zip(small.prepared.state_dict().values(), other.prepared.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    ends = [manifests_of(one.run_dir)[-1] for one in (small, other)]
    assert ends[0]["progress"] == ends[1]["progress"]
    assert ends[0]["rank_state"] == ends[1]["rank_state"]
    assert ends[0]["metrics"] == ends[1]["metrics"]
    for key in ("optimizer", "scheduler"):
        assert ends[0]["state"][key] == ends[1]["state"][key]
    assert read_metrics(small.run_dir) == read_metrics(other.run_dir)


def ledger_of(run_dir: Path) -> list[tuple[int, int, int]]:
    ledger = manifests_of(run_dir)[-1]["state"]["health"]["ledger"]
    return [(one["epoch"], one["first"], one["last"]) for one in ledger]


def test_a_roll_back_ends_as_a_run_that_never_saw_those_samples(clean: SmallRun, tmp_path: Path) -> None:
    small = bad_run(tmp_path / "run", clean)
    run = small.train()
    assert run.reason is StopReason.DONE
    assert run.global_step == 14
    assert_same_end(small, reference(tmp_path / "reference", clean))
    assert ledger_of(small.run_dir) == [(1, 8, 11)]
    (event,) = events_of(small.run_dir, "rolled_back")
    assert event["path"].endswith("checkpoints/step-00000005")
    assert (event["global_step"], event["back_to"], event["first"], event["last"]) == (8, 5, 8, 11)
    assert [one["reason"] for one in events_of(small.run_dir, "stopped")] == ["rolled_back", "done"]
    (skipped,) = events_of(small.run_dir, "skipped_window")
    assert (skipped["epoch"], skipped["first"], skipped["last"]) == (1, 8, 11)
    time = read_time(Store(small.run_dir))
    assert time is not None
    assert [one.lost_steps for one in time.attempts] == [3, 0]


def test_each_sample_is_used_once_an_epoch_but_those_of_the_ledger(clean: SmallRun, tmp_path: Path) -> None:
    small = bad_run(tmp_path / "run", clean)
    small.train()
    lost = clean.used[BAD_WINDOWS[0]][1]
    replayed = small.used[8:]  # eight windows came before the roll-back
    for epoch in (1, 2):
        used = sorted(index for number, indices in replayed if number == epoch for index in indices)
        assert used == sorted(set(range(20)) - set(lost if epoch == 1 else []))


def test_two_bad_windows_are_two_roll_backs(clean: SmallRun, tmp_path: Path) -> None:
    small = bad_run(tmp_path / "run", clean, BAD_WINDOWS)
    assert small.train().reason is StopReason.DONE
    assert_same_end(small, reference(tmp_path / "reference", clean, BAD_WINDOWS))
    assert ledger_of(small.run_dir) == [(1, 8, 11), (2, 8, 11)]


@pytest.mark.parametrize("window", [9, 5])
def test_the_last_and_the_first_window_of_an_epoch_may_be_left_out(
    window: int, clean: SmallRun, tmp_path: Path
) -> None:
    health = replace(HEALTH, clean_steps=1)
    policy = replace(EVERY_STEP, every_epochs=1)
    small = bad_run(tmp_path / "run", clean, (window,), health=health, policy=policy)
    assert small.train().reason is StopReason.DONE
    other = reference(tmp_path / "reference", clean, (window,))
    for one, two in zip(small.prepared.parameters(), other.prepared.parameters(), strict=True):
        assert torch.equal(one, two)
    assert read_metrics(small.run_dir) == read_metrics(other.run_dir)
    assert small.evaluated[-1] == 2


def test_a_checkpoint_without_clean_updates_after_it_is_not_gone_back_to(clean: SmallRun, tmp_path: Path) -> None:
    """Retention keeps the one that has proved good and the next that will, beyond the newest three."""
    small = bad_run(tmp_path / "run", clean, policy=EVERY_STEP, health=replace(HEALTH, clean_steps=5))
    assert small.train().reason is StopReason.DONE
    (event,) = events_of(small.run_dir, "rolled_back")
    assert event["back_to"] == 1
    abandoned = sorted(path.name for path in (small.run_dir / "checkpoints/abandoned").glob("a*/step-*"))
    assert abandoned == [f"step-{step:08d}" for step in (3, 5, 6, 7)]


# Kills


class KilledError(Exception):
    """The process is gone."""


def killed(*args: Any, **kwargs: Any) -> Any:
    raise KilledError


def before_anything_moves(small: BadRun, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Run, "_roll_back", killed)


def after_the_restore(small: BadRun, patch: pytest.MonkeyPatch) -> None:
    real = Run._roll_back

    def roll_back(run: Run) -> None:
        real(run)
        raise KilledError

    patch.setattr(Run, "_roll_back", roll_back)


def some_steps_later(small: BadRun, patch: pytest.MonkeyPatch) -> None:
    def leave(run: Run) -> None:
        if run.attempt == 2 and run.global_step == 9:
            raise KilledError

    small.at_step = leave


def after_its_first_checkpoint(small: BadRun, patch: pytest.MonkeyPatch) -> None:
    def leave(run: Run) -> None:
        if run.attempt == 2 and run.global_step == 11:
            raise KilledError

    small.at_step = leave


KILLS = [before_anything_moves, after_the_restore, some_steps_later, after_its_first_checkpoint]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_kill_between_the_decision_and_the_end_forgets_nothing(
    kill: Callable[[BadRun, pytest.MonkeyPatch], None], clean: SmallRun, tmp_path: Path
) -> None:
    small = bad_run(tmp_path / "run", clean)
    with pytest.MonkeyPatch.context() as patch:
        kill(small, patch)
        with pytest.raises(KilledError):
            small.train()
    again = bad_run(tmp_path / "run", clean)
    assert again.train().reason is StopReason.DONE
    assert_same_end(again, reference(tmp_path / "reference", clean))
    assert len(events_of(small.run_dir, "rolled_back")) == 1
    assert ledger_of(small.run_dir) == [(1, 8, 11)]


def test_a_kill_before_the_decision_is_durable_makes_it_again(clean: SmallRun, tmp_path: Path) -> None:
    def refuse(operation: Operation) -> None:
        if "branch.json" in operation.path:
            raise KilledError

    small = bad_run(tmp_path / "run", clean, open_store=lambda root: Store(root, observer=refuse))
    with pytest.raises(KilledError):
        small.train()
    assert not (small.run_dir / "branch.json").exists()
    again = bad_run(tmp_path / "run", clean)
    again.train()
    assert_same_end(again, reference(tmp_path / "reference", clean))


def test_a_stop_at_the_very_boundary_leaves_the_roll_back_to_the_next_start(clean: SmallRun, tmp_path: Path) -> None:
    def leave(run: Run) -> None:
        if run.global_step == 7:
            run.stop(StopReason.PREEMPTED)

    small = bad_run(tmp_path / "run", clean, at_batch=leave)
    run = small.train()
    assert run.reason is StopReason.PREEMPTED
    assert [one["progress"]["global_step"] for one in manifests_of(small.run_dir)] == [5]
    again = bad_run(tmp_path / "run", clean)
    again.train()
    assert_same_end(again, reference(tmp_path / "reference", clean))


# The end of it


def test_the_run_has_diverged_after_so_many_roll_backs(clean: SmallRun, tmp_path: Path) -> None:
    health = replace(HEALTH, max_roll_backs=1)
    small = bad_run(tmp_path / "run", clean, BAD_WINDOWS, health=health)
    run = small.train()
    assert run.reason is StopReason.DIVERGED
    told = status_of(small.run_dir)["error"]
    indices = clean.used[BAD_WINDOWS[1]][1]
    assert f"at step 12 (samples 9 to 12 of epoch 3, dataset indices {', '.join(map(str, indices))})" in told
    (common,) = set(indices) & set(clean.used[BAD_WINDOWS[0]][1])
    assert f"All of those hold dataset index {common}: look at it" in told
    assert "gone back max_roll_backs=1 times before, at step 8 (samples 9 to 12 of epoch 2)" in told


def test_without_a_good_checkpoint_the_run_has_diverged(clean: SmallRun, tmp_path: Path) -> None:
    small = bad_run(tmp_path / "run", clean, health=replace(HEALTH, clean_steps=3))
    assert small.train().reason is StopReason.DIVERGED
    assert "no checkpoint to go back to: none has 3 updates after it" in status_of(small.run_dir)["error"]
    assert not (small.run_dir / "branch.json").exists()


def test_a_roll_back_stays_on_the_branch_that_was_asked_for(clean: SmallRun, tmp_path: Path) -> None:
    """The same command again continues it, and does not start it a second time."""
    SmallRun(run_dir=tmp_path / "run", epochs=1).train()
    small = bad_run(tmp_path / "run", clean, resume="epoch:1")
    assert small.train().reason is StopReason.DONE
    assert json.loads((small.run_dir / "branch.json").read_text())["requested"] == "epoch:1"
    again = bad_run(tmp_path / "run", clean, resume="epoch:1", epochs=4)
    run = again.train()
    assert (run.resumed_from or "").endswith("step-00000014")
    assert run.global_step == 19


def test_a_changed_learning_rate_survives_the_roll_back(clean: SmallRun, tmp_path: Path) -> None:
    """What the script writes now counts, not what the schedule had made of it by then."""
    small = bad_run(tmp_path / "run", clean)
    small.train()
    rates = small.rates[8:]
    other = reference(tmp_path / "reference", clean)
    assert rates == other.rates[5:]


def test_the_report_tells_a_roll_back_from_a_kill(
    clean: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_run(tmp_path / "run", clean).train()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (restart,) = told["restarts"]
    assert (restart["cause"], restart["at_step"], restart["lost_steps"]) == ("rolled_back", 8, 3)
    assert sum(told["buckets"].values()) == pytest.approx(told["seconds"], abs=1e-3)


# A loader of the user's own


def own_loader_run(run_dir: Path, *, bad: bool, left_out: bool = False) -> tuple[Run, nn.Module, list[list[int]]]:
    """Five batches an epoch, drawn anew each time; one sample of epoch 1 ruins its batch wherever it comes."""
    torch.manual_seed(1)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=4, shuffle=True)
    used: list[list[int]] = []
    options = RunOptions(health=HEALTH, log_every_steps=1)
    with Run(str(run_dir), model=model, optimizer=optimizer, loader=loader, options=options) as run:
        for epoch in run.epochs(3):
            if left_out:
                run._intake.ledger.replace([{**OWN_ENTRY, "global_step": 8}])
            for index, batch in enumerate(run.batches(loader)):
                inputs, targets, numbers = batch
                used.append(numbers.tolist())
                is_third = run._intake._user is not None and run._intake._user.batches == 2
                inputs = inputs * math.nan if bad and epoch == 1 and is_third and index == 2 else inputs
                loss = nn.functional.mse_loss(model(inputs).squeeze(1), targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)
    return run, model, used


OWN_ENTRY = {"epoch": 1, "first": 2, "last": 2, "unit": "batches", "kind": "not_finite", "back_to": 5}


def test_a_loader_of_the_users_is_gone_through_again_without_the_bad_batch(tmp_path: Path) -> None:
    run, model, used = own_loader_run(tmp_path / "run", bad=True)
    assert run.reason is StopReason.DONE
    other, expected, straight = own_loader_run(tmp_path / "reference", bad=False, left_out=True)
    assert run.global_step == other.global_step == 14
    assert used[8:] == straight[5:]
    assert torch.equal(model.weight, expected.weight)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "reference")
    (ledger,) = manifests_of(tmp_path / "run")[-1]["state"]["health"]["ledger"]
    assert ledger == {**OWN_ENTRY, "global_step": 8}


def test_a_loader_that_cannot_begin_again_cannot_be_gone_back_in(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = iter(torch.utils.data.DataLoader(Numbered(), batch_size=1))
    with Run(str(tmp_path), model=model, optimizer=optimizer, loader=batches, options=RunOptions(health=HEALTH)) as run:
        for _ in run.epochs(1):
            for index, (inputs, _targets, _numbers) in enumerate(run.batches(batches)):
                model(inputs * (math.nan if index == 9 else 1)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
                run.save()
    assert run.reason is StopReason.DIVERGED
    assert "a training loader that can be gone through again" in status_of(tmp_path)["error"]


def test_the_ledger_covers_windows_that_overlap_it() -> None:
    ledger = SkipLedger()
    ledger.add(Skipped(epoch=1, first=8, last=11, global_step=8, kind="spike", back_to=5))
    ledger.add(ledger.entries[0])
    assert len(ledger) == 1
    assert ledger.covers("samples", 1, 8, 12)
    assert ledger.covers("samples", 1, 11, 13)
    assert not ledger.covers("samples", 1, 12, 16)
    assert not ledger.covers("samples", 1, 4, 8)
    assert not ledger.covers("samples", 2, 8, 12)
    assert not ledger.covers("batches", 1, 8, 12)
    assert ledger.proved_step == 5
