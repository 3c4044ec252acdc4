"""Registered objects of which each rank has its own state: random generators, and what the script says is such.

Invariant: a rank gets back what it had itself; one that the checkpoint knows nothing of keeps what the script has made.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from dist_train.capture import Capture
from dist_train.checkpoint.manifest import digest_of
from dist_train.generators import KINDS, GeneratorState
from dist_train.optimizer_state import CPU, TensorSource
from dist_train.tree import pack, tensor_names, unpack
from dist_train.world import World

logger = logging.getLogger(__name__)
Json = Any
OF_EACH_RANK = {"each_rank": True}
"""What stands in `state` for such an object."""
_SMALL_BYTES = 1 << 14


class EachRank:
    """An object whose state is this rank's own."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def capture(self, place: str, capture: Capture) -> None:
        """Its state, whole, as the bytes of one tensor: ranks may hold more or less."""
        capture.per_rank[f"{place}/~each"] = pack(self.one.state_dict(), place)
        capture.state[place] = dict(OF_EACH_RANK)

    def restore(self, place: str, source: TensorSource, here: torch.device) -> None:
        """
        Args:
            here: the device on which tensors are that were on one of its type.
        """
        own = source.own_name(f"{place}/~each")
        if own != f"{place}/~each":
            self.one.load_state_dict(unpack(source.create(own, CPU), here))


class UnlikeWatch:
    """Notices registered objects that are taken to be one for all ranks, and are not."""

    def __init__(self) -> None:
        self._told = False

    def warn_of(self, capture: Capture, world: World) -> None:
        """Says it once. Collective: two numbers, and more only where something differs."""
        if self._told or world.world_size == 1:
            return
        mine = {
            place.removeprefix("user/"): _digest(place, capture)
            for place in capture.state
            if _is_common(place, capture)
        }
        whole = int(digest_of(mine)[:15], 16)
        highest = world.max([whole, -whole], "whether registered objects are equal on all ranks")
        if highest[0] == -highest[1]:
            return
        self._told = True
        every = world.gather(mine, "which registered objects differ")
        unlike = [
            name for name in mine if all(name in one for one in every) and any(one[name] != mine[name] for one in every)
        ]
        if unlike and world.is_main:
            logger.warning(
                "What is registered as %s is not the same on all ranks: the main rank's is saved, and every rank gets "
                "that after a resume. Where each is to keep its own, call run.register(name, it, each_rank=True).",
                ", ".join(map(repr, sorted(unlike))),
            )


def _is_common(place: str, capture: Capture) -> bool:
    return place.startswith("user/") and capture.state[place] != OF_EACH_RANK


def _digest(place: str, capture: Capture) -> str:
    """Of all but large tensors and those of a device."""
    small = {
        name: pack(tensor, name).numpy().tobytes().hex()
        for name in tensor_names(capture.state[place])
        if (tensor := capture.tensors.get(name)) is not None and name not in capture.main_only and _is_small(tensor)
    }
    return digest_of([capture.state[place], small])


def _is_small(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.device.type == "cpu" and tensor.nbytes <= _SMALL_BYTES


def adapt(one: Any, *, each_rank: bool) -> Any:
    """What is registered in place of an object: as it is, or of each rank."""
    if isinstance(one, KINDS):
        return EachRank(GeneratorState(one))
    return EachRank(one) if each_rank else one
