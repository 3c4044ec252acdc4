"""Notices gradients of a window of micro-batches that the run was not told of: a loop that accumulates by hand, without
a loader of the run's, and calls `run.save()` in its middle.

Invariant: reads only. It looks at few parameters; what it takes for a window is one on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.fully_sharded import holds_unreduced_gradients
from dist_train.model_state import innermost_module


class OpenWindow:
    """
    Args:
        models: as the run was given them.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = [innermost_module(model) for model in models.values()]
        self._then: list[Any] = []

    def close(self) -> None:
        """At the end of an update. Raises ConfigError where its gradients were never given to the optimizer."""
        self._then = list(map(_mark, self._gradients()))
        if any(map(holds_unreduced_gradients, self._models)):
            raise ConfigError(
                "run.step() was called for an update while gradients of a model after `fully_shard` wait for their "
                "reduction (`set_requires_gradient_sync(False)`): a checkpoint of this moment would be without them. "
                "Call run.step() once an update, after the micro-batch with `set_requires_gradient_sync(True)` and "
                "the optimizer's step; or give the Run a loader of dt.data_loader, which knows the windows, and call "
                "it once a batch."
            )

    def is_open(self) -> bool:
        """Whether there was a backward pass since the last update's end, as far as the first and the last trained
        parameter of each model tell.
        """
        if any(map(holds_unreduced_gradients, self._models)):
            return True
        now = list(self._gradients())
        before = self._then if len(self._then) == len(now) else [None] * len(now)
        return any(
            gradient is not None and _mark(gradient) != mark and bool(_local(gradient).any())
            for gradient, mark in zip(now, before, strict=True)
        )

    def _gradients(self) -> Iterator[torch.Tensor | None]:
        for model in self._models:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            yield from (parameter.grad for parameter in (*trained[:1], *trained[-1:]))


def _mark(gradient: torch.Tensor | None) -> tuple[int, int] | None:
    return None if gradient is None else (id(gradient), gradient._version)


def _local(gradient: Any) -> torch.Tensor:
    local: torch.Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.coalesce().values() if local.layout == torch.sparse_coo else local
