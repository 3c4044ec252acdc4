"""Parameters that were added, removed or given another shape between a save and a load: refused, or loaded in part."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

import dist_train as dt
from dist_train.errors import ConfigError, StateMismatchError
from tests.support.forked import run_ranks
from tests.support.grown import adam, assert_same, network, train, values
from tests.support.small_run import events_of, manifests_of

HEADS = ("head.*", "new_head.*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of four updates, and what it ended with."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    return run_dir, values(*train(run_dir, network(), steps=4))


@pytest.fixture
def run_dir(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "run", symlinks=True))


def notes_of(run_dir: Path) -> list[str]:
    notes: list[str] = events_of(run_dir, "resumed")[-1]["notes"]
    return notes


# Refused


def test_another_head_is_refused_and_the_message_says_how_to_load_the_rest(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError) as caught:
        train(run_dir, network("new_head"), steps=5)
    for text in (
        "model/head.weight is in the checkpoint and not in the model",
        "model/new_head.bias is in the model and not in the checkpoint",
        "partial_load=('new_head.*', 'head.*')",
        "warm_start",
    ):
        assert text in str(caught.value), text


def test_what_the_message_suggests_is_what_loads(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError) as caught:
        train(run_dir, network("new_head", adapter=True), steps=5)
    suggested = re.search(r"partial_load=\(([^)]*)\)", str(caught.value))
    assert suggested
    patterns = re.findall(r"'([^']+)'", suggested[1])
    train(run_dir, network("new_head", adapter=True), steps=4, partial_load=patterns)


def test_weights_of_another_dtype_are_told_as_such_and_no_partial_load_is_suggested(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError) as caught:
        train(run_dir, network().bfloat16(), steps=5)
    assert re.search(r"\d+ of them differ in the dtype alone", str(caught.value))
    assert "build the model in the checkpoint's (torch.float32)" in str(caught.value)
    assert "partial_load" not in str(caught.value)
    mixed = network("new_head")
    mixed.body.bfloat16()
    with pytest.raises(StateMismatchError, match=r"2 of them differ in the dtype alone.*partial_load=\('new_head"):
        train(run_dir, mixed, steps=5)


def test_what_no_pattern_matches_stays_strict(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"model/adapter.bias is in the model") as caught:
        train(run_dir, network("new_head", adapter=True), steps=5, partial_load=HEADS)
    assert "head" not in str(caught.value).partition("partial_load")[0]


def test_patterns_that_would_load_nothing_are_refused(run_dir: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(StateMismatchError, match=r"no tensor at all would be loaded into the model: all 2 differ"):
        train(run_dir, other, steps=5, partial_load=("*",))


def test_another_class_of_optimizer_is_refused_whatever_the_patterns_say(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"the optimizer was a AdamW and is a SGD now"):
        train(run_dir, network(), lambda m: torch.optim.SGD(m.parameters(), 0.1), steps=5, partial_load=("*",))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("head.*", "is the text 'head.*'"),
        ((3,), "holds 3"),
        (("a", "!"), "holds '!'"),
        (("!a",), "is ('!a',): nothing"),
    ],
)
@pytest.mark.parametrize("name", ["partial_load", "exclude"])
def test_what_is_no_tuple_of_patterns_is_refused(wrong: Any, told: str, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"RunOptions.{name} {told}")):
        dt.RunOptions(**{name: wrong})
    with pytest.raises(ConfigError, match=re.escape(f"TrainConfig.{name} {told}")):
        dt.TrainConfig(run_dir="r", epochs=1, global_batch_size=4, **{name: wrong})


# Loaded in part


def test_what_fits_is_loaded_with_its_optimizer_state_and_the_rest_is_as_constructed(
    run_dir: Path, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    fresh = network("new_head").state_dict()
    found = values(*train(run_dir, network("new_head"), steps=4, partial_load=HEADS))
    then = {name: value for name, value in saved[1].items() if not name.startswith("head")}
    mine = {name: fresh[name] for name in ("new_head.weight", "new_head.bias")}
    assert_same(found, {**then, **mine})


def test_what_came_of_it_is_told_once(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(run_dir, network("new_head"), steps=5, partial_load=(*HEADS, "nothing.*"))
    told = notes_of(run_dir)
    said = capfd.readouterr().out
    for text in (
        "Loaded in part: 3 of the 5 tensors of the model are those of the checkpoint.",
        "new, as constructed (2): new_head.bias, new_head.weight",
        "left in the checkpoint (2): head.bias, head.weight",
        "of 2 parameters it goes on, of 2 it starts fresh, of 2 it is left in the checkpoint",
        "nothing.* matches no tensor",
    ):
        assert any(text in note for note in told), text
        assert text in said, text
    train(run_dir, network("new_head"), steps=6, partial_load=(*HEADS, "nothing.*"))
    assert notes_of(run_dir) == []


def test_a_tensor_of_another_shape_stays_as_constructed_and_its_state_starts_fresh(run_dir: Path) -> None:
    fresh = network(width=5).state_dict()
    model, optimizer = train(run_dir, network(width=5), steps=4, partial_load=("head.*",))
    assert torch.equal(model.head.weight, fresh["head.weight"])
    assert model.head.weight not in optimizer.state
    assert int(optimizer.state[model.body.weight]["step"]) == 4
    assert any("head.weight ([2, 4] torch.float32 -> [5, 4] torch.float32)" in note for note in notes_of(run_dir))
    train(run_dir, network(width=5), steps=6, partial_load=("head.*",))


def test_a_resume_after_a_partial_load_is_exact_across_kills(run_dir: Path, tmp_path: Path) -> None:
    straight = Path(shutil.copytree(run_dir, tmp_path / "straight", symlinks=True))
    expected = values(*train(straight, network("new_head"), steps=9, partial_load=HEADS))
    for kill_at in (4, 6):  # before the first checkpoint of the new model, and after its second
        with pytest.raises(AssertionError, match="died without an answer"):
            run_ranks(killed, 1, run_dir, kill_at)
    assert_same(values(*train(run_dir, network("new_head"), steps=9, partial_load=HEADS)), expected)
    assert [one["progress"]["global_step"] for one in manifests_of(run_dir)][-1] == 9


def killed(run_dir: Path, kill_at: int) -> None:
    train(run_dir, network("new_head"), steps=9, kill_at=kill_at, partial_load=HEADS)


def test_a_pattern_that_begins_with_an_exclamation_mark_takes_names_out(run_dir: Path) -> None:
    with pytest.raises(StateMismatchError, match=r"model/adapter.bias is in the model and not"):
        train(run_dir, network(adapter=True), steps=4, partial_load=("*", "!adapter.bias"))
    train(run_dir, network(adapter=True), steps=4, partial_load=("*", "!body.*", "!nothing.*"))
    assert any("!nothing.* matches no tensor" in note for note in notes_of(run_dir))


# Several models


def test_models_and_their_optimizers_may_come_and_go(tmp_path: Path) -> None:
    def life(names: tuple[str, ...], **options: Any) -> dict[str, Any]:
        models = {name: network(seed=index) for index, name in enumerate(names)}
        optimizers = {name: adam(model) for name, model in models.items()}
        with dt.Run(str(tmp_path), model=models, optimizer=optimizers, options=dt.RunOptions(**options)) as run:
            for step in run.epochs(run.epochs_completed + 1):
                for name, model in models.items():
                    sum((p * (p + step)).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
                    optimizers[name].step()
                    optimizers[name].zero_grad()
                run.step()
        return optimizers

    life(("generator", "critic"))
    with pytest.raises(StateMismatchError, match=r"model/critic/body.bias is in the checkpoint and not in the model"):
        life(("generator",))
    with pytest.raises(StateMismatchError, match=r"partial_load=\('judge.\*', 'critic.\*'\)") as caught:
        life(("generator", "judge"))
    assert "model/judge/body.bias is in the model and not in the checkpoint" in str(caught.value)
    optimizers = life(("generator", "judge"), partial_load=("critic.*", "judge.*"))
    steps = {name: {int(state["step"]) for state in one.state.values()} for name, one in optimizers.items()}
    assert steps == {"generator": {2}, "judge": {1}}


# Parameter groups


def two_groups(head: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        groups = [{"params": model.body.parameters(), "lr": 0.02}, {"params": getattr(model, head).parameters()}]
        return torch.optim.AdamW(groups, lr=0.1)

    return make


def rates(optimizer: Any) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def halved(optimizer: Any) -> Any:
    return lr.ExponentialLR(optimizer, 0.5)


def halved_by_steps(optimizer: Any) -> Any:
    return lr.LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize("scheduler", [halved, halved_by_steps])
def test_a_group_of_new_members_in_the_place_of_one_that_is_gone_goes_on_with_its_rate(
    scheduler: Any, tmp_path: Path
) -> None:
    train(tmp_path, network(), two_groups("head"), scheduler, steps=2)
    _, optimizer = train(tmp_path, network("new_head"), two_groups("new_head"), scheduler, steps=2, partial_load=HEADS)
    assert rates(optimizer) == pytest.approx([0.005, 0.025])
    _, optimizer = train(tmp_path, network("new_head"), two_groups("new_head"), scheduler, steps=3, partial_load=HEADS)
    assert rates(optimizer) == pytest.approx([0.0025, 0.0125])


def three_groups(model: Any) -> Any:
    groups = [{"params": getattr(model, name).parameters()} for name in ("adapter", "body", "head")]
    groups[0]["lr"], groups[1]["lr"] = 0.4, 0.02
    return torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        pytest.param(lambda optimizer: (), [0.4, 0.02, 0.1], id="no scheduler"),
        pytest.param(halved, [0.1, 0.005, 0.025], id="chainable"),
        pytest.param(halved_by_steps, [0.1, 0.005, 0.025], id="lambda"),
        pytest.param(lambda o: lr.CosineAnnealingLR(o, 4), [0.2, 0.01, 0.05], id="cosine"),
        pytest.param(lambda o: lr.OneCycleLR(o, [0.4, 0.02, 0.1][-len(o.param_groups) :], 10), None, id="one cycle"),
    ],
)
def test_a_group_that_was_added_before_the_others_leaves_them_theirs(
    scheduler: Any, expected: list[float] | None, tmp_path: Path
) -> None:
    """The schedule of all is that of a run that had the group from the start."""
    train(tmp_path / "run", network(), two_groups("head"), scheduler, steps=2)
    grown = network(adapter=True)
    _, optimizer = train(tmp_path / "run", grown, three_groups, scheduler, steps=2, partial_load=("adapter.*",))
    _, other = train(tmp_path / "other", network(adapter=True), three_groups, scheduler, steps=2)
    assert rates(optimizer) == pytest.approx(expected or rates(other))
    assert [int(optimizer.state[p]["step"]) for p in grown.body.parameters()] == [2, 2]
    assert not any(p in optimizer.state for p in grown.adapter.parameters())


def test_what_the_user_writes_for_a_group_now_takes_effect(tmp_path: Path) -> None:
    def make(model: Any) -> Any:
        optimizer = two_groups("new_head")(model)
        optimizer.param_groups[0]["weight_decay"] = 0.3
        return optimizer

    def decay_by_hand(model: Any) -> Any:
        return two_groups("head")(model)

    _, optimizer = train(tmp_path, network(), decay_by_hand, halved, steps=2)
    assert optimizer.param_groups[0]["weight_decay"] != 0.3
    _, optimizer = train(tmp_path, network("new_head"), make, halved, steps=2, partial_load=HEADS)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert rates(optimizer)[0] == pytest.approx(0.005)
    assert events_of(tmp_path, "resumed")[-1]["changes"]["optimizer[0].weight_decay"][1] == 0.3


def test_parameters_that_moved_to_a_group_of_their_own_keep_their_state(run_dir: Path) -> None:
    _, optimizer = train(run_dir, network(), two_groups("head"), steps=4, partial_load=("head.*",))
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert len(optimizer.state) == 4
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


# Optimizers whose state has other shapes than their parameters


class MadeAtOnce(torch.optim.Optimizer):
    """As torch's Adagrad was up to 2.12: a step finds the state there, or fails."""

    def __init__(self, parameters: Any, defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["sum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["sum"].add_(parameter.grad)
            parameter.sub_(self.state[parameter]["sum"], alpha=0.1)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1), id="Adafactor"),
        pytest.param(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), id="SGD without momentum"),
        pytest.param(lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1), id="Adagrad"),
        pytest.param(lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, amsgrad=True, foreach=True), id="amsgrad"),
        pytest.param(lambda m: torch.optim.Rprop(m.parameters(), lr=0.1), id="Rprop"),
        pytest.param(lambda m: MadeAtOnce(m.parameters(), {"lr": 0.1}), id="state from the constructor"),
    ],
)
def test_optimizers_of_every_kind_go_on_with_what_is_left(make: Any, tmp_path: Path) -> None:
    _, before = train(tmp_path, network(), make, steps=3)
    body_then = [dict(before.state[p]) for p in before.param_groups[0]["params"][:2]]
    model, after = train(tmp_path, network(width=3), make, steps=3, partial_load=("head.*",))
    for parameter, then in zip(model.body.parameters(), body_then, strict=True):
        assert after.state[parameter].keys() == then.keys()
        assert all(torch.equal(torch.as_tensor(after.state[parameter][key]), then[key]) for key in then)
    train(tmp_path, network(width=3), make, steps=5, partial_load=("head.*",))


def test_one_state_of_all_parameters_together_starts_fresh(tmp_path: Path) -> None:
    """LBFGS keeps its history flat, under its first parameter."""

    def train_lbfgs(model: Any, steps: int, **options: Any) -> Any:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
        with dt.Run(str(tmp_path), model=model, optimizer=optimizer, options=dt.RunOptions(**options)) as run:
            for _ in run.epochs(steps):

                def closure() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = torch.stack([p.square().sum() for p in model.parameters()]).sum()
                    loss.backward()
                    return loss

                optimizer.step(closure)
                run.step()
        return optimizer

    train_lbfgs(network(), 2)
    optimizer = train_lbfgs(network(width=5), 2, partial_load=("head.*",))
    assert not optimizer.state
    train_lbfgs(network(width=5), 3, partial_load=("head.*",))


def test_tied_parameters_may_be_new_too(tmp_path: Path) -> None:
    def tied(rows: int) -> Any:
        torch.manual_seed(0)
        model: Any = nn.Module()
        model.body, model.table, model.out = nn.Linear(3, 4), nn.Embedding(rows, 4), nn.Linear(4, rows, bias=False)
        model.out.weight = model.table.weight
        return model

    train(tmp_path, tied(6), steps=2)
    model, optimizer = train(tmp_path, tied(8), steps=2, partial_load=("out.*",))
    assert model.out.weight is model.table.weight
    assert model.table.weight not in optimizer.state
    assert len(optimizer.state) == 2
    assert not any("matches no tensor" in note for note in notes_of(tmp_path))
    train(tmp_path, tied(8), steps=3, partial_load=("table.*",))
    model, _ = train(tmp_path, tied(8), steps=4)
    assert torch.equal(model.out.weight, model.table.weight)
