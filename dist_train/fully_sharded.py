"""What torch's `fully_shard` (FSDP2) has made of a model, and what a run must undo of a forward or backward pass.

A forward pass gathers parameters; those of the root stay whole after it, as plain tensors in the place of the sharded
ones that the optimizer holds. A backward pass without a reduction keeps whole gradients where `zero_grad` does not
look.

Invariant: only what a pass has left behind is touched, never a value; nothing here is collective.
Source: torch/distributed/fsdp/_fully_shard (torch 2.13; 2.11 has one parameter group a module).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def sharded_parts(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called with; each of their forward passes is collective."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who has not imported it has sharded nothing, and it is slow
    return [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model needs all ranks."""
    return bool(sharded_parts(model))


def reshard(models: Iterable[nn.Module]) -> None:
    """Registers the sharded parameters again, which a forward pass without a backward leaves gathered."""
    for model in models:
        for part in sharded_parts(model):
            part.reshard()


def drop_unreduced_gradients(model: nn.Module) -> None:
    """Of a window of accumulated micro-batches that ends here without its reduction."""
    for part in sharded_parts(model):
        for group in _groups(part):
            group._partial_reduce_output = None
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def holds_unreduced_gradients(model: nn.Module) -> bool:
    """Whether gradients of a window of accumulated micro-batches wait for its last one."""
    return any(
        group._partial_reduce_output is not None
        or any(_unreduced(parameter) is not None for parameter in group.fsdp_params)
        for part in sharded_parts(model)
        for group in _groups(part)
    )


def _unreduced(parameter: Any) -> Any:
    """In the dtype in which it is summed, or where the whole parameter has it."""
    whole = getattr(parameter, "_unsharded_param", None)
    waiting = parameter.unsharded_accumulated_grad
    return waiting if waiting is not None or whole is None else whole.grad


def _groups(part: Any) -> Iterator[Any]:
    state = part._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)
    yield from [one for one in [state._fsdp_param_group] if one is not None] if found is None else found
