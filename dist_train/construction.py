"""Parameter groups and schedulers as the script made them: where a run that goes back in its own process starts from.

Invariant: a restore compares what the script writes now with what it wrote then; after `put_back` the live objects say
what the script wrote, as in a new process. Parameters and state come from the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from dist_train.optimizer_state import own_values


class Construction:
    """A copy of the settings, taken when the run is made.

    Args:
        optimizers, schedulers: innermost, by name; optimizers inside of others, too.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], schedulers: Mapping[str, Any]) -> None:
        self._groups = [(one, [_settings(group) for group in one.param_groups]) for one in optimizers.values()]
        self._own = [(one, copy.deepcopy(own_values(one))) for one in optimizers.values()]
        self._schedulers = [(one, copy.deepcopy(one.state_dict())) for one in schedulers.values()]

    def put_back(self) -> None:
        """The live objects are as the script made them."""
        for optimizer, groups in self._groups:
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                _set(group, settings)
        for optimizer, values in self._own:
            for key in own_values(optimizer).keys() - values.keys():
                delattr(optimizer, key)
            vars(optimizer).update(copy.deepcopy(values))
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _set(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key in group.keys() - settings.keys() - {"params"}:
        del group[key]
    for key, value in settings.items():
        if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
            group[key].copy_(value)  # a capturable rate is read through this very tensor
        else:
            group[key] = copy.deepcopy(value)
