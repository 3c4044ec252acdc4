"""Random generators of GPUs, on stand-ins: a state is a seed and a count of what was drawn. On a GPU: tests/gpu."""

from __future__ import annotations

import json

import pytest
import torch

from dist_train.rng import capture_rng, restore_rng


class Generators:
    """In place of `torch.cuda`'s, of so many devices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, here: int = 0) -> None:
        self.states = [torch.tensor([7, 0], dtype=torch.int64) for _ in range(count)]
        self.here = here
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "current_device": lambda: self.here,
            "device_count": lambda: len(self.states),
            "get_rng_state": self.get,
            "set_rng_state": self.set,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def get(self, device: int | None = None) -> torch.Tensor:
        return self.states[self.here if device is None else device].clone().view(torch.uint8)

    def set(self, state: torch.Tensor, device: int | None = None) -> None:
        self.states[self.here if device is None else device] = state.clone().view(torch.int64)

    @property
    def drawn(self) -> list[int]:
        return [int(state[1]) for state in self.states]


def test_every_gpu_that_was_drawn_from_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Generators(monkeypatch, 3, here=1)
    for index, drawn in enumerate([4, 8, 0]):
        devices.states[index][1] = drawn
    captured = json.loads(json.dumps(capture_rng()))
    devices.states = [state + 100 for state in devices.states]
    restore_rng(captured)
    assert devices.drawn == [4, 8, 100]  # the third was not used


def test_a_gpu_that_is_not_here_any_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Generators(monkeypatch, 2)
    devices.states[1][1] = 4
    captured = capture_rng()
    devices = Generators(monkeypatch, 1)
    restore_rng(captured)
    assert devices.drawn == [0]


def test_one_gpu_a_process_is_recorded_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Generators(monkeypatch, 8, here=3)
    devices.states[3][1] = 12
    captured = capture_rng()
    assert "cuda" in captured
    assert "cuda_others" not in captured
