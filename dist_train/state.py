"""Live objects <-> named tensors and JSON: models, optimizers, schedulers, GradScaler, RNG, registered objects.

Invariant: `capture` changes nothing that training can see: no optimizer step, no hook, no random number. Tensors are
handed on uncopied. It knows nothing of files, and of ranks only that some values differ between them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.errors import StateMismatchError, UnsaveableStateError
from dist_train.rng import capture_rng
from dist_train.tied import compare_copies, group_tied, storage_key
from dist_train.tree import decode, encode, merge_settings

Json = Any
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


class Stateful(Protocol):
    """Anything that can be registered with a run."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


class TensorSource(Protocol):
    """Where `restore` takes tensors from: a verified checkpoint."""

    def names(self, prefix: str) -> list[str]: ...
    def fill(self, name: str, target: torch.Tensor) -> None: ...
    def create(self, name: str, device: torch.device, like: torch.Tensor | None = None) -> torch.Tensor: ...
    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]: ...


@dataclass(slots=True, kw_only=True)
class Capture:
    """One rank's state, by reference. Names are equal on all ranks."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Equal on all ranks, or a DTensor."""
    main_only: set[str] = field(default_factory=set)
    """Names whose value is the main rank's (DDP buffers differ by rank)."""
    per_rank: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values that differ by rank and are all kept."""
    aliases: dict[str, str] = field(default_factory=dict)
    state: dict[str, Json] = field(default_factory=dict)
    rank_state: dict[str, Json] = field(default_factory=dict)


class LiveState:
    """The objects of a run, by name; the name "" is that of an only model, optimizer or scheduler.

    Args:
        models: any wrapping (DDP, FSDP2, torch.compile); names are those of the innermost module.
        optimizers: torch optimizers or Accelerate's wrappers of them.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Any],
        schedulers: Mapping[str, Any] | None = None,
        scaler: Any | None = None,
    ) -> None:
        self.models = {name: innermost_module(model) for name, model in models.items()}
        self.optimizers = {name: innermost_optimizer(optimizer) for name, optimizer in optimizers.items()}
        self.schedulers = dict(schedulers or {})
        self.scaler = scaler
        self.registered: dict[str, Stateful] = {}
        self._own_buffers = any(_keeps_own_buffers(model) for model in models.values())
        self.settings = self._settings()

    def capture(self) -> Capture:
        """Raises UnsaveableStateError, naming the object."""
        capture = Capture()
        for name, model in self.models.items():
            _capture_model(model, _place("model", name), capture, self._own_buffers)
        names = self._parameter_names()
        for name, optimizer in self.optimizers.items():
            place = _place("optimizer", name)
            capture.state[place] = _capture_optimizer(optimizer, place, names, capture.tensors)
        for place, one in self._plain_objects():
            capture.state[place] = encode(one.state_dict(), place, capture.tensors)
        self._tie_registered(capture)
        capture.rank_state["rng"] = capture_rng()
        return capture

    def _tie_registered(self, capture: Capture) -> None:
        """A registered module's buffers are the main rank's; what it shares with a model is stored once."""
        models = {storage_key(value): name for name, value in capture.tensors.items() if name.startswith("model/")}
        for name in [name for name in capture.tensors if name.startswith("user/")]:
            if first := models.get(storage_key(capture.tensors[name])):
                capture.aliases[name] = first
                del capture.tensors[name]
        for name, one in self.registered.items():
            if isinstance(one, nn.Module):
                capture.main_only |= {f"user/{name}/{key}" for key, _ in one.named_buffers()} & capture.tensors.keys()

    def restore(
        self,
        state: Mapping[str, Json],
        settings: Mapping[str, Json],
        source: TensorSource,
        absent: Collection[str] = (),
    ) -> dict[str, Any]:
        """Loads everything but RNG in place; returns the settings that the user changed: place -> (then, today).

        Args:
            absent: kinds of state that may be missing; they keep what they were constructed with.

        Raises:
            StateMismatchError: lists what differs; nothing was loaded.
        """
        self._require_same_structure(state, settings, source, absent)
        changes: dict[str, Any] = {}
        for name, model in self.models.items():
            place = _place("model", name)
            _restore_model(model, place, source, self._own_buffers)
            if extra := state.get(f"{place}/~extra"):
                _restore_extra(model, decode(extra, self._loader(source)))
        if self.scaler is not None and state.get("scaler"):
            # Before the optimizer: FSDP2's scaler looks at the optimizer's state when it is loaded.
            self.scaler.load_state_dict(decode(state["scaler"], lambda name, device: source.create(name, CPU)))
        names = self._parameter_names()
        for name, optimizer in self.optimizers.items():
            place = _place("optimizer", name)
            if place not in state:
                continue
            then, today = settings.get(place), self.settings[place]
            _restore_optimizer(optimizer, place, names, source, state[place], (then, today, changes))
        for place, one in self._plain_objects():
            if place != "scaler" and place in state:
                json = state[place]
                if place in self.settings:
                    json = merge_settings(json, settings.get(place), self.settings[place], place, changes)
                self._load_plain(one, place, json, source)
        return changes

    def restore_registered(self, name: str, state: Mapping[str, Json], source: TensorSource) -> None:
        """Loads one object that was registered after the rest was restored.

        Raises:
            StateMismatchError: the checkpoint holds nothing for it.
        """
        place = f"user/{name}"
        if place not in state:
            raise StateMismatchError(
                f"The checkpoint holds nothing for the registered {name!r}. Register it from the first start of a run "
                f"on: give another run_dir, or leave it out to continue this run."
            )
        self._load_plain(self.registered[name], place, state[place], source)

    def _load_plain(self, one: Any, place: str, json: Json, source: TensorSource) -> None:
        """A module's tensors are filled where they lie: an average of a model needs no third copy of it."""
        live: dict[str, torch.Tensor] = {}
        if isinstance(one, nn.Module):
            encode(one.state_dict(), place, live)

        def load(name: str, device: str) -> Any:
            if name not in live or source.describe(name) != (tuple(live[name].shape), live[name].dtype):
                return self._loader(source)(name, device)
            source.fill(name, live[name])
            return live[name]

        one.load_state_dict(decode(json, load))

    def _loader(self, source: TensorSource) -> Any:
        parameter = next((p for model in self.models.values() for p in model.parameters()), None)
        here = parameter.device if parameter is not None else CPU
        return lambda name, device: source.create(name, here if device == here.type else CPU)

    def _plain_objects(self) -> Iterator[tuple[str, Any]]:
        """Objects that are saved by their state_dict alone, by place."""
        for name, scheduler in self.schedulers.items():
            yield _place("scheduler", name), scheduler
        if self.scaler is not None:
            yield "scaler", self.scaler
        for name, one in self.registered.items():
            yield f"user/{name}", one

    def _settings(self) -> dict[str, Json]:
        """Each setting's value now, at construction."""
        settings: dict[str, Json] = {}
        for name, optimizer in self.optimizers.items():
            place = _place("optimizer", name)
            groups = [
                {key: _plain_setting(value) for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ]
            settings[f"{place}/class"] = type(optimizer).__name__
            settings[place] = [encode(group, f"{place}/settings/{i}", {}) for i, group in enumerate(groups)]
        for name, scheduler in self.schedulers.items():
            place = _place("scheduler", name)
            settings[f"{place}/class"] = type(scheduler).__name__
            settings[place] = encode(scheduler.state_dict(), place, {})
        return settings

    def _parameter_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, model in self.models.items():
            for key, parameter in model.named_parameters():
                names.setdefault(id(parameter), clean_name(f"{name}.{key}" if name else key))
        return names

    def _require_same_structure(
        self, state: Mapping[str, Json], settings: Mapping[str, Json], source: TensorSource, absent: Collection[str]
    ) -> None:
        problems: list[str] = []
        for place, today in self.settings.items():
            if place.endswith("/class") and settings.get(place, today) != today:
                problems.append(f"the {place.removesuffix('/class')} was a {settings[place]} and is a {today} now")
        for name, model in self.models.items():
            problems += _compare_model(model, _place("model", name), source)
        names = self._parameter_names()
        for name, optimizer in self.optimizers.items():
            place = _place("optimizer", name)
            if place not in state:
                problems += [f"the checkpoint holds no {place}"] if "optimizer" not in absent else []
                continue
            live = [_member_names(index, group, names) for index, group in enumerate(optimizer.param_groups)]
            saved = [_by_name(group["params"], live, index) for index, group in enumerate(state[place]["groups"])]
            if [len(group) for group in live] != [len(group) for group in saved]:
                sizes = f"{[len(group) for group in saved]} parameters, here {[len(group) for group in live]}"
                problems.append(f"{place}: the groups hold {sizes}")
            elif strangers := {n for g in live for n in g} ^ {n for g in saved for n in g}:
                problems.append(f"{place}: only there or only here are the parameters {', '.join(sorted(strangers))}")
        missing = [name for name in self.registered if f"user/{name}" not in state and "user" not in absent]
        problems += [f"the checkpoint holds nothing for the registered {name!r}" for name in missing]
        if problems:
            more = f" ... and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise StateMismatchError("; ".join(problems[:8]) + more)


CPU = torch.device("cpu")


def _plain_setting(value: Any) -> Any:
    """A tensor's value: a capturable learning rate is compared by what it is, not by where it is kept."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def innermost_module(model: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, DataParallel and torch.compile around it."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = inner.module
        else:
            return cast(nn.Module, inner)


def innermost_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsaveableStateError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer and cannot be saved.")
    return optimizer


def clean_name(name: str) -> str:
    """A parameter's name without the segments that torch.compile and checkpoint wrappers put in."""
    return _WRAPPERS.sub("", name).lstrip(".")


def _place(kind: str, name: str) -> str:
    return f"{kind}/{name}" if name else kind


def _keeps_own_buffers(model: nn.Module) -> bool:
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    return ddp and not getattr(model, "broadcast_buffers", True) and any(True for _ in model.buffers())


def _capture_model(model: nn.Module, place: str, capture: Capture, own_buffers: bool) -> None:
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    seen: dict[Any, str] = {}
    extra: dict[str, Any] = {}
    for raw, value in model.state_dict().items():
        name = clean_name(raw)
        full = f"{place}/{name}"
        if _is_extra(name, value):
            extra[name] = value
            continue
        if nn.parameter.is_lazy(value):
            raise UnsaveableStateError(f"{full} has no shape yet: call the model on one batch before the run is made.")
        if (first := seen.setdefault(storage_key(value), full)) != full:
            capture.aliases[full] = first
            continue
        capture.tensors[full] = value.detach()
        if name in buffers and not isinstance(value, DTensor):
            capture.main_only.add(full)
            if own_buffers:
                capture.per_rank[full] = value.detach()
    if extra:  # what modules return from get_extra_state
        capture.state[f"{place}/~extra"] = encode(extra, f"{place}/~extra", capture.tensors)
    for name, value in _hidden_buffers(model):
        capture.tensors[f"buffer/{place}/{name}"] = value.detach()
        capture.main_only.add(f"buffer/{place}/{name}")


def _hidden_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Non-persistent buffers: not in the state_dict, yet training may change them."""
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            value = module._buffers.get(name)
            if value is not None and not isinstance(value, DTensor):
                yield clean_name(f"{prefix}.{name}" if prefix else name), value


def _is_extra(name: str, value: Any) -> bool:
    """What a module returns from get_extra_state; a tensor from there is a new one at each call."""
    return not isinstance(value, torch.Tensor) or name.rpartition(".")[2] == "_extra_state"


def positional_name(group: int, place: int) -> str:
    """Name of a parameter that belongs to no model, or whose name an imported optimizer state does not tell."""
    return f"~group{group}.{place}"


def _member_names(index: int, group: Mapping[str, Any], names: dict[int, str]) -> list[str]:
    """Names of a group's parameters; those of no model by their place."""
    return [names.get(id(p), positional_name(index, i)) for i, p in enumerate(group["params"])]


def _by_name(saved: list[str], live: list[list[str]], index: int) -> list[str]:
    """A saved group's names, with the live name at the same place for one that is known by its place only."""
    here = live[index] if index < len(live) and len(live[index]) == len(saved) else saved
    return [
        mine if name == positional_name(index, place) else name
        for place, (name, mine) in enumerate(zip(saved, here, strict=True))
    ]


def _capture_optimizer(
    optimizer: torch.optim.Optimizer, place: str, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> Json:
    """Reads `optimizer.state`; torch's own get_state_dict would step a fresh optimizer."""
    groups, state = [], {}
    for index, group in enumerate(optimizer.param_groups):
        members = _member_names(index, group, names)
        hyper = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": members, "settings": encode(hyper, f"{place}/~groups/{index}", tensors)})
        for name, parameter in zip(members, group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = encode(dict(optimizer.state[parameter]), f"{place}/{name}", tensors)
    loose = {str(key): value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    return {"groups": groups, "state": state, "loose": encode(loose, f"{place}/~loose", tensors)}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    place: str,
    names: dict[int, str],
    source: TensorSource,
    json: Json,
    construction: tuple[Json, Json, dict[str, Any]],
) -> None:
    """Sets `optimizer.state` itself: `load_state_dict` casts state to the parameter's dtype (bf16 loses fp32
    moments).
    """
    then, today, changes = construction
    optimizer.state.clear()
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, json["groups"], strict=True)):
        before = then[index] if then and index < len(then) else today[index]
        merged = merge_settings(saved["settings"], before, today[index], f"{place}[{index}]", changes)
        for key, value in decode(merged, lambda name, device: source.create(name, CPU)).items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(torch.as_tensor(value))  # a capturable learning rate is read through this very tensor
            else:
                group[key] = _plain_setting(value)
        for place_in_group, (name, parameter) in enumerate(
            zip(_member_names(index, group, names), group["params"], strict=True)
        ):
            saved_name = name if name in json["state"] else positional_name(index, place_in_group)
            if saved_name in json["state"]:
                optimizer.state[parameter] = decode(json["state"][saved_name], _state_loader(source, parameter))
    for key, value in decode(json["loose"], lambda name, device: source.create(name, CPU)).items():
        optimizer.state[key] = value
    if any(isinstance(one, dict) and isinstance(one.get("step"), (int, float)) for one in optimizer.state.values()):
        # torch's own repair of what an older torch has saved: a count that is no tensor would never move.
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def _state_loader(source: TensorSource, parameter: torch.Tensor) -> Any:
    """Optimizer state lies where its parameter lies, but for counters that were kept on the CPU."""
    return lambda name, device: source.create(
        name, CPU if device == "cpu" and parameter.device.type != "cpu" else parameter.device, like=parameter
    )


def _restore_model(model: nn.Module, place: str, source: TensorSource, own_buffers: bool) -> None:
    buffers = {clean_name(name) for name, _ in model.named_buffers()}
    with torch.no_grad():
        for name, value in _tensors_as_stored(model, place, source):
            own = own_buffers and name in buffers and not isinstance(value, DTensor)
            source.fill(f"{place}/{name}", value) if not own else _fill_own(source, f"{place}/{name}", value)
        present = set(source.names(f"buffer/{place}/"))
        for name, value in _hidden_buffers(model):
            full = f"buffer/{place}/{name}"
            if full in present and source.describe(full) == (tuple(value.shape), value.dtype):
                source.fill(full, value)


def _restore_extra(model: nn.Module, extra: dict[str, Any]) -> None:
    raw_names = {clean_name(raw): raw for raw in model.state_dict()}
    model.load_state_dict({raw_names.get(name, name): value for name, value in extra.items()}, strict=False)


def _fill_own(source: TensorSource, name: str, value: torch.Tensor) -> None:
    own = getattr(source, "own_name", lambda same: same)(name)
    source.fill(own, value)


def _tensors_as_stored(model: nn.Module, place: str, source: TensorSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once. Which name of a tied one is stored is for its writer to choose: that one, or the first."""
    stored = set(source.names(f"{place}/"))
    for names, value in _tied_names(model):
        yield next((name for name in names if f"{place}/{name}" in stored), names[0]), value


def _tied_names(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    members = model.state_dict().items()
    return group_tied((clean_name(raw), value) for raw, value in members if not _is_extra(raw, value))


def _compare_model(model: nn.Module, place: str, source: TensorSource) -> list[str]:
    live = {f"{place}/{name}": value for name, value in _tensors_as_stored(model, place, source)}
    saved = {name for name in source.names(f"{place}/") if not name.startswith(f"{place}/~extra/")}
    groups = [[f"{place}/{name}" for name in names if f"{place}/{name}" in saved] for names, _ in _tied_names(model)]
    copies, problems = compare_copies(groups, lambda name: source.create(name, CPU))
    problems += [f"{name} is in the checkpoint and not in the model" for name in sorted(saved - set(live) - copies)]
    problems += [f"{name} is in the model and not in the checkpoint" for name in sorted(set(live) - saved)]
    for name in sorted(saved & set(live)):
        shape, dtype = source.describe(name)
        if (shape, dtype) != (tuple(live[name].shape), live[name].dtype):
            here = f"{list(live[name].shape)} {live[name].dtype}"
            problems.append(f"{name} is {list(shape)} {dtype} in the checkpoint and {here} in the model")
    return problems
