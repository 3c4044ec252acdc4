"""Several schedulers on one optimizer: what one makes of a rate depends on what another has made of it before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lr

from dist_train.differences import Differences
from dist_train.errors import ConfigError
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, write_checkpoint

Builds = Mapping[str, Callable[[Optimizer], Any]]


class Life:
    def __init__(self, builds: Builds, rate: float, *, tensor: bool = False) -> None:
        model = nn.Linear(1, 1)
        base: Any = torch.tensor(rate) if tensor else rate
        self.optimizer: Optimizer = (
            AdamW(model.parameters(), lr=base, foreach=False) if tensor else SGD(model.parameters(), lr=base)
        )
        self.schedulers = {name: build(self.optimizer) for name, build in builds.items()}
        self.live = LiveState(models={"": model}, optimizers={"": self.optimizer}, schedulers=self.schedulers)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train(self, first: int, last: int, every: Mapping[str, int] | None = None) -> list[float]:
        """Rates of these updates; `every` says after how many updates a scheduler is stepped, one where it does not."""
        used = []
        for update in range(first, last):
            used.append(self.rate)
            self.optimizer.step()
            for name, scheduler in self.schedulers.items():
                if (update + 1) % (every or {}).get(name, 1) == 0:
                    scheduler.step(*([float(update)] if isinstance(scheduler, lr.ReduceLROnPlateau) else []))
        return used


def resume(
    one: Life, other: Life, folder: Path, *, forget: str | None = None, absent: tuple[str, ...] = ()
) -> Differences:
    write_checkpoint(folder, [one.live.capture()], {k: v for k, v in one.live.settings.items() if forget != "settings"})
    manifest, reader = open_checkpoint(folder)
    state = {place: value for place, value in manifest.state.items() if place != forget}
    try:
        return other.live.restore(state, manifest.settings, reader, absent, 11)
    finally:
        reader.close()


def warm_up(steps: int = 5, factor: float = 0.1) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lr.LinearLR(optimizer, factor, 1.0, steps)


def cosine(steps: int = 20) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lr.CosineAnnealingLR(optimizer, steps, eta_min=1e-3)


def decay(factor: float) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lr.LambdaLR(optimizer, lambda step: factor**step)


def plateau(factor: float = 0.5, **options: Any) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lr.ReduceLROnPlateau(optimizer, factor=factor, **{"patience": 1, **options})


# Those that are replayed


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("names", [("warm-up", "cosine"), ("cosine", "warm-up"), ("cosine", "warm-up", "decay")])
def test_schedulers_are_replayed_in_turn(names: tuple[str, ...], every: int, tensor: bool, tmp_path: Path) -> None:
    """One after the other they are off by a part in 400: the cosine takes its floor off what the warm-up has made."""
    builds: Builds = {"warm-up": warm_up(), "cosine": cosine(), "decay": lambda o: lr.ExponentialLR(o, 0.9)}
    builds = {name: builds[name] for name in names}
    first, second, twin = (Life(builds, rate, tensor=tensor) for rate in (0.1, 0.05, 0.05))
    steps = dict.fromkeys(names, every)
    first.train(0, 11, steps)
    resume(first, second, tmp_path)
    assert second.train(11, 40, steps) == twin.train(0, 40, steps)[11:]
    assert [one.state_dict() for one in second.schedulers.values()] == [
        one.state_dict() for one in twin.schedulers.values()
    ]


@pytest.mark.parametrize("stop", [8, 12, 14])
@pytest.mark.parametrize("names", [("warm-up", "cosine"), ("cosine", "warm-up")])
def test_one_that_is_stepped_once_an_epoch_is_replayed_at_the_ends_of_epochs(
    names: tuple[str, ...], stop: int, tmp_path: Path
) -> None:
    builds: Builds = {name: {"warm-up": warm_up(10), "cosine": cosine()}[name] for name in names}
    first, second, twin = (Life(builds, rate) for rate in (0.1, 0.05, 0.05))
    steps = {"cosine": 4}

    def train(life: Life, begin: int, end: int) -> list[float]:
        used = []
        for update in range(begin, end):  # whatever its place, the one of the epoch comes after the update's
            used.append(life.rate)
            life.optimizer.step()
            life.schedulers["warm-up"].step()
            if (update + 1) % steps["cosine"] == 0:
                life.schedulers["cosine"].step()
        return used

    train(first, 0, stop)
    resume(first, second, tmp_path)
    assert train(second, stop, 30) == train(twin, 0, 30)[stop:]


def test_the_one_that_is_too_short_is_named_with_its_own_step(tmp_path: Path) -> None:
    long: Builds = {"cycle": lambda o: lr.OneCycleLR(o, 0.4, total_steps=20, cycle_momentum=False), "decay": warm_up()}
    short: Builds = {**long, "cycle": lambda o: lr.OneCycleLR(o, 0.4, total_steps=6, cycle_momentum=False)}
    first, second = Life(long, 0.1), Life(short, 0.1)
    first.train(0, 9)
    with pytest.raises(ConfigError, match=r"scheduler/cycle \(OneCycleLR\) .* its step 9: .* ends before, at step 6"):
        resume(first, second, tmp_path)


def test_the_scheduler_s_own_count_rules_where_it_was_not_stepped_with_each_update(tmp_path: Path) -> None:
    """A GradScaler that skips updates, and a loop that does not step the scheduler then."""
    first, second, twin = Life({"": cosine()}, 0.1), Life({"": cosine(30)}, 0.1), Life({"": cosine(30)}, 0.1)
    first.train(0, 7)
    assert resume(first, second, tmp_path).notes == []  # after 11 updates
    assert second.train(7, 20) == twin.train(0, 20)[7:]


# Beside a plateau


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("names", [("warm-up", "plateau"), ("plateau", "warm-up")])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "today", [{}, {"warm-up": warm_up(12)}, {"plateau": plateau(0.25)}], ids=lambda today: "-".join(today) or "rate"
)
def test_a_warm_up_beside_a_plateau_is_counted_once(
    today: dict[str, Any], every: int, names: tuple[str, ...], tensor: bool, tmp_path: Path
) -> None:
    """The warm-up is still running. When its reductions came is not known: they commute but for the last bits."""
    then: Builds = {name: {"warm-up": warm_up(8), "plateau": plateau()}[name] for name in names}
    now = {**then, **today}
    first, second, twin = (
        Life(builds, rate, tensor=tensor) for builds, rate in ((then, 0.1), (now, 0.07), (now, 0.07))
    )
    steps = dict.fromkeys(names, every)
    first.train(0, 7, steps)
    assert first.rate < 0.1
    assert first.schedulers["plateau"].last_epoch
    assert resume(first, second, tmp_path).notes == []
    expected = twin.train(0, 30, steps)[7:]
    close = 1e-5 if tensor else 1e-12
    assert second.train(7, 30, steps) == pytest.approx(expected, rel=close)
    assert [float(one.get_last_lr()[0]) for one in second.schedulers.values()] == pytest.approx(
        [float(one.get_last_lr()[0]) for one in twin.schedulers.values()], rel=close
    )


def test_a_lambda_that_overwrites_the_plateau_s_reductions_is_followed(tmp_path: Path) -> None:
    builds: Builds = {"plateau": plateau(), "decay": lambda o: lr.LambdaLR(o, lambda step: 0.9**step)}
    first, second, twin = (Life(builds, rate) for rate in (0.1, 0.05, 0.05))
    first.train(0, 9)
    assert resume(first, second, tmp_path).notes == []
    assert second.train(9, 20) == twin.train(0, 20)[9:]


class Warmer:
    """A callable object: torch saves what is in it, and loads that."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


def test_simulating_the_old_schedule_leaves_today_s_objects_alone(tmp_path: Path) -> None:
    def builds(steps: int) -> Builds:
        return {
            "chain": lambda o: lr.ChainedScheduler([lr.MultiplicativeLR(o, Warmer(steps)), lr.StepLR(o, 3, 0.5)]),
            "plateau": plateau(),
        }

    first, second, twin = Life(builds(4), 0.1), Life(builds(6), 0.1), Life(builds(6), 0.1)
    first.train(0, 5)
    assert resume(first, second, tmp_path).notes == []
    assert second.schedulers["chain"]._schedulers[0].lr_lambdas[0].steps == 6
    assert second.train(5, 12) == pytest.approx(twin.train(0, 12)[5:], rel=1e-12)


class OwnWarmUp(lr.LRScheduler):
    def get_lr(self) -> list[Any]:
        return [base * min(1.0, (self.last_epoch + 1) / 8) for base in self.base_lrs]


@pytest.mark.parametrize(
    ("then", "today", "forget"),
    [
        pytest.param({"other": OwnWarmUp, "plateau": plateau()}, {}, None, id="own"),
        pytest.param({"other": warm_up(8), "plateau": plateau()}, {}, "settings", id="imported"),
        pytest.param({"other": warm_up(8), "plateau": plateau()}, {"other": cosine()}, None, id="another class"),
        pytest.param({"other": plateau(0.9), "plateau": plateau()}, {}, None, id="two plateaus"),
        pytest.param({"other": decay(0.9), "plateau": plateau()}, {"other": decay(0.8)}, None, id="another lambda"),
        pytest.param({"other": warm_up(8), "plateau": plateau()}, {"other": plateau()}, None, id="one more plateau"),
    ],
)
def test_where_the_plateau_s_part_cannot_be_told_the_share_is_kept_once(
    then: Builds, today: Builds, forget: str | None, tmp_path: Path
) -> None:
    first, second = Life(then, 0.1), Life({**then, **today}, 0.05)
    first.train(0, 5)
    told = resume(first, second, tmp_path, forget=forget)
    assert second.rate == pytest.approx(first.rate / 2, rel=1e-12)
    assert "of the optimizer is due to the scheduler/" in told.notes[-1]
    assert told.notes[-1].endswith("to its other schedulers, cannot be told: their share of the first rates is kept.")
    assert second.schedulers["plateau"].best == first.schedulers["plateau"].best


def test_a_plateau_without_its_optimizer_s_state_is_followed(tmp_path: Path) -> None:
    builds: Builds = {"warm-up": warm_up(8), "plateau": plateau()}
    first, second = Life(builds, 0.1), Life(builds, 0.1)
    first.train(0, 5)
    told = resume(first, second, tmp_path, forget="optimizer", absent=("optimizer",))
    assert told.notes == ["The checkpoint has no optimizer state: it starts fresh."]
    assert second.train(5, 20) == pytest.approx(first.train(5, 20), rel=1e-12)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_several_that_are_unchanged_are_the_checkpoint_s(tensor: bool, tmp_path: Path) -> None:
    builds: Builds = {"warm-up": warm_up(8), "cosine": cosine(), "plateau": plateau()}
    first, second = (Life(builds, 0.1, tensor=tensor) for _ in range(2))
    first.train(0, 7)
    told = resume(first, second, tmp_path)
    assert (told.changes, told.notes) == ({}, [])
    assert second.train(7, 20) == first.train(7, 20)


# In Accelerate's wrapper


@pytest.mark.parametrize("recorded_as", ["ExponentialLR", "AcceleratedScheduler"])
def test_accelerate_s_wrapper_is_replayed_by_the_steps_of_what_it_wraps(
    recorded_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes it takes two steps a call, and none where the optimizer's was skipped."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()  # a test before this one may have left it inside a window
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState, "num_processes", property(lambda _: 2), raising=False)

    def life(rate: float, updates: int) -> Life:
        one = Life({"": lambda o: lr.ExponentialLR(o, 0.9)}, rate)
        optimizer, scheduler = accelerator.prepare(one.optimizer, one.schedulers[""])
        one.live = LiveState(models={}, optimizers={"": optimizer}, schedulers={"": scheduler})
        for _ in range(updates):
            optimizer.step()
            scheduler.step()
        return one

    first, second, twin = life(0.1, 4), life(0.05, 0), life(0.05, 4)
    assert first.live.settings["scheduler/class"] == "ExponentialLR"
    first.live.settings["scheduler/class"] = recorded_as
    told = resume(first, second, tmp_path)
    assert set(told.changes) == {"optimizer[0].lr", "optimizer[0].current_lr"}
    assert (second.rate, second.schedulers[""].last_epoch) == (twin.rate, 8)
