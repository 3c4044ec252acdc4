"""Optimizers inside of others, attributes beside the state, tensors that several states share; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

from dist_train.checkpoint.exchange import export_checkpoint
from dist_train.construction import Construction
from dist_train.errors import StateMismatchError, UnsaveableStateError
from dist_train.state import LiveState
from tests.support.cycle import open_checkpoint, write_checkpoint
from tests.support.kinds import KINDS
from tests.support.kinds_optimizers import EightBit, Lookahead, Sam, plain_layers
from tests.support.scripts import differences, observe_optimizer, train


def live_state(model: nn.Module, optimizer: Any, scheduler: Any = None) -> LiveState:
    schedulers = {} if scheduler is None else {"": scheduler}
    return LiveState(models={"": model}, optimizers={"": optimizer}, schedulers=schedulers)


def cycle(live: LiveState, fresh: LiveState, folder: Path) -> dict[str, Any]:
    write_checkpoint(folder, [live.capture()], live.settings)
    manifest, reader = open_checkpoint(folder)
    try:
        return fresh.restore(manifest.state, manifest.settings, reader).changes
    finally:
        reader.close()


def update(model: nn.Module, optimizer: optim.Optimizer, times: int = 2) -> None:
    for _ in range(times):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(lambda: torch.zeros(()))


def sam(model: nn.Module, lr: float = 0.1) -> Sam:
    return Sam(model.parameters(), optim.SGD, lr=lr, momentum=0.9)


def lookahead(model: nn.Module, lr: float = 0.1) -> Lookahead:
    return Lookahead(optim.SGD(model.parameters(), lr=lr, momentum=0.9))


@pytest.mark.parametrize("make", [sam, lookahead])
def test_a_scheduler_of_the_optimizer_inside_is_restored_and_follows_a_new_rate(make: Any, tmp_path: Path) -> None:
    def build(lr: float) -> LiveState:
        model = plain_layers()
        optimizer = make(model, lr)
        inside = next(one for one in vars(optimizer).values() if isinstance(one, optim.Optimizer))
        return live_state(model, optimizer, optim.lr_scheduler.StepLR(inside, 1, gamma=0.5))

    live, same, other = build(0.1), build(0.1), build(0.4)
    update(live.models[""], live.optimizers[""])
    live.schedulers[""].step()
    assert cycle(live, same, tmp_path / "same") == {}
    cycle(live, other, tmp_path / "other")
    for one, expected in ((same, 0.05), (other, 0.2)):
        assert one.schedulers[""].optimizer.param_groups[0]["lr"] == expected
        assert one.schedulers[""].last_epoch == 1


def test_an_optimizer_that_lost_the_one_inside_is_refused_and_named(tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    plain = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(StateMismatchError, match="the checkpoint holds no optimizer/base_optimizer"):
        cycle(live_state(model, plain), live_state(fresh, sam(fresh)), tmp_path)


class Warm(optim.SGD):
    """Counts beside its state, and has a setting there."""

    def __init__(self, parameters: Any, warm: int) -> None:
        super().__init__(parameters, lr=0.1)
        self.warm, self.count, self.frozen = warm, 0, list(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.since = self.count - self.warm


def test_an_attribute_comes_back_and_one_that_is_constructed_otherwise_is_todays(tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    live, back = live_state(model, Warm(model.parameters(), 3)), live_state(fresh, Warm(fresh.parameters(), 5))
    update(model, live.optimizers[""])
    assert cycle(live, back, tmp_path) == {"optimizer.warm": (3, 5)}
    restored = back.optimizers[""]
    assert (restored.warm, restored.count, restored.since) == (5, 2, -1)
    assert restored.frozen[0] is fresh[0].weight, "parameters are never replaced"


def test_what_is_put_back_before_a_roll_back_is_what_the_script_constructed() -> None:
    model = plain_layers()
    optimizer = Warm(model.parameters(), 3)
    construction = Construction({"": optimizer}, {})
    update(model, optimizer)
    construction.put_back()
    assert (optimizer.warm, optimizer.count, hasattr(optimizer, "since")) == (3, 0, False)


def test_a_shared_table_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    live, back = live_state(model, EightBit(model.parameters())), live_state(fresh, EightBit(fresh.parameters()))
    update(model, live.optimizers[""])
    tables = [tensor for tensor in live.capture().tensors.values() if tensor.shape == (256,)]
    assert len(tables) == 1
    cycle(live, back, tmp_path)
    restored = back.optimizers[""]
    assert {id(state["table"]) for state in restored.state.values()} == {id(restored.table)}
    update(fresh, restored, 1)
    update(model, live.optimizers[""], 1)
    assert differences(*(observe_optimizer(one.optimizers[""], {}, "") for one in (live, back))) == []


def test_state_that_is_a_parameter_itself_is_that_parameter_again(tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    live, back = (live_state(one, optim.SGD(one.parameters(), lr=0.1)) for one in (model, fresh))
    live.optimizers[""].state[model[0].weight]["me"] = model[0].weight.detach()
    cycle(live, back, tmp_path)
    assert back.optimizers[""].state[fresh[0].weight]["me"].data_ptr() == fresh[0].weight.data_ptr()
    assert torch.equal(fresh[0].weight, model[0].weight)


class NotAnOptimizer:
    """A wrapper that has state and is none of torch's."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.slow = torch.zeros(3)

    def state_dict(self) -> Any:
        return {"slow": self.slow, "inner": self.optimizer.state_dict()}


def test_a_wrapper_whose_own_state_would_be_lost_is_refused() -> None:
    model = plain_layers()
    with pytest.raises(UnsaveableStateError, match=r"NotAnOptimizer .* wraps one.*optimizer=that\.optimizer.*register"):
        live_state(model, NotAnOptimizer(optim.SGD(model.parameters(), lr=0.1)))


def test_state_of_a_tensor_that_no_group_has_is_refused() -> None:
    model = plain_layers()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[torch.zeros(7)] = {"x": 1}
    with pytest.raises(
        UnsaveableStateError, match=r"optimizer \(SGD\) keeps state for a tensor \(\[7\] torch.float32\)"
    ):
        live_state(model, optimizer).capture()


class Recording(optim.SGD):
    """A statistic in the group, which is not there at construction."""

    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["trace"] = torch.tensor([0.1, 0.2], dtype=torch.float64) + group.get("trace", 0)


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_a_tensor_in_a_group_stays_one_whether_or_not_the_rate_was_changed(lr: float, tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    live = live_state(model, Recording(model.parameters(), lr=0.1))
    back = live_state(fresh, Recording(fresh.parameters(), lr=lr))
    update(model, live.optimizers[""])
    cycle(live, back, tmp_path)
    now, then = back.optimizers[""].param_groups[0], live.optimizers[""].param_groups[0]
    assert now["lr"] == lr
    assert now["trace"].dtype == torch.float64
    assert torch.equal(now["trace"], then["trace"])


def test_a_changed_rate_keeps_the_precision_of_its_tensor(tmp_path: Path) -> None:
    model, fresh = plain_layers(), plain_layers()
    live, back = (
        live_state(one, optim.SGD(one.parameters(), lr=torch.tensor(lr, dtype=torch.float64)))
        for one, lr in ((model, 0.1), (fresh, 0.3))
    )
    cycle(live, back, tmp_path)
    assert float(back.optimizers[""].param_groups[0]["lr"]) == 0.3


def test_what_an_optimizer_adds_to_its_state_dict_is_exported_as_it_tells_it(tmp_path: Path) -> None:
    script = KINDS["optimizer that adds to its state_dict"].build()
    train(script, tmp_path / "run", 2)
    export_checkpoint(str(tmp_path / "run"), "latest", str(tmp_path / "out.pth"))
    told = torch.load(tmp_path / "out.pth", weights_only=True)["optimizer_state_dict"]
    fresh = KINDS["optimizer that adds to its state_dict"].build()
    fresh.optimizer.load_state_dict(told)
    assert fresh.optimizer.ledger.entries == 2
