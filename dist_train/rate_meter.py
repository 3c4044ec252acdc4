"""The learning rate that an update used, for the logs: by `run.step` a scheduler has moved it to the next one's.

Invariant: it reads the optimizer at the start of its step and changes nothing; it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class RateMeter:
    """Of the first parameter group of the first optimizer that has one.

    Args:
        optimizers: innermost, by name.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._optimizer = next((one for one in optimizers.values() if one.param_groups), None)
        self._used: Any = None
        self._hook: Any = None

    def open(self) -> None:
        """From now on each step of the optimizer is noticed."""
        if self._optimizer is not None:
            self._hook = self._optimizer.register_step_pre_hook(self._note)

    def close(self) -> None:
        """The optimizer is left as it was."""
        if self._hook is not None:
            self._hook.remove()

    def of_update(self) -> float | None:
        """What the newest update used; what is set now where none was noticed: a loop that steps nothing, or replays a
        captured graph. Waits for the device where the rate is a tensor there.
        """
        used, self._used = self._used, None
        if used is None and self._optimizer is not None:
            used = self._optimizer.param_groups[0]["lr"]
        return None if used is None else float(used)

    def _note(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        # A scheduler writes the next rate into the very tensor.
        self._used = rate.clone() if isinstance(rate, torch.Tensor) else rate
