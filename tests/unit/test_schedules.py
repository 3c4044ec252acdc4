"""What the user writes now takes effect, what the run had decayed is restored: rates after a resume, bit for bit those
of a run that was configured so from step 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lr

from dist_train.differences import Differences
from dist_train.errors import ConfigError
from dist_train.fingerprints import fingerprints
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, write_checkpoint

Build = Callable[[Optimizer], Any]


@dataclass(kw_only=True)
class Script:
    """One life: two parameter groups, an optimizer, perhaps a scheduler."""

    scheduler: Build | None = None
    lr: Any = 0.4
    second_lr: Any = None
    optimizer: Callable[..., Optimizer] = SGD
    options: dict[str, Any] = field(default_factory=lambda: {"momentum": 0.9})

    def build(self) -> Life:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        second = {} if self.second_lr is None else {"lr": self.second_lr}
        groups = [{"params": [model.weight]}, {"params": [model.bias], **second}]
        optimizer = self.optimizer(groups, lr=self.lr, **self.options)
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        return Life(model, optimizer, scheduler)


class Life:
    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        schedulers = {} if scheduler is None else {"": scheduler}
        self.live = LiveState(models={"": model}, optimizers={"": optimizer}, schedulers=schedulers)

    def train(self, metrics: Sequence[float]) -> list[Any]:
        """What each update used, then what the next one will."""
        used = []
        for metric in metrics:
            used.append(self.rates())
            for parameter in self.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
            if isinstance(self.scheduler, lr.ReduceLROnPlateau):
                self.scheduler.step(metric)
            elif self.scheduler is not None:
                self.scheduler.step()
        return [*used, self.rates()]

    def rates(self) -> list[Any]:
        keys = ("lr", "momentum", "betas")
        groups = self.optimizer.param_groups
        values = [[group[key] for key in keys if key in group] for group in groups]
        return [[float(one) if isinstance(one, torch.Tensor) else one for one in group] for group in values]


def resume(
    one: Life,
    other: Life,
    folder: Path,
    *,
    forget: Sequence[str] = (),
    global_step: int = 0,
    absent: Sequence[str] = (),
) -> Differences:
    """Saves one life and restores it into another; `forget` leaves out keys of state and settings."""
    settings = {key: value for key, value in one.live.settings.items() if "settings" not in forget}
    write_checkpoint(folder, [one.live.capture()], settings)
    manifest, reader = open_checkpoint(folder)
    state = {key: value for key, value in manifest.state.items() if key not in forget}
    try:
        return other.live.restore(state, manifest.settings, reader, absent, global_step)
    finally:
        reader.close()


def worse(count: int) -> list[float]:
    """A metric that does not improve."""
    return [1.0] * count


def warm_up(steps: int) -> Build:
    return lambda optimizer: lr.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))


def sequential(gamma: float, milestone: int = 3) -> Build:
    return lambda optimizer: lr.SequentialLR(
        optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=3), lr.ExponentialLR(optimizer, gamma)], [milestone]
    )


def chained(gamma: float, factor: float = 0.1) -> Build:
    return lambda optimizer: lr.ChainedScheduler(
        [lr.LinearLR(optimizer, factor, total_iters=4), lr.ExponentialLR(optimizer, gamma)]
    )


def nested(total: int) -> Build:
    def build(optimizer: Optimizer) -> Any:
        first = lr.SequentialLR(
            optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=3), lr.CosineAnnealingLR(optimizer, total)], [3]
        )
        return lr.ChainedScheduler([first, lr.StepLR(optimizer, 4, 0.5)])

    return build


def decay(steps: int) -> Build:
    """Begins as any other of its kind, so that only what the function gives later tells them apart."""
    return lambda optimizer: lr.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


THEN_AND_TODAY: dict[str, tuple[Build, Build]] = {
    "lambda": (warm_up(20), warm_up(10)),
    "multiplicative": (
        lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
        lambda o: lr.MultiplicativeLR(o, lambda step: 0.8),
    ),
    "decay to nothing": (decay(20), decay(40)),
    "a function in a chain": (
        lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, total_iters=5), decay(20)(o)]),
        lambda o: lr.ChainedScheduler([lr.LinearLR(o, 0.1, total_iters=5), decay(40)(o)]),
    ),
    "a function in a sequence": (
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=5), decay(20)(o)], [5]),
        lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=5), decay(40)(o)], [5]),
    ),
    "cosine": (lambda o: lr.CosineAnnealingLR(o, 20), lambda o: lr.CosineAnnealingLR(o, 25, eta_min=0.01)),
    "one cycle": (
        lambda o: lr.OneCycleLR(o, 0.4, total_steps=20),
        lambda o: lr.OneCycleLR(o, [0.2, 0.3], total_steps=25, base_momentum=0.8),
    ),
    "one cycle, another beginning": (
        lambda o: lr.OneCycleLR(o, 0.4, total_steps=20),
        lambda o: lr.OneCycleLR(o, 0.4, total_steps=20, pct_start=0.5),
    ),
    "sequential": (sequential(0.9), sequential(0.8, milestone=5)),
    "chained": (chained(0.9), chained(0.8, factor=0.5)),
    "nested": (nested(20), nested(30)),
    "step": (lambda o: lr.StepLR(o, 3), lambda o: lr.StepLR(o, 2, gamma=0.7)),
    "multi step": (lambda o: lr.MultiStepLR(o, [2, 4, 4], 0.5), lambda o: lr.MultiStepLR(o, [3, 7], 0.3)),
    "exponential": (lambda o: lr.ExponentialLR(o, 0.9), lambda o: lr.ExponentialLR(o, 0.8)),
    "polynomial": (lambda o: lr.PolynomialLR(o, 20), lambda o: lr.PolynomialLR(o, 25, power=2.0)),
    "linear": (lambda o: lr.LinearLR(o, 0.1, total_iters=20), lambda o: lr.LinearLR(o, 0.2, total_iters=6)),
    "constant": (lambda o: lr.ConstantLR(o, 0.1, total_iters=3), lambda o: lr.ConstantLR(o, 0.1, total_iters=12)),
    "restarts": (
        lambda o: lr.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
        lambda o: lr.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    ),
    "cyclic": (
        lambda o: lr.CyclicLR(o, 0.1, 0.4, step_size_up=4),
        lambda o: lr.CyclicLR(o, 0.1, 0.5, step_size_up=6, mode="triangular2"),
    ),
    "swa": (
        lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=8),
        lambda o: torch.optim.swa_utils.SWALR(o, 0.02, anneal_epochs=8),
    ),
    "another class": (lambda o: lr.StepLR(o, 3), lambda o: lr.CosineAnnealingLR(o, 20)),
    "a new factor on a chain": (lambda o: lr.ExponentialLR(o, 0.9), chained(0.9)),
}


WITH_FUNCTIONS = ("lambda", "multiplicative", "decay to nothing", "a function in a chain", "a function in a sequence")


@pytest.mark.parametrize("kind", THEN_AND_TODAY)
@pytest.mark.parametrize(("steps", "changed"), [(9, "schedule"), (9, "rate"), (4, "both"), (1, "both"), (0, "both")])
def test_rates_are_those_of_a_run_configured_so_from_step_0(
    kind: str, steps: int, changed: str, tmp_path: Path
) -> None:
    old, new = THEN_AND_TODAY[kind]
    then = Script(scheduler=old)
    today = Script(
        scheduler=old if changed == "rate" else new,
        **({} if changed == "schedule" else {"lr": 0.2, "second_lr": 0.05}),
    )
    first, second, twin = then.build(), today.build(), today.build()
    first.train(worse(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of the order of steps
        told = resume(first, second, tmp_path)
    expected = twin.train(worse(steps + 8))[steps:]
    assert second.train(worse(8)) == expected
    moves_its_own = kind.startswith(("one cycle", "cyclic"))
    assert bool(told.changes) is not (moves_its_own and changed == "rate")


@pytest.mark.parametrize("kind", [*THEN_AND_TODAY, "plateau"])
@pytest.mark.parametrize("recorded", [True, False], ids=["own", "imported"])
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {}], ids=["sgd", "adamw"])
def test_where_nothing_is_changed_everything_is_the_checkpoint_s(
    kind: str, recorded: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    """An imported checkpoint has no record of construction: counters in it must not read as changes."""
    build = THEN_AND_TODAY[kind][0] if kind in THEN_AND_TODAY else lambda o: lr.ReduceLROnPlateau(o, patience=1)
    script = Script(scheduler=build, optimizer=SGD if options else AdamW, options=options)
    first, second = script.build(), script.build()
    first.train([1.0, 0.5, 0.7, 0.8, 0.9, 0.9, 0.9])
    told = resume(first, second, tmp_path, forget=() if recorded else ("settings",))
    assert (told.changes, told.notes) == ({}, [])
    assert second.scheduler.state_dict().keys() == first.scheduler.state_dict().keys()
    assert second.train(worse(6)) == first.train(worse(6))
    assert [group.keys() for group in second.optimizer.param_groups] == [
        group.keys() for group in first.optimizer.param_groups
    ]


@pytest.mark.parametrize("kind", [kind for kind in THEN_AND_TODAY if kind not in WITH_FUNCTIONS])
def test_an_imported_checkpoint_follows_the_schedule_that_is_written_now(kind: str, tmp_path: Path) -> None:
    old, new = THEN_AND_TODAY[kind]
    first, second, twin = Script(scheduler=old).build(), Script(scheduler=new).build(), Script(scheduler=new).build()
    first.train(worse(5))
    told = resume(first, second, tmp_path, forget=["settings"])
    assert told.changes
    assert second.train(worse(8)) == twin.train(worse(13))[5:]


def test_a_new_rate_for_an_imported_checkpoint_wins_and_is_shown_as_what_was_written(tmp_path: Path) -> None:
    build = warm_up(20)
    first, second = Script(scheduler=build).build(), Script(scheduler=build, lr=0.1).build()
    first.train(worse(5))
    told = resume(first, second, tmp_path, forget=["settings"])
    assert told.changes["optimizer[0].lr"] == (0.4, 0.1)
    assert second.rates()[0][0] == 0.1 * (6 / 20)


def test_rates_in_tensors_are_followed_in_place(tmp_path: Path) -> None:
    build = THEN_AND_TODAY["one cycle"][1]
    options: dict[str, Any] = {"foreach": False}

    def script(rate: float, scheduler: Build) -> Life:
        return Script(lr=torch.tensor(rate), optimizer=AdamW, options=options, scheduler=scheduler).build()

    for number, scheduler in enumerate((chained(0.9), build, warm_up(20))):
        first, second, twin = script(0.4, scheduler), script(0.2, scheduler), script(0.2, scheduler)
        kept = [group["lr"] for group in second.optimizer.param_groups]
        first.train(worse(5))
        resume(first, second, tmp_path / str(number))
        assert all(group["lr"] is one for group, one in zip(second.optimizer.param_groups, kept, strict=True))
        assert second.train(worse(8)) == twin.train(worse(13))[5:]


# Schedulers that come and go


def test_a_scheduler_that_is_new_stands_where_the_updates_bring_it(tmp_path: Path) -> None:
    first, second, twin = (
        Script().build(),
        Script(scheduler=chained(0.9)).build(),
        Script(scheduler=chained(0.9)).build(),
    )
    first.train(worse(7))
    told = resume(first, second, tmp_path, global_step=7)
    assert told.changes["scheduler"] == (None, "ChainedScheduler")
    assert told.notes == ["The scheduler is new: it starts where 7 updates bring it, one step an update."]
    assert second.train(worse(5)) == twin.train(worse(12))[7:]


@pytest.mark.parametrize("recorded", [True, False], ids=["own", "imported"])
@pytest.mark.parametrize("kind", ["cosine", "one cycle", "cyclic", "plateau"])
def test_without_its_scheduler_the_rate_is_the_one_that_is_written_now(
    kind: str, recorded: bool, tmp_path: Path
) -> None:
    build = THEN_AND_TODAY[kind][0] if kind in THEN_AND_TODAY else lambda o: lr.ReduceLROnPlateau(o, patience=1)
    first, second, twin = Script(scheduler=build).build(), Script().build(), Script().build()
    first.train(worse(6))
    told = resume(first, second, tmp_path, forget=() if recorded else ["settings"])
    assert told.changes["scheduler"][1] is None
    assert second.rates() == twin.rates()
    assert [group.keys() for group in second.optimizer.param_groups] == [
        group.keys() for group in twin.optimizer.param_groups
    ]


def test_a_group_that_remembers_a_scheduler_whose_state_is_gone_takes_the_rate_that_is_written_now(
    tmp_path: Path,
) -> None:
    first, second = Script(scheduler=chained(0.9)).build(), Script().build()
    first.train(worse(6))
    told = resume(first, second, tmp_path, forget=["settings", "scheduler"], absent=["scheduler"])
    assert second.rates()[0][0] == 0.4
    assert told.changes["scheduler"] == ("another", None)


def test_a_scheduler_that_the_checkpoint_was_made_without_starts_fresh(tmp_path: Path) -> None:
    script = Script(scheduler=chained(0.9))
    first, second, fresh = script.build(), script.build(), script.build()
    first.train(worse(6))
    told = resume(first, second, tmp_path, forget=["settings", "scheduler"], absent=["scheduler"], global_step=6)
    assert told.notes == ["The checkpoint has no scheduler state: it starts fresh."]
    assert second.train(worse(5)) == fresh.train(worse(5))


def test_a_schedule_without_its_optimizer_s_state_is_followed(tmp_path: Path) -> None:
    script = Script(scheduler=chained(0.9))
    first, second = script.build(), script.build()
    first.train(worse(6))
    told = resume(first, second, tmp_path, forget=["settings", "optimizer"], absent=["optimizer"])
    assert told.notes == ["The checkpoint has no optimizer state: it starts fresh."]
    assert second.train(worse(5)) == first.train(worse(5))


def test_kinds_that_nothing_here_would_have_are_not_missed(tmp_path: Path) -> None:
    first, second = Script().build(), Script().build()
    told = resume(first, second, tmp_path, absent=["scheduler", "scaler", "rng", "user"])
    assert told.notes == [
        "The checkpoint has no state of the random generators: they are left as this process has seeded them."
    ]


def test_a_schedule_that_is_shorter_than_the_run_is_refused_before_any_tensor_is_loaded(tmp_path: Path) -> None:
    first = Script(scheduler=lambda o: lr.OneCycleLR(o, 0.4, total_steps=20)).build()
    second = Script(scheduler=lambda o: lr.OneCycleLR(o, 0.4, total_steps=6)).build()
    first.train(worse(9))
    before = [parameter.clone() for parameter in second.model.parameters()]
    with pytest.raises(ConfigError, match=r"scheduler \(OneCycleLR\) .* at its step 9: .* ends before, at step 6"):
        resume(first, second, tmp_path)
    assert all(torch.equal(*pair) for pair in zip(before, second.model.parameters(), strict=True))


def test_restarts_that_are_stepped_to_fractions_of_an_epoch_are_followed(tmp_path: Path) -> None:
    def life(period: int) -> Life:
        return Script(scheduler=lambda o: lr.CosineAnnealingWarmRestarts(o, period, T_mult=2)).build()

    first, second, twin = life(2), life(3), life(3)
    for batch in range(30):
        first.scheduler.step(batch / 4)
        twin.scheduler.step(batch / 4)
    resume(first, second, tmp_path)
    assert second.rates() == twin.rates()
    assert second.scheduler.T_cur == twin.scheduler.T_cur


# ReduceLROnPlateau


def plateau(**options: Any) -> Build:
    return lambda optimizer: lr.ReduceLROnPlateau(optimizer, **{"factor": 0.5, "patience": 1, **options})


METRICS = [1.0, 0.9, 0.95, 0.95, 0.8, 0.85, 0.85, 0.7, 0.75]
"""Two reductions with a patience of one, and one bad epoch."""


@pytest.mark.parametrize(
    ("today", "rate", "recorded"),
    [
        pytest.param({"factor": 0.1}, 0.4, True, id="factor"),
        pytest.param({"factor": 0.1}, 0.4, False, id="factor-imported"),
        pytest.param({}, 0.1, True, id="rate"),
        pytest.param({"factor": 0.1, "min_lr": 0.02}, 0.1, True, id="floor"),
        pytest.param({"min_lr": [0.3, 0.01]}, 0.4, True, id="floors"),
        pytest.param({"min_lr": [0.3, 0.01]}, 0.4, False, id="floors-imported"),
        pytest.param({"cooldown": 2}, 0.3, True, id="cooldown"),
    ],
)
def test_a_plateau_is_as_often_reduced_as_it_was(
    today: dict[str, Any], rate: float, recorded: bool, tmp_path: Path
) -> None:
    """The plateau of an imported checkpoint does not tell the rate that it began with; today's is tried."""
    first = Script(scheduler=plateau()).build()
    second = Script(scheduler=plateau(**today), lr=rate).build()
    twin = Script(scheduler=plateau(**{**today, "cooldown": 0}), lr=rate).build()
    first.train(METRICS)
    twin.train(METRICS)
    told = resume(first, second, tmp_path, forget=() if recorded else ["settings"])
    assert told.notes == []
    assert second.rates() == twin.rates()
    kept = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter", "_last_lr")
    assert [getattr(second.scheduler, name) for name in kept] == [getattr(twin.scheduler, name) for name in kept]


def test_more_patience_changes_no_rate(tmp_path: Path) -> None:
    first, second = Script(scheduler=plateau()).build(), Script(scheduler=plateau(patience=5)).build()
    first.train(METRICS)
    assert resume(first, second, tmp_path).changes == {"scheduler.patience": (1, 5)}
    assert second.rates() == first.rates()
    assert (second.scheduler.best, second.scheduler.num_bad_epochs, second.scheduler.patience) == (0.7, 1, 5)


def test_a_rate_that_no_number_of_reductions_gives_keeps_its_share(tmp_path: Path) -> None:
    first, second = Script(scheduler=plateau()).build(), Script(scheduler=plateau(), lr=0.2).build()
    first.optimizer.param_groups[0]["lr"] = 0.3
    told = resume(first, second, tmp_path)
    assert [group["lr"] for group in second.optimizer.param_groups] == [pytest.approx(0.15), 0.2]
    assert told.notes == [
        "The learning rate of group 0 is 0.3 in the checkpoint, which no number of reductions of 0.4 by 0.5 gives: its "
        "share of the first rate is kept."
    ]


def test_what_was_best_is_forgotten_in_the_other_direction(tmp_path: Path) -> None:
    first, second = Script(scheduler=plateau()).build(), Script(scheduler=plateau(mode="max")).build()
    first.train(METRICS)
    resume(first, second, tmp_path)
    assert second.rates() == first.rates()
    assert (second.scheduler.best, second.scheduler.num_bad_epochs) == (float("-inf"), 0)
    assert second.scheduler.last_epoch == len(METRICS)


def test_a_plateau_in_a_tensor_is_followed(tmp_path: Path) -> None:
    def life(rate: float) -> Life:
        options: dict[str, Any] = {"foreach": False}
        rates = {"lr": torch.tensor(rate), "second_lr": torch.tensor(rate)}  # a shared one is reduced twice
        return Script(**rates, optimizer=AdamW, options=options, scheduler=plateau(factor=0.3)).build()

    first, second, twin = life(0.4), life(0.1), life(0.1)
    first.train(METRICS)
    twin.train(METRICS)
    assert resume(first, second, tmp_path).notes == []
    assert second.rates() == twin.rates()


@pytest.mark.parametrize("build", [chained(0.9), warm_up(9)], ids=["chained", "lambda"])
def test_a_plateau_that_becomes_a_schedule_is_replayed_by_its_own_steps(build: Build, tmp_path: Path) -> None:
    first, second, twin = (
        Script(scheduler=plateau()).build(),
        Script(scheduler=build).build(),
        Script(scheduler=build).build(),
    )
    first.train(METRICS)
    told = resume(first, second, tmp_path, global_step=50 * len(METRICS))  # stepped once an epoch
    assert told.changes["scheduler"] == ("ReduceLROnPlateau", type(second.scheduler).__name__)
    assert told.notes == []
    assert second.train(worse(6)) == twin.train(worse(len(METRICS) + 6))[len(METRICS) :]


def test_a_schedule_that_becomes_a_plateau_starts_with_the_rate_that_is_written_now(tmp_path: Path) -> None:
    first, second = Script(scheduler=chained(0.9)).build(), Script(scheduler=plateau()).build()
    first.train(worse(6))
    told = resume(first, second, tmp_path)
    assert told.notes == ["The scheduler (ReduceLROnPlateau) is new and starts fresh."]
    assert second.rates()[0][0] == 0.4
    assert second.scheduler.last_epoch == 0


# A user's own schedulers, and objects that have trained already


class OwnScheduler:
    """Counts nothing that anybody else knows."""

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.optimizer, self.decay, self.calls = optimizer, decay, 0

    def step(self) -> None:
        self.calls += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= self.decay

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def test_a_scheduler_of_one_s_own_is_merged_field_by_field(tmp_path: Path) -> None:
    first = Script(scheduler=lambda o: OwnScheduler(o, 0.5)).build()
    second = Script(scheduler=lambda o: OwnScheduler(o, 0.8)).build()
    first.train(worse(2))
    assert resume(first, second, tmp_path).changes == {"scheduler.decay": (0.5, 0.8)}
    assert (second.scheduler.calls, second.scheduler.decay) == (2, 0.8)
    assert second.rates()[0][0] == 0.1


def test_an_imported_one_of_one_s_own_is_the_checkpoint_s(tmp_path: Path) -> None:
    first = Script(scheduler=lambda o: OwnScheduler(o, 0.5)).build()
    second = Script(scheduler=lambda o: OwnScheduler(o, 0.8)).build()
    first.train(worse(2))
    assert resume(first, second, tmp_path, forget=["settings"]).changes == {}
    assert (second.scheduler.calls, second.scheduler.decay) == (2, 0.5)


class OwnOfTensors(OwnScheduler):
    """Computes a rate from the one that it began with, which may lie in a tensor."""

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        super().__init__(optimizer, decay)
        self.bases = [group["lr"] for group in optimizer.param_groups]

    def step(self) -> None:
        self.calls += 1
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = base * self.decay**self.calls

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "bases": self.bases}


def test_one_of_one_s_own_that_keeps_tensors_computes_with_tensors(tmp_path: Path) -> None:
    options: dict[str, Any] = {"foreach": False}
    first, second, twin = (
        Script(
            lr=torch.tensor(rate), optimizer=AdamW, options=options, scheduler=lambda o: OwnOfTensors(o, 0.9)
        ).build()
        for rate in (0.1, 0.07, 0.07)
    )
    first.train(worse(3))
    resume(first, second, tmp_path)
    assert all(isinstance(base, torch.Tensor) for base in second.scheduler.bases)
    assert second.train(worse(4))[1:] == twin.train(worse(7))[4:]


class OwnCounting(lr.LRScheduler):
    """A subclass of torch's, with one more counter."""

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        self.decay, self.restarts = decay, 0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        self.restarts += 1
        return [base * self.decay**self.last_epoch for base in self.base_lrs]


def test_a_subclass_of_torch_s_is_followed_too(tmp_path: Path) -> None:
    def life(decay: float) -> Life:
        return Script(scheduler=lambda o: OwnCounting(o, decay)).build()

    first, second, twin = life(0.5), life(0.9), life(0.9)
    first.train(worse(4))
    twin.train(worse(4))
    resume(first, second, tmp_path)
    assert second.rates() == twin.rates()
    assert second.scheduler.state_dict() == twin.scheduler.state_dict()


@pytest.mark.parametrize("kind", [kind for kind in THEN_AND_TODAY if kind != "another class"])
def test_objects_that_have_trained_already_are_restored_as_fresh_ones_are(kind: str, tmp_path: Path) -> None:
    """A notebook's cell, run again."""
    script = Script(scheduler=THEN_AND_TODAY[kind][0])
    first, used = script.build(), script.build()
    first.train(worse(3))
    used.train(worse(5))
    again = Life(used.model, used.optimizer, used.scheduler)
    assert resume(first, again, tmp_path).changes == {}
    assert again.train(worse(6)) == first.train(worse(6))


def test_a_setting_changed_on_an_object_that_has_trained_takes_effect_from_here_on(tmp_path: Path) -> None:
    first, used = (Script(scheduler=lambda o: lr.ExponentialLR(o, 0.5)).build() for _ in range(2))
    first.train(worse(3))
    used.train(worse(5))
    used.scheduler.gamma = 0.1
    again = Life(used.model, used.optimizer, used.scheduler)
    told = resume(first, again, tmp_path)
    assert told.changes["scheduler.gamma"] == (0.5, 0.1)
    assert "Make the optimizer and the scheduler anew" in told.notes[0]
    assert again.scheduler.last_epoch == 3
    assert again.rates()[0][0] == 0.05


# Other settings of the optimizer


def test_what_a_schedule_does_not_set_is_merged_beside_it(tmp_path: Path) -> None:
    first = Script(scheduler=chained(0.9)).build()
    second = Script(scheduler=chained(0.9), options={"momentum": 0.8, "weight_decay": 0.1}).build()
    first.optimizer.param_groups[1]["nesterov"] = True  # by the loop, in training
    first.train(worse(5))
    told = resume(first, second, tmp_path)
    assert set(told.changes) == {f"optimizer[{i}].{key}" for i in (0, 1) for key in ("momentum", "weight_decay")}
    assert [group["momentum"] for group in second.optimizer.param_groups] == [0.8, 0.8]
    assert [group["nesterov"] for group in second.optimizer.param_groups] == [False, True]
    assert [rates[0] for rates in second.rates()] == [rates[0] for rates in first.rates()]


def test_two_optimizers_keep_their_own_schedulers(tmp_path: Path) -> None:
    def gan(rate: float) -> tuple[LiveState, list[Optimizer], list[Any]]:
        models = {name: nn.Linear(1, 1) for name in ("g", "d")}
        optimizers = {name: SGD(model.parameters(), lr=rate) for name, model in models.items()}
        optimizers["d"].param_groups[0]["lr"] = 0.4
        schedulers = {name: chained(0.9)(one) for name, one in optimizers.items()}
        live = LiveState(models=dict(models), optimizers=optimizers, schedulers=schedulers)
        return live, list(optimizers.values()), list(schedulers.values())

    (live, optimizers, schedulers), (back, restored, _) = gan(0.4), gan(0.2)
    for optimizer, scheduler, steps in zip(optimizers, schedulers, (5, 3), strict=True):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
    write_checkpoint(tmp_path, [live.capture()], live.settings)
    manifest, reader = open_checkpoint(tmp_path)
    told = back.restore(manifest.state, manifest.settings, reader)
    reader.close()
    assert set(told.changes) == {"optimizer/g[0].lr", "optimizer/g[0].current_lr"}
    rates = [[one.param_groups[0]["lr"] for one in group] for group in (optimizers, restored)]
    assert rates[1] == [pytest.approx(rates[0][0] / 2, rel=1e-12), rates[0][1]]


def test_accelerate_s_wrapper_hides_neither_the_class_nor_the_schedule(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def life(rate: float) -> tuple[LiveState, Optimizer]:
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=rate)
        scheduler = chained(0.9)(optimizer)
        wrapped = Accelerator(cpu=True).prepare(optimizer)
        live = LiveState(models={"": model}, optimizers={"": wrapped}, schedulers={"": scheduler})
        for _ in range(4 if rate == 0.4 else 0):
            optimizer.step()
            scheduler.step()
        return live, optimizer

    (live, optimizer), (back, restored) = life(0.4), life(0.8)
    assert live.settings["optimizer/class"] == "SGD"
    write_checkpoint(tmp_path, [live.capture()], {**live.settings, "optimizer/class": "AcceleratedOptimizer"})
    manifest, reader = open_checkpoint(tmp_path)
    back.restore(manifest.state, manifest.settings, reader)
    reader.close()
    assert restored.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] * 2


def test_a_manifest_that_recorded_tensors_by_name_reads_as_unchanged(tmp_path: Path) -> None:
    """As settings were written once."""
    options: dict[str, Any] = {"foreach": False}
    first, second = (
        Script(lr=torch.tensor(0.4), optimizer=AdamW, options=options, scheduler=chained(0.9)).build() for _ in range(2)
    )
    first.train(worse(5))
    tag = {"$": "tensor", "name": "scheduler/base_lrs/0", "device": "cpu"}
    for one in first.live.settings["scheduler"]["_schedulers"]:
        one["base_lrs"] = [tag, tag]
    assert resume(first, second, tmp_path).changes == {}
    assert second.train(worse(3)) == first.train(worse(3))


def test_a_function_whose_table_ends_is_compared_as_far_as_it_goes() -> None:
    def table(*rates: float) -> list[str]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return fingerprints(lr.LambdaLR(optimizer, lambda step: rates[step]))

    assert table(1.0, 0.5) == table(1.0, 0.5)
    assert table(1.0, 0.5) != table(1.0, 0.25)
    assert table(1.0, 0.5) != table(1.0, 0.5, 0.5)
