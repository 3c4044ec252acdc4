"""Callbacks: what is told when, in which order, and what of them survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dist_train as dt
from dist_train.callbacks import EVENTS, Happening
from dist_train.errors import ConfigError
from tests.support.own_loaders import BATCH, LeaveError, plain, train

DATA = TensorDataset(torch.arange(12.0).reshape(12, 1))


class Counter:
    """A callback with a state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, now: Happening) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def listen(told: list[Happening], *events: str) -> Any:
    def register(run: dt.Run) -> None:
        for event in events or EVENTS:
            run.on(event, told.append)

    return register


def test_each_event_is_told_in_its_place(tmp_path: Path) -> None:
    told: list[Happening] = []
    policy = dt.CheckpointPolicy(every_epochs=1)
    train(tmp_path, lambda: [torch.ones(2, 4)] * 2, epochs=2, register=listen(told), policy=policy)
    events = [one.event for one in told if one.event != "committed"]
    assert events == ["started", "step", "step", "epoch_end", "step", "step", "epoch_end", "stopping"]
    commits = [one for one in told if one.event == "committed"]
    assert [(one.global_step, one.epochs_completed, one.ends_epoch) for one in commits] == [(2, 1, True), (4, 2, True)]
    assert all((Path(one.path) / "manifest.json").exists() for one in commits)
    assert [set(one.metrics) for one in told if one.event in ("epoch_end", "committed")] == [{"val"}] * 4
    assert {one.event: one.reason for one in told}["stopping"] == "done"


def test_a_resume_is_told_with_its_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, plain, leave_at=3)
    told: list[Happening] = []
    train(tmp_path, plain, epochs=1, register=listen(told, "started", "resumed"))
    assert [(one.event, one.global_step, Path(one.path).name) for one in told] == [("resumed", 3, "step-00000003")]


def test_a_stop_is_told_once_with_its_reason(tmp_path: Path) -> None:
    told: list[Happening] = []

    def register(run: dt.Run) -> None:
        run.on("step", lambda now: now.run.stop(dt.StopReason.PREEMPTED) if now.global_step == 2 else None)
        listen(told, "stopping")(run)

    ended = train(tmp_path, plain, register=register)
    assert [(one.reason, one.global_step) for one in told] == [("preempted", 2)]
    assert ended.run.reason == "preempted"


def test_a_callback_s_state_survives_being_left(tmp_path: Path) -> None:
    def with_counter(counter: Counter) -> Any:
        return lambda run: (run.on("step", counter), run.on("epoch_end", counter))

    straight, first, second = Counter(), Counter(), Counter()
    train(tmp_path / "straight", plain, epochs=2, register=with_counter(straight))
    train(tmp_path / "left", plain, leave_at=9, register=with_counter(first))
    train(tmp_path / "left", plain, epochs=2, register=with_counter(second))
    assert first.count == 10
    assert second.count == straight.count == 16


def test_two_stateful_callbacks_of_one_class_need_names(tmp_path: Path) -> None:
    with dt.Run(str(tmp_path), model=nn.Linear(1, 1)) as run:
        run.on("step", Counter())
        run.on("step", Counter(), name="another")
        with pytest.raises(ConfigError, match=r"run.register\('callback.Counter', ...\): give each object"):
            run.on("step", Counter())


def test_an_error_in_a_callback_goes_on_with_its_name(tmp_path: Path) -> None:
    def careless(now: Happening) -> None:
        raise LeaveError("no such file")

    with pytest.raises(LeaveError) as caught, dt.Run(str(tmp_path), model=nn.Linear(1, 1)) as run:
        run.on("step", careless)
        for _ in run.epochs(1):
            run.step()
    (note,) = caught.value.__notes__
    assert "careless on 'step' at step 1" in note


def test_an_unknown_event_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    run = dt.Run(str(tmp_path), model=nn.Linear(1, 1))
    with pytest.raises(
        ConfigError, match="There is no event 'epoch_ended'; there are started, resumed, step, epoch_end"
    ):
        run.on("epoch_ended", print)
    with pytest.raises(ConfigError, match="The callback on 'step' is a str"):
        run.on("step", "print")  # type: ignore[arg-type]


def mean_square(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch[0]).square().mean()
    return loss


def trainer(run_dir: Path, epochs: int, callbacks: Any) -> dt.Trainer:
    model = nn.Linear(1, 1)
    config = dt.TrainConfig(run_dir=str(run_dir), epochs=epochs, global_batch_size=BATCH, cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    return dt.Trainer(model, optimizer, train_data=DATA, loss=mean_square, config=config, callbacks=callbacks)


def test_every_five_epochs_a_download_line_takes_three_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offer(now: Happening) -> None:
        if now.ends_epoch and now.epochs_completed % 5 == 0:
            print(f"Epoch {now.epochs_completed} checkpoint ready for download: {now.path}")

    trainer(tmp_path, 11, {"committed": offer}).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if "ready for download" in line]
    assert [line.partition(":")[0] for line in lines] == [
        "Epoch 5 checkpoint ready for download",
        "Epoch 10 checkpoint ready for download",
    ]
    assert lines[1].endswith(str(tmp_path / "checkpoints/step-00000030"))
    assert (tmp_path / "checkpoints/step-00000030/manifest.json").exists()


def test_a_trainer_takes_several_callbacks_on_an_event(tmp_path: Path) -> None:
    counters = [Counter(), Counter()]
    told: list[Happening] = []
    trainer(tmp_path, 2, {"step": [told.append, counters[0]], "epoch_end": counters[0]}).fit()
    assert (len(told), counters[0].count) == (6, 8)
    trainer(tmp_path, 3, {"step": [told.append, counters[1]], "epoch_end": counters[1]}).fit()
    assert counters[1].count == 12
