"""Random generators that are no object of their own: those that modules, optimizers and schedulers hold as attributes
(a dropout with a generator, noise in an update). Nobody registers them, and what they draw is part of training.

Invariant: each rank gets its own back, set where it lies; python's, numpy's and torch's global ones are `rng`'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.capture import Capture
from dist_train.model_state import clean_name
from dist_train.optimizer_state import CPU, TensorSource
from dist_train.tree import pack, unpack

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
HELD = "generators"
"""Place of those that are held, in `state` and as the tensor of each rank."""
_DEEPEST = 3


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


class HeldGenerators:
    """Those that objects of a run hold.

    Args:
        models, others: modules, and optimizers and schedulers, by their place in a checkpoint.
    """

    def __init__(self, models: Mapping[str, nn.Module], others: Mapping[str, Any]) -> None:
        self._models = models
        self._others = others

    def capture(self, capture: Capture, registered: Mapping[str, Any]) -> None:
        """
        Args:
            registered: objects that are saved by themselves; a generator among them is not held twice.
        """
        known = {id(getattr(getattr(one, "one", None), "generator", None)) for one in registered.values()}
        states = {
            place: GeneratorState(one).state_dict() for place, one in self._held().items() if id(one) not in known
        }
        if states:
            capture.per_rank[f"{HELD}/~each"] = pack(states, HELD)
            capture.state[HELD] = sorted(states)

    def restore(self, state: Mapping[str, Any], source: TensorSource) -> list[str]:
        """Returns what people should know: generators that the checkpoint holds and the script has no longer."""
        if HELD not in state:
            return []
        own, live = source.own_name(f"{HELD}/~each"), self._held()
        if own == f"{HELD}/~each":  # a rank that the run that saved did not have
            return []
        saved = unpack(source.create(own, CPU))
        for place in saved.keys() & live.keys():
            GeneratorState(live[place]).load_state_dict(saved[place])
        gone = sorted(saved.keys() - live.keys())
        return [f"The checkpoint holds the random generator {place}, which is not there any more." for place in gone]

    def _held(self) -> dict[str, Any]:
        """By place; one that several hold has the first of its places."""
        known = {id(one) for one in _global()}
        found: dict[str, Any] = {}
        for place, one in self._places():
            if id(one) not in known:
                known.add(id(one))
                found[place] = one
        return found

    def _places(self) -> Iterator[tuple[str, Any]]:
        for place, model in self._models.items():
            for prefix, module in model.named_modules():
                inner = clean_name(prefix)
                yield from _inside(vars(module), f"{place}/{inner}" if inner else place, _DEEPEST)
        for place, other in self._others.items():
            yield from _inside(vars(other), place, _DEEPEST)


def _inside(value: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        if not depth or not value:
            return
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if type(inner) not in _PLAIN and key not in _NEVER:  # a module has many attributes, and few of interest
                yield from _inside(inner, f"{place}.{key}", depth - 1)
    elif isinstance(value, KINDS):
        yield place, value


_PLAIN = frozenset({bool, int, float, str, type(None), torch.Tensor, nn.Parameter})
_NEVER = frozenset({"_parameters", "_buffers", "_modules", "param_groups", "state", "defaults"})
"""Attributes of modules and optimizers that hold tensors or modules; they may be long."""


def _global() -> list[Any]:
    legacy = getattr(np.random.mtrand, "_rand", None)
    inner = getattr(random, "_inst", None)
    cuda = getattr(torch.cuda, "default_generators", ())
    return [torch.default_generator, legacy, inner, *cuda]
