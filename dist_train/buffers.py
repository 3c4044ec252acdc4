"""Buffers that training itself makes, grows or drops: a memory bank, a mask that the first forward pass registers, the
observers of quantization-aware training. The script started again has them as it constructs them.

What counts is whether both scripts construct a buffer alike: then the checkpoint's takes its place, of whatever shape,
dtype or absence; if not, a strict load refuses it.

Invariant: reading changes nothing. It knows parameters not at all: one that training makes is refused when it is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.capture import Capture
from dist_train.model_state import clean_name
from dist_train.optimizer_state import CPU, TensorSource

Json = Any
ABSENT = "absent"
"""Kind of a buffer that no module has registered; None is that of one that is registered as None."""
CHANGED = "~buffers"
"""Below a model in `state`: the buffers that are of another kind than at construction."""


class BufferWatch:
    """Knows what the models' buffers were when they were constructed.

    Args:
        models: innermost, by their place in a checkpoint.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = models
        self._then = {place: {one: kind for one, kind, _ in _buffers(model)} for place, model in models.items()}

    def capture(self, capture: Capture) -> None:
        """Adds which buffers training has changed: what they were, whether they are hidden, and whether there is none
        now.
        """
        for place, model in self._models.items():
            then, now = self._then[place], {name: (kind, hidden) for name, kind, hidden in _buffers(model)}
            changed = {}
            for name in sorted(then.keys() | now.keys()):
                was, (kind, hidden) = then.get(name, ABSENT), now.get(name, (ABSENT, False))
                if was != kind:
                    told = {"was": was, "hidden": hidden}
                    changed[name] = told if isinstance(kind, list) else {**told, "now": kind}
            if changed:
                capture.state[f"{place}/{CHANGED}"] = changed

    def changes(
        self, state: Mapping[str, Json], source: TensorSource, excluded: Collection[str] = ()
    ) -> dict[str, dict[str, Json]]:
        """Of each model, by place, what its buffers are to be made into: name -> kind; only those that are not so.

        Args:
            excluded: full names of what is the script's business.
        """
        found: dict[str, dict[str, Json]] = {}
        for place, model in self._models.items():
            saved = state.get(f"{place}/{CHANGED}") or {}
            stored = {*source.names(f"{place}/"), *source.names(f"buffer/{place}/")} - set(excluded)
            live = {name: (kind, hidden) for name, kind, hidden in _buffers(model)}
            found[place] = {}
            for name in saved.keys() | live.keys():
                kind, hidden = live.get(name, (ABSENT, False))
                entry = saved.get(name, {})
                full = _full(place, name, entry.get("hidden", hidden))
                if "now" in entry:
                    there = entry["now"]
                elif full in stored:
                    there = _kind_of(*source.describe(full))
                elif not entry and full not in excluded and not isinstance(self._then[place].get(name, ABSENT), list):
                    there = self._then[place].get(name, ABSENT)  # training here has gone on since, and made it
                else:
                    continue
                if entry.get("was", there) == self._then[place].get(name, ABSENT) and there != kind:
                    found[place][name] = there
        return found

    def remake(
        self, changes: Mapping[str, Mapping[str, Json]], state: Mapping[str, Json], source: TensorSource, *, own: bool
    ) -> None:
        """
        Args:
            own: each rank has its own buffers.
        """
        for place, kinds in changes.items():
            model, saved = self._models[place], state.get(f"{place}/{CHANGED}") or {}
            here = next((p.device for p in model.parameters()), CPU)
            modules = {clean_name(prefix): module for prefix, module in model.named_modules(remove_duplicate=False)}
            for name, kind in kinds.items():
                prefix, _, key = name.rpartition(".")
                module = modules[prefix]
                hidden = saved.get(name, {}).get("hidden", key in module._non_persistent_buffers_set)
                if not isinstance(kind, list):
                    _set(module, key, None, drop=kind == ABSENT, hidden=hidden)
                    continue
                full = _full(place, name, hidden)
                _set(module, key, source.create(source.own_name(full) if own else full, here), hidden=hidden)


def full_names(changes: Mapping[str, Mapping[str, Json]]) -> set[str]:
    """Under which they may stand among the models' tensors."""
    return {f"{place}/{name}" for place, kinds in changes.items() for name in kinds}


def _set(module: nn.Module, key: str, value: torch.Tensor | None, *, hidden: bool, drop: bool = False) -> None:
    module._buffers.pop(key, None)
    module._non_persistent_buffers_set.discard(key)
    if not drop:
        module.register_buffer(key, value, persistent=not hidden)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Json, bool]]:
    """Name, kind, and whether it is in no state_dict; without sharded ones and such as have no shape yet."""
    for prefix, module in model.named_modules():
        for key, value in module._buffers.items():
            if isinstance(value, DTensor) or (value is not None and nn.parameter.is_lazy(value)):
                continue
            name = clean_name(f"{prefix}.{key}" if prefix else key)
            kind = None if value is None else _kind_of(tuple(value.shape), value.dtype)
            yield name, kind, key in module._non_persistent_buffers_set


def _kind_of(shape: tuple[int, ...], dtype: torch.dtype) -> Json:
    return [list(shape), str(dtype).removeprefix("torch.")]


def _full(place: str, name: str, hidden: bool) -> str:
    return f"buffer/{place}/{name}" if hidden else f"{place}/{name}"
