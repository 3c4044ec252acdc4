"""What no checkpoint holds is told before the first update: objects inside of optimizers, hooks with a memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train as dt
from dist_train.unsaved import warn_of_held_objects, warn_of_hooks


class Ledger:
    """It counts."""

    def __init__(self) -> None:
        self.entries = 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Holding(torch.optim.SGD):
    """Of the user's, with things of all kinds in it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.count, self.table, self.rule = 0, {"a": [torch.ones(2)]}, lambda step: step
        self.logger, self.noise = logging.getLogger("x"), torch.Generator()
        self.inner = torch.optim.SGD(self.param_groups[0]["params"], lr=0.1)
        self.ledger = Ledger()


class Telling(Holding):
    """Its state_dict tells."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ledger": self.ledger.state_dict()}


def told_of(make: Any, registered: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    model = nn.Linear(2, 1)
    caplog.clear()
    warn_of_held_objects({"": make(model.parameters())}, registered)
    return [record.getMessage().partition(":")[0] for record in caplog.records]


def test_an_object_of_which_nothing_tells_is_named_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert told_of(Holding, {}, caplog) == ["Holding.ledger"]
    assert told_of(Telling, {}, caplog) == []
    assert told_of(lambda members: torch.optim.AdamW(members), {}, caplog) == []


def test_what_is_registered_is_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 1)
    optimizer = Holding(model.parameters())
    for registers in (True, False):
        with dt.Run(str(tmp_path / str(registers)), model=model, optimizer=optimizer) as run:
            if registers:
                run.register("ledger", optimizer.ledger)
            for _ in run.epochs(0):
                pass
        assert ("Holding.ledger" in capfd.readouterr().err) is not registers


def test_a_hook_with_a_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class ErrorFeedback:
        """As PowerSGD's."""

        def __init__(self) -> None:
            self.error_dict: dict[int, torch.Tensor] = {}

    model: Any = nn.Linear(2, 1)
    model._comm_hooks = [(print, None), (print, ErrorFeedback())]
    warn_of_hooks({"": model})
    assert "ErrorFeedback" in caplog.text
    assert "not exact" in caplog.text
    assert len(caplog.records) == 1
