"""Bad gradients and weights in a small run: what is stopped, left out, and never saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.errors import ConfigError, ExitCode, StopReason
from dist_train.health.nonfinite import GradientGuard, find_not_finite, total_norm
from dist_train.health.policy import HealthPolicy
from dist_train.health.spikes import spike_limit
from dist_train.run import Run
from tests.support.bad_batches import BAD_UPDATE, BadRun
from tests.support.small_run import EACH_EPOCH, StandIn, events_of, manifests_of, small_model, status_of

STOP, SKIP = HealthPolicy(), HealthPolicy(not_finite="skip")


def parameters_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def bad_updates_of(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(run_dir, "not_finite") if "action" in event]


# Stop


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    small = BadRun(run_dir=tmp_path / "run", bad_updates={BAD_UPDATE})
    run = small.train()
    assert run.reason is StopReason.DIVERGED
    assert run.exit_code == ExitCode.DO_NOT_REQUEUE
    assert all(parameter.isfinite().all() for parameter in small.prepared.parameters())
    assert [one["progress"]["global_step"] for one in manifests_of(small.run_dir)] == [5]
    status = status_of(small.run_dir)
    assert (status["status"], status["exit_code"]) == ("diverged", 93)
    assert "the gradient was not finite at step 8 (samples 9 to 12 of epoch 2, dataset indices " in status["error"]
    (event,) = bad_updates_of(small.run_dir)
    assert (event["global_step"], event["first"], event["last"], event["action"]) == (BAD_UPDATE, 8, 11, "stop")


def test_a_loss_that_is_not_finite_alone_is_only_warned_of(tmp_path: Path) -> None:
    def spoil(run: Run) -> None:
        small._loss = torch.tensor(math.nan)

    small = BadRun(run_dir=tmp_path / "run", at_batch=spoil)
    assert small.train().reason is StopReason.DONE


def test_ignoring_lets_the_update_through_but_no_ruined_weights_into_a_checkpoint(tmp_path: Path) -> None:
    small = BadRun(run_dir=tmp_path / "run", bad_updates={BAD_UPDATE}, health=HealthPolicy(not_finite="ignore"))
    run = small.train()
    assert run.reason is StopReason.DIVERGED
    assert [one["progress"]["global_step"] for one in manifests_of(small.run_dir)] == [5]
    assert "weights of 0.weight" in status_of(small.run_dir)["error"]


# Skip


def test_a_skipped_update_counts_and_leaves_weights_buffers_and_optimizer_as_they_were(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(run: Run) -> None:
        if run.global_step in (BAD_UPDATE - 1, BAD_UPDATE):
            state = {key: value.clone() for key, value in small.prepared.state_dict().items()}
            moments = [one["exp_avg"].clone() for one in small.optimizer.state.values()]
            seen[f"{run.global_step}"] = [*state.values(), *moments]

    small = BadRun(run_dir=tmp_path / "run", bad_updates={BAD_UPDATE}, health=SKIP, at_step=look)
    run = small.train()
    assert run.reason is StopReason.DONE
    assert run.global_step == 15
    before, after = seen[f"{BAD_UPDATE - 1}"], seen[f"{BAD_UPDATE}"]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    (event,) = bad_updates_of(small.run_dir)
    assert event["action"] == "skip"


def test_a_run_with_skipped_updates_resumes_bit_for_bit(tmp_path: Path) -> None:
    bad = {BAD_UPDATE, 11}
    straight = BadRun(run_dir=tmp_path / "straight", bad_updates=bad, health=SKIP)
    straight.train()
    first = BadRun(run_dir=tmp_path / "parts", bad_updates=bad, health=SKIP, max_steps=9)
    first.train()
    second = BadRun(run_dir=tmp_path / "parts", bad_updates=bad, health=SKIP)
    second.train()
    for one, other in zip(straight.prepared.parameters(), second.prepared.parameters(), strict=True):
        assert torch.equal(one, other)


def test_skipping_without_end_is_called_diverged(tmp_path: Path) -> None:
    health = replace(SKIP, max_skips=3)
    small = BadRun(run_dir=tmp_path / "run", bad_updates=set(range(7, 30)), health=health, epochs=4)
    run = small.train()
    assert run.reason is StopReason.DIVERGED
    assert "4 updates in a row were left out" in status_of(small.run_dir)["error"]


def test_a_scaler_that_leaves_everything_out_is_called_diverged(tmp_path: Path) -> None:
    """Some updates in a row are its usual way to a scale; so many are not."""
    small = BadRun(run_dir=tmp_path / "few", accelerator=StandIn(skip=lambda update: update < 9))
    assert small.train().reason is StopReason.DONE
    endless = BadRun(run_dir=tmp_path / "run", accelerator=StandIn(skip=lambda update: update > 4), epochs=20)
    assert endless.train().reason is StopReason.DIVERGED
    assert "the GradScaler has left out 64 updates in a row" in status_of(endless.run_dir)["error"]


# Weights


@pytest.mark.parametrize("policy", [EACH_EPOCH, replace(EACH_EPOCH, every_epochs=None)], ids=["each epoch", "at end"])
def test_weights_that_are_not_finite_are_never_committed(policy: Any, tmp_path: Path) -> None:
    """No optimizer is hooked: an own loop may change weights as it likes."""

    def ruin(run: Run) -> None:
        if run.global_step == 14:
            with torch.no_grad():
                next(small.prepared.parameters())[0, 0] = math.inf

    small = BadRun(run_dir=tmp_path / "run", at_step=ruin, policy=policy)
    small.train()
    assert small.run is not None
    assert small.run.reason is StopReason.DIVERGED
    steps = [one["progress"]["global_step"] for one in manifests_of(small.run_dir)]
    assert steps == ([5, 10] if policy is EACH_EPOCH else [])


def test_buffers_may_hold_infinities() -> None:
    model = small_model()
    model.register_buffer("mask", torch.full((3, 3), -math.inf))
    assert find_not_finite({"": model}) == []


def test_the_names_of_what_is_not_finite_are_told() -> None:
    model = small_model()
    with torch.no_grad():
        model[4].bias[0] = math.nan
    model[0].weight.requires_grad_(False)
    assert find_not_finite({"m": model}) == ["m.4.bias"]


# The norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_that_of_all_elements_together(dtype: torch.dtype) -> None:
    tensors = [
        torch.randn(7, 5).to(dtype),
        torch.randn(()).to(dtype),
        torch.zeros(0).to(dtype),
        torch.randn(30).to(dtype),
    ]
    expected = torch.cat([one.double().reshape(-1) for one in tensors]).norm()
    assert torch.allclose(total_norm(tensors), expected, rtol=1e-5)


def test_half_floats_whose_squares_would_overflow_have_a_finite_norm() -> None:
    assert float(total_norm([torch.full((4,), 6e4, dtype=torch.float16)])) == pytest.approx(1.2e5, rel=1e-3)


def test_sparse_gradients_have_a_norm() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 1.0]), (4,))
    assert float(total_norm([sparse, torch.tensor([3.0])])) == 5.0


# Spikes


def test_nothing_is_a_spike_until_half_a_window_is_known() -> None:
    assert spike_limit([1.0] * 63, sigma=6, window=128) == math.inf
    assert spike_limit([1.0] * 64, sigma=6, window=128) < 1.1


def test_the_limit_is_so_many_deviations_above_the_mean_of_the_window() -> None:
    assert spike_limit([1e9, 1.0, 3.0, 1.0, 3.0], sigma=2, window=4) == pytest.approx(2 + 2 * math.sqrt(4 / 3))


def test_norms_that_are_not_finite_do_not_move_the_limit() -> None:
    known = [1.0, 3.0, 1.0, 3.0]
    assert spike_limit([1.0, 3.0, math.nan, 1.0, math.inf, 3.0], sigma=2, window=6) == spike_limit(
        known, sigma=2, window=6
    )


def test_a_spike_is_left_out_and_a_resume_judges_by_the_same_norms(tmp_path: Path) -> None:
    health = HealthPolicy(spike="skip", spike_window=16)
    straight = BadRun(run_dir=tmp_path / "straight", large_updates={12}, health=health)
    straight.train()
    (event,) = events_of(straight.run_dir, "spike")
    assert (event["global_step"], event["action"]) == (12, "skip")
    for steps in (9, None):
        parts = BadRun(run_dir=tmp_path / "parts", large_updates={12}, health=health, max_steps=steps)
        parts.train()
    ends = [manifests_of(one.run_dir)[-1]["state"] for one in (straight, parts)]
    assert ends[0] == ends[1]
    assert len(ends[0]["health"]["norms"][""]) == 15
    for one, other in zip(straight.prepared.parameters(), parts.prepared.parameters(), strict=True):
        assert torch.equal(one, other)


def stepped(guard: GradientGuard[int], optimizer: torch.optim.Optimizer, gradients: list[float]) -> list[int]:
    """Windows that were found bad, window i having the gradient i."""
    (parameter,) = optimizer.param_groups[0]["params"]
    found = []
    for window, gradient in enumerate(gradients):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        guard.end_window(window)
        found += [bad.window for bad in guard.find_bad()]
    return found + [bad.window for bad in guard.find_bad(all_of_them=True)]


def one_parameter(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, **options)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_spike_is_found_and_kept_from_the_weights(lag: int) -> None:
    optimizer = one_parameter(fused=True)
    policy = HealthPolicy(spike="skip", spike_window=8)
    guard = GradientGuard[int]({"": optimizer}, policy, lag=lag)
    guard.open()
    assert stepped(guard, optimizer, [1.0, 1.1, 0.9, 1.0, 1.1, 50.0, 1.0]) == [5]
    assert float(optimizer.param_groups[0]["params"][0].detach()) == pytest.approx(-6.1)
    guard.close()


def test_a_late_guard_masks_on_the_device_at_once_and_tells_one_window_later() -> None:
    """As on a GPU: the optimizer itself leaves the update out, and nothing has been read by then."""
    optimizer = one_parameter(fused=True, momentum=0.9)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"), lag=1)
    guard.open()
    (parameter,) = optimizer.param_groups[0]["params"]
    told = []
    for window, gradient in enumerate([1.0, math.nan, 1.0, 1.0]):
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        assert not hasattr(optimizer, "found_inf")
        assert torch.equal(before, parameter) == (window == 1)
        guard.end_window(window)
        told.append([bad.window for bad in guard.find_bad()])
    assert told == [[], [], [1], []]
    assert guard.find_bad(all_of_them=True) == []


def test_what_cannot_be_masked_on_the_device_is_waited_for_where_it_is_to_be_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = one_parameter(foreach=True)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"), lag=1)
    guard.open()
    assert stepped(guard, optimizer, [1.0, math.nan, math.nan, 1.0]) == [1, 2]
    assert float(optimizer.param_groups[0]["params"][0].detach()) == -2.0
    assert caplog.text.count("each step waits") == 1


def test_what_the_scaler_leaves_out_is_its_own_business() -> None:
    """As GradScaler.step does with a fused optimizer: it sets both attributes, and takes them away again."""
    optimizer = one_parameter(fused=True)
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(not_finite="skip"), lag=1)
    guard.open()
    (parameter,) = optimizer.param_groups[0]["params"]
    for window, (gradient, found) in enumerate([(8.0, 0.0), (math.inf, 1.0), (8.0, 0.0)]):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)  # type: ignore[attr-defined]
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        guard.end_window(window)
    assert guard.find_bad(all_of_them=True) == []
    assert float(parameter.detach()) == -2.0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_resumed_guard_decides_as_the_unkilled_one(lag: int) -> None:
    """Limits, compared to the last bit, at each place where a checkpoint could have been made."""
    generator = torch.Generator().manual_seed(3)
    gradients = (torch.rand(40, generator=generator) * 4).tolist()
    policy = HealthPolicy(spike="skip", spike_window=8, spike_sigma=1.2)

    def decide(saves: set[int]) -> tuple[list[int], float]:
        optimizer = one_parameter(fused=True)
        guard = GradientGuard[int]({"": optimizer}, policy, lag=lag)
        guard.open()
        found: list[int] = []
        for window, gradient in enumerate(gradients):
            found += [window for _ in stepped_once(guard, optimizer, gradient, window)]
            if window in saves:
                found += [window for _ in guard.find_bad(all_of_them=True)]
                captured = guard.capture()
                guard.close()
                guard = GradientGuard[int]({"": optimizer}, policy, lag=lag)
                guard.open()
                guard.restore(captured)
        return found, float(optimizer.param_groups[0]["params"][0].detach())

    straight = decide(set())
    assert 0 < len(straight[0]) < 20
    for save in range(3, 40, 4):
        assert decide({save})[1] == straight[1]


def stepped_once(
    guard: GradientGuard[int], optimizer: torch.optim.Optimizer, gradient: float, window: int
) -> list[Any]:
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    guard.end_window(window)
    return guard.find_bad()


def test_a_told_norm_is_judged_in_place_of_the_clipped_one() -> None:
    optimizer = one_parameter()
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(spike="stop", spike_window=8), lag=0)
    guard.open()
    (parameter,) = optimizer.param_groups[0]["params"]
    found = []
    for window, norm in enumerate([1.0, 1.0, 1.0, 1.0, 90.0]):
        parameter.grad = torch.ones_like(parameter)
        guard.tell_norm(torch.tensor(norm))
        optimizer.step()
        guard.end_window(window)
        found += [bad.window for bad in guard.find_bad()]
    assert found == [4]


def closure_of(parameter: nn.Parameter) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        parameter.grad = torch.full_like(parameter, math.nan)
        return torch.tensor(0.0)

    return closure


def test_a_step_with_a_closure_makes_its_gradients_itself_and_is_not_judged() -> None:
    optimizer = one_parameter()
    guard = GradientGuard[int]({"": optimizer}, HealthPolicy(), lag=0)
    guard.open()
    optimizer.step(closure_of(optimizer.param_groups[0]["params"][0]))
    guard.end_window(0)
    assert guard.find_bad() == []


# The setting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"not_finite": "explode"}, "not_finite is 'explode'; it must be one of 'stop', 'skip'"),
        ({"spike": "ignore"}, "spike is 'ignore'"),
        ({"clean_steps": 0}, "clean_steps is 0; it must be a whole number of at least 1"),
        ({"spike_sigma": 0}, "spike_sigma is 0; it must be above 0"),
        ({"max_roll_backs": 2.5}, "max_roll_backs is 2.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HealthPolicy(**settings)


def test_a_spike_that_was_left_out_does_not_hide_the_next_one() -> None:
    norms = [1.0 + 0.1 * (step % 3) for step in range(64)]
    for _ in range(6):
        limit = spike_limit(norms, sigma=6, window=128)
        assert limit < 10
        norms.append(min(1e6, limit))
    assert spike_limit(norms, sigma=6, window=128) > spike_limit(norms[:64], sigma=6, window=128)
