"""Training loaders of the user's own: what a resume makes exact, and what it says of the rest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import dist_train as dt
from dist_train.errors import ConfigError, UnsaveableStateError
from dist_train.user_loader import UserLoader
from tests.support.own_loaders import (
    BATCH,
    UPDATES_PER_EPOCH,
    Augmented,
    Countdown,
    LeaveError,
    SeedingLoader,
    StatefulLoader,
    Stream,
    assert_same,
    build,
    plain,
    train,
    train_bare,
)


def stream() -> Any:
    return DataLoader(Stream(), batch_size=BATCH)


def stateful_of_unknown_length() -> Any:
    return StatefulLoader(has_length=False)


def with_a_generator_of_its_own() -> Any:
    return plain(own_generator=True)


def batches_in_a_list() -> Any:
    return [torch.full((2, 4), float(number)) for number in range(UPDATES_PER_EPOCH)]


EXACT = [
    plain,
    with_a_generator_of_its_own,
    batches_in_a_list,
    stream,
    StatefulLoader,
    stateful_of_unknown_length,
    SeedingLoader,
]


def last_manifest(run_dir: Path) -> Any:
    return json.loads((run_dir / "latest" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def straight() -> dict[Callable[[], Any], Any]:
    return {make: train_bare(make) for make in EXACT}


@pytest.mark.parametrize("make_loader", EXACT)
def test_with_the_library_the_loop_is_the_bare_loop(
    make_loader: Callable[[], Any], straight: Any, tmp_path: Path
) -> None:
    assert_same(train(tmp_path, make_loader), straight[make_loader])


@pytest.mark.parametrize("make_loader", EXACT)
@pytest.mark.parametrize("leave_at", [3, UPDATES_PER_EPOCH])
def test_a_run_that_was_left_in_mid_epoch_ends_as_the_bare_loop(
    make_loader: Callable[[], Any], leave_at: int, straight: Any, tmp_path: Path
) -> None:
    train(tmp_path, make_loader, leave_at=leave_at)
    resumed = train(tmp_path, make_loader)
    assert min(resumed.seen) == leave_at
    assert_same(resumed, straight[make_loader])


@pytest.mark.parametrize("make_loader", EXACT)
def test_a_run_that_is_left_and_stopped_again_and_again_ends_as_the_bare_loop(
    make_loader: Callable[[], Any], straight: Any, tmp_path: Path
) -> None:
    train(tmp_path, make_loader, leave_at=2)
    train(tmp_path, make_loader, leave_at=3)
    train(tmp_path, make_loader, epochs=1)
    train(tmp_path, make_loader, leave_at=13)
    train(tmp_path, make_loader, epochs=2)
    train(tmp_path, make_loader, leave_at=20)
    assert_same(train(tmp_path, make_loader), straight[make_loader])


@pytest.mark.parametrize("make_loader", [plain, stream, stateful_of_unknown_length])
@pytest.mark.parametrize("max_steps", [5, UPDATES_PER_EPOCH])
def test_max_steps_ends_within_the_epoch(make_loader: Callable[[], Any], max_steps: int, tmp_path: Path) -> None:
    ended = train(tmp_path, make_loader, max_steps=max_steps)
    assert (ended.run.global_step, len(ended.seen)) == (max_steps, max_steps)
    assert ended.run.reason == "done"


@pytest.mark.parametrize("make_loader", EXACT)
@pytest.mark.parametrize("max_steps", [5, UPDATES_PER_EPOCH])
def test_more_steps_than_max_steps_go_on_exactly(
    make_loader: Callable[[], Any], max_steps: int, straight: Any, tmp_path: Path
) -> None:
    train(tmp_path, make_loader, max_steps=max_steps)
    assert_same(train(tmp_path, make_loader), straight[make_loader])


def test_the_last_batch_of_a_loader_with_a_length_leaves_the_evaluation_pending(tmp_path: Path) -> None:
    train(tmp_path, plain, leave_at=UPDATES_PER_EPOCH)
    manifest = last_manifest(tmp_path)
    assert manifest["progress"]["evaluation"] == "pending"
    assert manifest["rank_state"][0]["loader"]["batches"] == UPDATES_PER_EPOCH


def test_a_replay_says_how_long_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, plain, leave_at=3)
    with caplog.at_level(logging.INFO, logger="dist_train"):
        logging.getLogger("dist_train").propagate = True
        train(tmp_path, plain)
    assert "Replayed 3 batches of the training loader in 0." in caplog.text


def test_a_replay_shows_how_far_it_is() -> None:
    torch.manual_seed(0)
    first = UserLoader(plain())
    batches = first.iterate(is_complete=False)
    for _ in range(3):
        next(batches)
        first.batches += 1
    shown: list[tuple[int, int]] = []
    second = UserLoader(plain(), show=lambda done, total: shown.append((done, total)))
    second.restore(first.capture())
    second.iterate(is_complete=False)
    assert shown == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_data_that_have_shrunk_below_the_place_are_refused(tmp_path: Path) -> None:
    train(tmp_path, batches_in_a_list, leave_at=5)
    with pytest.raises(
        ConfigError, match=r"stands after 5 batches of its epoch, but the training loader \(list\) has only 4"
    ):
        train(tmp_path, lambda: batches_in_a_list()[:4])


def test_saving_a_loader_s_state_draws_no_random_number(tmp_path: Path) -> None:
    loader = UserLoader(StatefulLoader())
    before = torch.get_rng_state()
    loader.capture()
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_that_is_too_large_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.user_loader.MOST_STATE_BYTES", 1 << 10)
    with pytest.raises(UnsaveableStateError, match=r"state_dict\(\) of Stream takes"):
        UserLoader(stream()).capture()


def test_ranks_that_were_more_or_fewer_begin_the_epoch_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, plain, leave_at=3)
    monkeypatch.setattr(
        "dist_train.beginning.Beginning.rank_states", property(lambda self: [{"loader": {"batches": 3}}] * 2)
    )
    resumed = train(tmp_path, plain, epochs=1)
    assert "was saved by 2 ranks, each with a place of its own in its loader; here are 1" in capsys.readouterr().err
    assert resumed.run.global_step == 3 + UPDATES_PER_EPOCH


def ours() -> Any:
    return dt.data_loader(Augmented(), global_batch_size=BATCH)


@pytest.mark.parametrize(("then", "now"), [(ours, plain), (plain, ours)])
def test_another_kind_of_loader_begins_the_epoch_again_and_says_so(
    then: Any, now: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, then, leave_at=3)
    resumed = train(tmp_path, now, epochs=1)
    assert "the training loader begins again at its first batch" in capsys.readouterr().err
    assert resumed.run.global_step == 3 + UPDATES_PER_EPOCH


# What cannot be exact


def caveat_of(loader: Any) -> str:
    return "; ".join(UserLoader(loader).caveats)


def test_what_is_exact_has_no_caveat() -> None:
    assert [caveat_of(make()) for make in EXACT] == [""] * len(EXACT)
    assert caveat_of(plain(num_workers=2)) == ""


def test_what_is_not_exact_is_named() -> None:
    assert "persistent_workers=True" in caveat_of(plain(num_workers=2, persistent_workers=True))
    assert "in_order=False" in caveat_of(plain(num_workers=2, in_order=False))
    assert "Stream, iterated with 2 workers, which read ahead" in caveat_of(DataLoader(Stream(), num_workers=2))
    assert "Countdown, iterated without state_dict" in caveat_of(DataLoader(Countdown(), batch_size=BATCH))
    assert "list_iterator can be iterated only once" in caveat_of(iter([1, 2]))


def test_the_caveat_is_told_once_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, lambda: DataLoader(Countdown(), batch_size=BATCH), epochs=2)
    assert capsys.readouterr().err.count("A resume within an epoch will not be exact with this DataLoader") == 1


def test_an_iterable_without_state_is_replayed(tmp_path: Path) -> None:
    def make() -> Any:
        return DataLoader(Countdown(), batch_size=BATCH)

    train(tmp_path, make, leave_at=UPDATES_PER_EPOCH + 3)
    assert_same(train(tmp_path, make), train_bare(make))


def test_a_loader_that_can_be_iterated_once_is_refused_when_it_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(list_iterator\) gave no batch in epoch 2"):
        train(tmp_path, lambda: iter(batches_in_a_list()))


# Accumulation by Accelerate


def accumulate(run_dir: Path, make_loader: Callable[[], Any], steps: int, leave_at: int | None = None) -> Any:
    """Weights, and how many batches each update took."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model, optimizer = accelerator.prepare(*build())
    loader, windows, since = make_loader(), [], 0
    try:
        with dt.Run(str(run_dir), accelerator=accelerator, model=model, optimizer=optimizer, loader=loader) as run:
            for _ in run.epochs(2):
                for batch in run.batches(loader):
                    with accelerator.accumulate(model):
                        loss = model(batch / 9).square().mean()
                        accelerator.backward(loss * run.loss_weight)
                        optimizer.step()
                        optimizer.zero_grad()
                    since += 1
                    assert run.updates_now == accelerator.sync_gradients
                    before = run.global_step
                    run.step(loss=loss)
                    if run.global_step > before:
                        windows.append((since, run.loss_weight))
                        since = 0
                    if run.global_step == leave_at and not run._feed.in_window:
                        run.save(wait=True)
                        raise LeaveError
    except LeaveError:
        pass
    return {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}, windows


def test_an_update_is_when_accelerate_synchronises_and_short_windows_are_weighed(tmp_path: Path) -> None:
    _, windows = accumulate(tmp_path, plain, 3)
    assert windows == [(3, 1.0), (3, 1.0), (1, 3.0)] * 2


def test_a_window_that_a_loader_of_unknown_length_leaves_open_is_dropped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, windows = accumulate(tmp_path, stateful_of_unknown_length, 3)
    assert [count for count, _ in windows] == [3, 3, 4, 3]  # the seventh batch is counted, its gradient is not
    assert capsys.readouterr().err.count("ended inside a window of accumulated batches") == 1


@pytest.mark.parametrize("make_loader", [plain, stream, stateful_of_unknown_length])
@pytest.mark.parametrize("leave_at", [1, 2])
def test_accumulation_over_a_loader_of_the_user_s_resumes_exactly(
    make_loader: Callable[[], Any], leave_at: int, tmp_path: Path
) -> None:
    straight, _ = accumulate(tmp_path / "straight", make_loader, 3)
    accumulate(tmp_path / "left", make_loader, 3, leave_at=leave_at)
    resumed, _ = accumulate(tmp_path / "left", make_loader, 3)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name])
