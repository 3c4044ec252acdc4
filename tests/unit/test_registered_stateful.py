"""Objects that a user has for torch.distributed.checkpoint already: registered as they are, or refused at once."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import dist_train as dt
from dist_train.errors import UnsaveableStateError
from tests.support.small_run import manifests_of


class Everything(Stateful):
    """Nested as people nest, with what they put there."""

    def __init__(self, value: int) -> None:
        self.state: Any = OrderedDict(
            counts=[value, {"deep": (torch.full((2,), value), value / 3)}],
            by_number={1: torch.tensor(value, dtype=torch.bfloat16), 2: None},
            names={"a", "b"},
            array=np.arange(value),
            flags=(True, "text", b"bytes", float("nan")),
            both=[torch.zeros(2, 0), torch.tensor(True)],
        )

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


class Wrapped(Stateful):
    """torchtitan's way: the model's state by dcp's own functions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


class Aliased(Stateful):
    """Two names for one tensor when it is made, for two when it was saved: neither may be written into the other."""

    def __init__(self) -> None:
        self.now = self.best = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.now, self.best = state_dict["now"], state_dict["best"]


def one_update(run_dir: Path, **registered: Any) -> None:
    with dt.Run(str(run_dir), model=nn.Linear(1, 1)) as run:
        for name, one in registered.items():
            run.register(name, one)
        for _ in run.epochs(run.epochs_completed + 1):
            run.step()


def test_what_implements_the_protocol_of_torch_comes_back_as_it_was(tmp_path: Path) -> None:
    saved, back = Everything(5), Everything(0)
    assert isinstance(saved, Stateful)
    one_update(tmp_path, everything=saved)
    with dt.Run(str(tmp_path), model=nn.Linear(1, 1), resume="must") as run:
        run.register("everything", back)
    then, now = saved.state, back.state
    assert now["counts"][0] == 5
    assert torch.equal(now["counts"][1]["deep"][0], then["counts"][1]["deep"][0])
    assert now["counts"][1]["deep"][1] == 5 / 3
    assert now["by_number"][1].dtype == torch.bfloat16
    assert float(now["by_number"][1]) == 5
    assert now["by_number"][2] is None
    assert (now["names"], now["array"].tolist(), now["flags"][:3]) == (
        {"a", "b"},
        [0, 1, 2, 3, 4],
        (True, "text", b"bytes"),
    )
    assert now["both"][0].shape == (2, 0)
    assert bool(now["both"][1])


def test_the_functions_of_torch_over_the_runs_model_store_it_once(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with dt.Run(str(tmp_path), model=model) as run:
        run.register("wrapped", Wrapped(model))
        for _ in run.epochs(1):
            run.step()
    assert manifests_of(tmp_path)[-1]["aliases"] == {
        "user/wrapped/weight": "model/weight",
        "user/wrapped/bias": "model/bias",
    }
    back = nn.Linear(2, 2)
    with dt.Run(str(tmp_path), model=back, resume="must") as run:
        run.register("wrapped", Wrapped(back))
    assert torch.equal(back.weight, model.weight)


def test_names_that_meant_one_tensor_and_mean_two_now_get_their_own_values(tmp_path: Path) -> None:
    saved, back = Aliased(), Aliased()
    saved.best = torch.ones(3)
    one_update(tmp_path, aliased=saved)
    one_update(tmp_path, aliased=back)
    assert (back.now.tolist(), back.best.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        pytest.param(len, "builtin_function_or_method", id="a function"),
        pytest.param(nn.Linear(1, 1), "torch.nn.modules.linear.Linear", id="a module"),
        pytest.param(torch.ones(2).to_sparse(), "layout torch.sparse_coo", id="a sparse tensor"),
        pytest.param(torch.ones(2, device="meta"), "on the meta device", id="a meta tensor"),
        pytest.param(np.array([object()]), "numpy.ndarray", id="an array of objects"),
        pytest.param(torch.Generator(), "torch._C.Generator", id="a generator"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_update(value: Any, told: str, tmp_path: Path) -> None:
    one = Everything(1)
    one.state = {"fine": 1, "list": [0, defaultdict(int, {"inner": value})]}
    steps = 0
    with pytest.raises(UnsaveableStateError) as caught, dt.Run(str(tmp_path), model=nn.Linear(1, 1)) as run:
        run.register("mine", one)
        for _ in run.epochs(1):
            steps += 1
    assert steps == 0
    assert "user/mine/list/1/inner" in str(caught.value)
    assert told in str(caught.value)
