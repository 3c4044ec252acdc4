"""State that no checkpoint holds, and of which only the script can tell what it means: told once, before the first
update, with what to do.

    objects inside of an optimizer of the user's    they may count, or remember
    objects that were registered with Accelerate    refused: those are the run's to save
    hooks with a memory in the gradients' reduction (PowerSGD's error feedback)

Invariant: reads only, and tells nothing of what is saved in another way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dist_train.errors import ConfigError
from dist_train.generators import KINDS
from dist_train.optimizer_state import own_values

logger = logging.getLogger(__name__)
_NEVER = (nn.Module, torch.optim.Optimizer, torch.Tensor, logging.Logger, type, *KINDS)
"""Saved by themselves, or without a state of their own."""


def warn_of_held_objects(optimizers: Mapping[str, Any], registered: Mapping[str, Any]) -> None:
    """
    Args:
        optimizers: innermost, by name.
    """
    known = {id(one) for one in registered.values()}
    found = [
        f"{type(optimizer).__name__}.{key}"
        for optimizer in optimizers.values()
        for key, value in _objects_of(optimizer)
        if id(value) not in known
    ]
    if found:
        logger.warning(
            "%s: a checkpoint does not hold what such an object of an optimizer keeps. If training changes it, give it "
            "to run.register (an object with state_dict and load_state_dict), keep its values as attributes of the "
            "optimizer itself, or let the optimizer's state_dict() and load_state_dict() tell of it.",
            ", ".join(found),
        )


def _objects_of(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Instances of classes of the user's that an optimizer of the user's keeps, of whose state nothing tells."""
    kind = type(optimizer)
    if kind.__module__.startswith("torch.") or kind.state_dict is not torch.optim.Optimizer.state_dict:
        return
    saved = own_values(optimizer)
    for key, value in vars(optimizer).items():
        is_object = type(value).__module__.partition(".")[0] not in _OF_LIBRARIES and hasattr(value, "__dict__")
        if is_object and key not in saved and vars(value) and not isinstance(value, _NEVER):
            yield key, value


_OF_LIBRARIES = frozenset({"builtins", "torch", "numpy", "collections", "functools", "logging", "threading", "types"})


def require_registered(accelerator: Any | None, saved: Iterable[Any]) -> None:
    """Raises ConfigError for an object that only Accelerate's own `save_state` would save.

    Args:
        saved: everything that the run's checkpoints hold.
    """
    known = {id(getattr(one, "one", one)) for one in saved}
    lost = [one for one in getattr(accelerator, "_custom_objects", ()) if id(one) not in known]
    if lost:
        raise ConfigError(
            f"accelerator.register_for_checkpointing was given {', '.join(type(one).__name__ for one in lost)}, which "
            f"only accelerator.save_state would save: no checkpoint of the run would hold it. Call "
            f"run.register(name, it) before run.epochs()."
        )


def warn_of_hooks(models: Mapping[str, nn.Module]) -> None:
    """
    Args:
        models: as the run was given them.
    """
    for model in models.values():
        for _, state in getattr(model, "_comm_hooks", ()):
            if hasattr(state, "error_dict"):
                logger.warning(
                    "A hook reduces the gradients of DistributedDataParallel with a memory of its own (%s): no "
                    "checkpoint holds that, so a resume begins with an empty one and is not exact.",
                    type(state).__name__,
                )
