"""Registered objects of which each rank has its own state: random generators, and what the script says is such.

Invariant: a rank gets back what it had itself; one that the checkpoint knows nothing of keeps what the script has made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dist_train.capture import Capture
from dist_train.optimizer_state import CPU, TensorSource
from dist_train.tree import decode_whole, encode_whole

Json = Any
OF_EACH_RANK = {"each_rank": True}
"""What stands in `state` for such an object."""
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class GeneratorState:
    """A random generator as an object with a state_dict; it is set where it lies, since others may hold it, too."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.generator, torch.Generator):
            return {"torch": self.generator.get_state()}
        if isinstance(self.generator, np.random.Generator):
            return {"numpy": self.generator.bit_generator.state}
        if isinstance(self.generator, np.random.RandomState):
            return {"legacy": self.generator.get_state(legacy=False)}
        version, words, gauss = self.generator.getstate()
        return {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if isinstance(self.generator, torch.Generator):
            self.generator.set_state(state["torch"])
        elif isinstance(self.generator, np.random.Generator):
            self.generator.bit_generator.state = state["numpy"]
        elif isinstance(self.generator, np.random.RandomState):
            self.generator.set_state(state["legacy"])
        else:
            self.generator.setstate((state["version"], tuple(map(int, state["words"])), state["gauss"]))


class EachRank:
    """An object whose state is this rank's own."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def capture(self, place: str, capture: Capture) -> None:
        """Its state, whole, as the bytes of one tensor: ranks may hold more or less."""
        text = json.dumps(encode_whole(self.one.state_dict(), place)).encode()
        capture.per_rank[f"{place}/~each"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        capture.state[place] = dict(OF_EACH_RANK)

    def restore(self, place: str, source: TensorSource) -> None:
        own = source.own_name(f"{place}/~each")
        if own != f"{place}/~each":
            self.one.load_state_dict(decode_whole(json.loads(source.create(own, CPU).numpy().tobytes())))


def adapt(one: Any, *, each_rank: bool) -> Any:
    """What is registered in place of an object: as it is, or of each rank."""
    if isinstance(one, _GENERATORS):
        return EachRank(GeneratorState(one))
    return EachRank(one) if each_rank else one
