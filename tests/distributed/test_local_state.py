"""Plain optimizer state of an optimizer that works on the local part of sharded parameters: each rank's is kept."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_train as dt
from dist_train.errors import DisagreementError, StateMismatchError, UnsaveableStateError
from dist_train.run import Run
from tests.support.forked import run_ranks
from tests.support.twins import read_checkpoint

pytestmark = pytest.mark.distributed
ROWS = 7
"""Five ranks hold 2, 2, 2, 1 and 0 of them."""


class BlockwiseMomentum(torch.optim.Optimizer):
    """Momentum in 8 bits with a scale a block of 4, over whatever lies here: as optimizers with 8-bit state do."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                local, grad = _local(parameter).reshape(-1), _local(parameter.grad).reshape(-1)
                padding = -local.numel() % 4
                state = self.state[parameter]
                if not state:
                    state["codes"] = torch.zeros(local.numel(), dtype=torch.int8)
                    state["scales"] = torch.zeros((local.numel() + padding) // 4)
                    state["count"] = torch.zeros(1)
                scales = state["scales"].repeat_interleave(4)[: local.numel()]
                momentum = 0.9 * state["codes"].float() * scales + grad
                blocks = nn.functional.pad(momentum, (0, padding)).view(-1, 4)
                state["scales"] = blocks.abs().amax(1) / 127
                codes = (blocks / state["scales"].clamp(min=1e-30)[:, None]).round().to(torch.int8)
                state["codes"] = codes.reshape(-1)[: local.numel()].clone()
                state["count"] += 1
                local.sub_(group["lr"] * momentum)


class Counting(torch.optim.SGD):
    """Keeps a count of one element for each parameter, and the whole gradient of the last step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", torch.zeros(1)) + 1
                grad = parameter.grad
                state["last"] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


class Means(torch.optim.SGD):
    """Keeps the mean square of each row (or column) of the gradient, in whatever that is."""

    dim = 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.dim() > 1):
                state, mean = self.state[parameter], parameter.grad.square().mean(self.dim)
                state["mean"] = mean if "mean" not in state else 0.5 * state["mean"] + mean


class MeansOfColumns(Means):
    """Of rows that are spread unevenly over the ranks: torch reduces these at once, and every rank has all of them."""

    dim = 0


class ReducedColumns(torch.optim.SGD):
    """Keeps what a reduction makes of each column of the gradient, whose rows are spread over the ranks."""

    def __init__(self, parameters: Iterable[nn.Parameter], reduction: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(parameters, lr=0.1)
        self._reduction = reduction

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.dim() > 1):
                self.state[parameter]["column"] = self._reduction(parameter.grad.square())


class PassingOver(BlockwiseMomentum):
    """Makes no state where a rank's part has no elements."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        everything = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [one for one in group["params"] if _local(one).numel()]
        super().step()
        for group, parameters in zip(self.param_groups, everything, strict=True):
            group["params"] = parameters


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


KINDS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "blockwise": lambda model: BlockwiseMomentum(model.parameters()),
    "passing over": lambda model: PassingOver(model.parameters()),
    "counting": lambda model: Counting(model.parameters(), lr=0.1),
    "rows": lambda model: Means(model.parameters(), lr=0.1),
    "columns": lambda model: MeansOfColumns(model.parameters(), lr=0.1),
    "sum": lambda model: ReducedColumns(model.parameters(), lambda grad: grad.sum(0)),
    "max": lambda model: ReducedColumns(model.parameters(), lambda grad: grad.amax(0)),
}


def train(run_dir: Path, kind: str, resume: str, updates: int, sharded: bool = True) -> dict[str, list[Any]]:
    """On each rank: trains, and saves where it trained; returns weights and state as they lie here."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    model: nn.Module = nn.Sequential(nn.Linear(5, ROWS), nn.Linear(ROWS, 3, bias=False))
    if sharded:
        fully_shard(model)
    optimizer = KINDS[kind](model)
    policy = dt.CheckpointPolicy(at_end=False)
    options = dt.RunOptions(own_gradients=True)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "policy": policy, "options": options}
    with contextlib.redirect_stdout(io.StringIO()), Run(str(run_dir), resume=resume, **parts) as run:
        for _ in run.epochs(1 if updates else 0):
            for step in range(run.global_step, run.global_step + updates):
                inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()
            run.save(wait=True)
    states = [value for p in model.parameters() for value in (p.detach(), *optimizer.state[p].values())]
    whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in states]
    return {
        "local": [_local(value).tolist() for value in states],
        "whole": [value.tolist() for value in whole],
        "steps": [run.global_step],
    }


def refusal(run_dir: Path, kind: str, sharded: bool, resume: str = "must", updates: int = 0) -> str:
    try:
        train(run_dir, kind, resume, updates, sharded)
    except (DisagreementError, StateMismatchError, UnsaveableStateError) as error:
        return str(error)
    return ""


def test_each_rank_gets_its_own_state_back(tmp_path: Path) -> None:
    saved = run_ranks(train, 5, tmp_path / "run", "blockwise", "never", 2)
    assert run_ranks(train, 5, tmp_path / "run", "blockwise", "must", 0) == saved
    assert saved[0]["local"][1] != saved[1]["local"][1], "the ranks held the same: nothing was shown"
    manifest, tensors = read_checkpoint(tmp_path / "run")
    shapes = [list(tensors[f"optimizer/~rank-{rank:05d}/0.weight/codes"].shape) for rank in range(5)]
    assert shapes == [[10], [10], [10], [5], [0]]
    assert "optimizer/0.weight/codes" not in manifest.tensors
    assert manifest.state["optimizer"]["apart"]["0.weight"]["layout"]["placements"] == ["shard 0"]


def test_the_run_that_goes_on_equals_the_one_that_was_not_left(tmp_path: Path) -> None:
    twin = run_ranks(train, 2, tmp_path / "twin", "blockwise", "never", 4)
    run_ranks(train, 2, tmp_path / "run", "blockwise", "never", 2)
    run_ranks(train, 2, tmp_path / "run", "blockwise", "must", 2)
    assert run_ranks(train, 2, tmp_path / "run", "blockwise", "must", 0) == twin


@pytest.mark.parametrize(("world_size", "sharded"), [(1, False), (3, True), (2, False)])
def test_another_layout_is_refused_and_the_tensor_named(tmp_path: Path, world_size: int, sharded: bool) -> None:
    run_ranks(train, 2, tmp_path / "run", "blockwise", "never", 1)
    told = run_ranks(refusal, world_size, tmp_path / "run", "blockwise", sharded)
    assert all("optimizer/0.weight/codes" in text and "start the optimizer afresh" in text for text in told)
    assert all("spread by [shard 0] over a mesh of [2]" in text for text in told)


@pytest.mark.parametrize(("world_size", "sharded"), [(1, False), (3, True)])
def test_what_no_layout_cuts_goes_to_any(tmp_path: Path, world_size: int, sharded: bool) -> None:
    saved = run_ranks(train, 2, tmp_path / "run", "counting", "never", 2)
    loaded = run_ranks(train, world_size, tmp_path / "run", "counting", "must", 0, sharded)
    for rank in loaded:
        assert rank["local"][1::3] == saved[0]["local"][1::3], "counts"
        assert rank["local"][2::3] == saved[0]["local"][2::3], "the last gradients, whole"


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("rows", (2, True), (3, True)),
        ("rows", (2, True), (1, False)),
        ("rows", (1, False), (2, True)),
        ("columns", (2, True), (1, False)),
        ("columns", (1, False), (2, True)),
    ],
)
def test_a_dtensor_of_another_shape_than_its_parameter_is_one_again(
    tmp_path: Path, kind: str, source: tuple[int, bool], target: tuple[int, bool]
) -> None:
    saved = run_ranks(train, source[0], tmp_path / "run", kind, "never", 2, source[1])
    loaded = run_ranks(train, target[0], tmp_path / "run", kind, "must", 0, target[1])
    assert [rank["whole"] for rank in loaded] == [saved[0]["whole"]] * target[0]
    run_ranks(train, target[0], tmp_path / "run", kind, "must", 1, target[1])  # and the optimizer goes on with it


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_what_ranks_hold_terms_of_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    for text in run_ranks(refusal, 2, tmp_path / "run", kind, True, "never", 1):
        assert f"optimizer/0.weight/column is a DTensor placed P({kind}) on mesh dimension 0" in text
        assert "redistribute(placements=[Replicate()])" in text


def test_state_that_only_some_ranks_keep_is_named_on_all(tmp_path: Path) -> None:
    for text in run_ranks(refusal, 5, tmp_path / "run", "passing over", True, "never", 1):
        assert "rank 0 has optimizer/1.weight/codes and rank 3 has not" in text
        assert "keep empty state" in text
