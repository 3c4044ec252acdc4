"""What other programs save, taken apart: whose file or folder it is, and which part of it is what.

    a dictionary of torch.save      model_state_dict, optimizer_state_dict, ... (and the synonyms below)
    Lightning's .ckpt               state_dict, optimizer_states, lr_schedulers, epoch, global_step
    Accelerate's save_state         model.safetensors | pytorch_model.bin, optimizer.bin, scheduler.bin, scaler.pt
    transformers' Trainer           the same with optimizer.pt, scheduler.pt, trainer_state.json
    Hugging Face, safetensors       weights only

Invariant: nothing is executed, written or changed: values are those of the source. What is not understood is told in
`notes`, never dropped in silence. Loading dictionaries is the caller's function, since only `exchange` may do it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from dist_train.checkpoint.facts import Mode
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, RUN_FILE
from dist_train.errors import ConfigError, CorruptCheckpointError, NoCheckpointError
from dist_train.model_state import clean_name

Load = Callable[[str], Any]
Weights = dict[str, Any]
MODEL_KEYS = ("model_state_dict", "state_dict", "model_state", "model", "net", "network", "weights", "module")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer_state", "optim_state_dict", "optimizer", "optim")
SCHEDULER_KEYS = (
    "scheduler_state_dict",
    "lr_scheduler_state_dict",
    "scheduler_state",
    "lr_scheduler",
    "scheduler",
    "sched",
)
SCALER_KEYS = ("scaler_state_dict", "scaler_state", "grad_scaler", "scaler", "native_amp_scaling_state")
PARTS = ("optimizer", "scheduler", "scaler")
"""Kinds of state beside the weights."""
_LIGHTNING = "pytorch-lightning_version"
_LIGHTNING_SCALER = "MixedPrecision"
_DICTIONARIES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".th")
_SHARDED = (".distcp", ".metadata")
_GOES_ALONG = re.compile(
    r"(\w+_)?config\.json$|(\w*token\w*|vocab|merges|chat_template)\.(json|txt|jinja)$|.*\.(model|jinja|tiktoken)$"
)
"""What transformers and PEFT write beside weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What a person may say of a source that it does not say itself."""

    prefix: str = ""
    """Take only the weights whose names begin so, without it (`model.` of a LightningModule)."""
    names: tuple[str, ...] = ()
    """Names of the models, optimizers and schedulers in order, where there are several."""
    keep_names: bool = False
    """Do not take `module.` and `_orig_mod.` off the names."""
    without: tuple[str, ...] = ()
    """Leave the state of `optimizer`, `scheduler` or `scaler` behind, so that it starts fresh."""
    epochs_completed: int | None = None
    """Instead of what the source says."""
    global_step: int | None = None
    """Instead of what the source says."""
    mode: Mode | None = None
    """Whether lower or higher is better for the best metric; None judges by its name."""

    def __post_init__(self) -> None:
        if self.mode not in (None, "min", "max"):
            raise ConfigError(f"mode={self.mode!r} is not known; give 'min' or 'max'.")
        if unknown := sorted(set(self.without) - set(PARTS)):
            raise ConfigError(f"without={', '.join(unknown)} is not known; give some of {', '.join(PARTS)}.")
        for name in ("epochs_completed", "global_step"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; it counts what is completed, from 0 on.")


@dataclass(slots=True, kw_only=True)
class Foreign:
    """The parts of a source; several models, optimizers or schedulers are known by name, an only one by ""."""

    kind: str
    """For people."""
    options: ImportOptions
    models: dict[str, Weights] = field(default_factory=dict)
    tied: dict[str, dict[str, str]] = field(default_factory=dict)
    """Model's name -> key that is left out in the source -> key that is there."""
    optimizers: dict[str, Any] = field(default_factory=dict)
    schedulers: dict[str, Any] = field(default_factory=dict)
    scaler: Any = None
    mode: Mode | None = None
    """Whether lower or higher is better, where the source says it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Everything else: epoch, step, metrics."""
    attached: list[str] = field(default_factory=list)
    """Paths of the files that make a folder of weights a model to be loaded: its config, its tokenizer."""
    notes: list[str] = field(default_factory=list)
    """What was mapped, guessed or not taken, for people."""


def read_foreign(source: str, options: ImportOptions, load: Load) -> Foreign:
    """The parts of a file or folder; see `exchange.import_checkpoint` for what is known.

    Raises:
        NoCheckpointError, CorruptCheckpointError: it is nothing that is known, or damaged.
        ConfigError: an option does not fit it.
    """
    if not os.path.exists(source):
        raise NoCheckpointError(f"{source}: there is no such file or folder. Give the checkpoint to be imported.")
    if os.path.isdir(source):
        foreign = _read_folder(source, options, load)
    elif source.endswith(".safetensors"):
        foreign = Foreign(kind="safetensors (weights only)", options=options)
        _add_safetensors(foreign, "", [source])
    else:
        foreign = _read_dictionary(source, load(source), options)
    for name, weights in foreign.models.items():
        foreign.models[name] = _map_names(foreign, name, weights)
    return foreign


# Dictionaries


def _read_dictionary(source: str, loaded: Any, options: ImportOptions) -> Foreign:
    if not isinstance(loaded, Mapping):
        raise CorruptCheckpointError(f"{source} holds a {type(loaded).__name__}, expected a dictionary.", source)
    if _LIGHTNING in loaded:
        return _read_lightning(source, loaded, options)
    foreign = Foreign(kind="a dictionary of torch.save", options=options)
    model_key = next((key for key in MODEL_KEYS if _holds_weights(loaded.get(key))), None)
    if model_key is None and _is_weights(loaded):
        foreign.kind = "a bare state_dict (weights only)"
        foreign.models = {"": dict(loaded)}
        return foreign
    if model_key is None:
        raise CorruptCheckpointError(
            f"{source} holds no model: expected one of the keys {', '.join(MODEL_KEYS[:4])} with a state_dict, or a "
            f"bare state_dict; found {_some(map(str, loaded))}. Save the model's state_dict() under model_state_dict; "
            f"of several models a dictionary of them by name.",
            source,
        )
    found = {
        "optimizer": _first(loaded, OPTIMIZER_KEYS),
        "scheduler": _first(loaded, SCHEDULER_KEYS),
        "scaler": _first(loaded, SCALER_KEYS),
    }
    foreign.models = _by_name(loaded[model_key], _is_weights)
    foreign.optimizers = _by_name(loaded.get(found["optimizer"]), is_optimizer_state)
    foreign.schedulers = _by_name(loaded.get(found["scheduler"]), lambda one: not _is_named(one, foreign.optimizers))
    foreign.scaler = loaded.get(found["scaler"])
    if found["optimizer"] and not foreign.optimizers:
        foreign.notes.append(f"{found['optimizer']} is no state of a torch optimizer and was not taken")
    taken = {model_key, *found.values()}
    foreign.facts = {str(key): value for key, value in loaded.items() if key not in taken}
    return foreign


def _read_lightning(source: str, loaded: Mapping[str, Any], options: ImportOptions) -> Foreign:
    foreign = Foreign(kind=f"a checkpoint of Lightning {loaded[_LIGHTNING]}", options=options)
    weights = loaded.get("state_dict")
    if not _is_weights(weights):
        raise CorruptCheckpointError(f"{source}: state_dict holds no weights.", source)
    assert isinstance(weights, Mapping)
    optimizers, schedulers = loaded.get("optimizer_states") or [], loaded.get("lr_schedulers") or []
    foreign.models = {"": dict(weights)}
    foreign.optimizers = _in_order("optimizers", optimizers, options, source)
    foreign.schedulers = _in_order("schedulers", schedulers, options, source)
    foreign.scaler = loaded.get(_LIGHTNING_SCALER) or loaded.get("native_amp_scaling_state")
    foreign.facts = {key: loaded[key] for key in ("global_step",) if key in loaded}
    _count_epochs(loaded, foreign)
    _read_monitored(loaded.get("callbacks"), foreign)
    known = {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops", _LIGHTNING}
    rest = sorted(set(loaded) - known - {_LIGHTNING_SCALER, "native_amp_scaling_state"})
    if rest:
        foreign.notes.append(f"not taken: {', '.join(rest)}")
    return foreign


def _count_epochs(loaded: Mapping[str, Any], foreign: Foreign) -> None:
    """Lightning's `epoch` counts the epochs that are over: in the hooks at an epoch's end, where it saves, that one is
    not among them. Source: lightning's `loops/fit_loop.py`, `on_advance_end`, and `Trainer.current_epoch`.
    """
    completed = int(loaded.get("epoch") or 0)
    try:
        loop = loaded["loops"]["fit_loop"]
        is_open = loop["epoch_progress"]["current"]["ready"] > completed
        at_its_end = loop["epoch_loop.batch_progress"]["is_last_batch"] is not False
    except (KeyError, TypeError):
        is_open = at_its_end = True
    if is_open and not at_its_end:
        foreign.notes.append("it was saved in the middle of an epoch, which begins again")
    foreign.facts["epochs_completed"] = completed + (is_open and at_its_end)


def _read_monitored(callbacks: Any, foreign: Foreign) -> None:
    """What ModelCheckpoint watched."""
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        monitor = state.get("monitor") if isinstance(state, Mapping) else None
        if str(key).startswith("ModelCheckpoint") and monitor and state.get("best_model_score") is not None:
            named = re.search(r"'mode': '(min|max)'", str(key))
            foreign.facts[f"best_{monitor}"] = state["best_model_score"]
            foreign.mode = cast(Mode, named[1]) if named else None
            if state.get("current_score") is not None:
                foreign.facts.setdefault("metrics", {})[monitor] = state["current_score"]


def is_optimizer_state(value: Any) -> bool:
    """Whether it is the state_dict of a torch optimizer."""
    groups = value.get("param_groups") if isinstance(value, Mapping) else None
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


def _is_weights(value: Any) -> bool:
    """Tensors by name; beside them what modules return from get_extra_state."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    plain = [one for key, one in value.items() if not key.endswith("_extra_state")]
    return bool(plain) and all(isinstance(one, torch.Tensor) for one in plain)


def _holds_weights(value: Any) -> bool:
    several = isinstance(value, Mapping) and bool(value) and all(_is_weights(one) for one in value.values())
    return several or _is_weights(value)


def _by_name(value: Any, is_one: Callable[[Any], bool]) -> dict[str, Any]:
    """An only one, or several in a dictionary by name; empty where it is neither."""
    if not isinstance(value, Mapping) or not value:
        return {}
    if is_one(value):
        return {"": dict(value)}
    several = all(isinstance(one, Mapping) and is_one(one) for one in value.values())
    return {str(name): dict(one) for name, one in value.items()} if several else {}


def _is_named(value: Any, optimizers: Mapping[str, Any]) -> bool:
    """Whether a scheduler's state is really that of several, by the optimizers' names."""
    return "" not in optimizers and bool(optimizers) and set(value) <= set(optimizers)


def _first(loaded: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if isinstance(loaded.get(key), Mapping)), None)


# Folders


def _read_folder(source: str, options: ImportOptions, load: Load) -> Foreign:
    names = sorted(os.listdir(source))
    _require_foreign(source, names)
    has_training_state = any(
        re.match(r"(optimizer|scheduler|random_states)[_\d]*\.(bin|pt|pkl)$", one) for one in names
    )
    by_trainer = "trainer_state.json" in names
    kind = "a folder of Accelerate's save_state" if has_training_state else "a folder of weights"
    foreign = Foreign(kind="a checkpoint of transformers' Trainer" if by_trainer else kind, options=options)
    models = _find_models(source, names)
    for name, files in _in_order("models", models, options, source).items():
        if files[0].endswith(".safetensors"):
            _add_safetensors(foreign, name, files)
        else:
            foreign.models[name] = _merge_weights(files, load)
    parts = {part: [load(os.path.join(source, one)) for one in _numbered(names, part)] for part in PARTS}
    foreign.optimizers = _in_order("optimizers", parts["optimizer"], options, source)
    foreign.schedulers = _in_order("schedulers", parts["scheduler"], options, source)
    foreign.scaler = next(iter(parts["scaler"]), None)
    if by_trainer:
        _read_trainer_state(foreign, os.path.join(source, "trainer_state.json"))
    taken = {os.path.basename(file) for files in models for file in files}
    taken |= {one for part in PARTS for one in _numbered(names, part)} | {"trainer_state.json"}
    foreign.attached = [os.path.join(source, one) for one in names if one not in taken and _GOES_ALONG.match(one)]
    taken |= {os.path.basename(one) for one in foreign.attached}
    rest = [one for one in names if one not in taken and not one.endswith((".index.json", ".md"))]
    if rest:
        foreign.notes.append(f"not taken: {_some(rest)}")
    return foreign


def _require_foreign(source: str, names: Sequence[str]) -> None:
    if MANIFEST_NAME in names or CHECKPOINTS in names or RUN_FILE in names:
        raise ConfigError(
            f"{source} is of dist_train already: nothing has to be imported. Give its path to the training as resume=, "
            f"or to load_model."
        )
    if any(one.endswith(_SHARDED) for one in names) or "pytorch_model_fsdp_0" in names:
        raise ConfigError(
            f"{source} is a sharded checkpoint, whose parts are no whole tensors. Make one file of it first "
            f"(`accelerate merge-weights`, or torch.distributed.checkpoint.format_utils.dcp_to_torch_save), and import "
            f"that."
        )


def _find_models(source: str, names: Sequence[str]) -> list[list[str]]:
    """The files of each model."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = f"{stem}.{ending}.index.json"
        if index in names:
            shards = sorted(set(_read_json(os.path.join(source, index))["weight_map"].values()))
            return [[os.path.join(source, one) for one in shards]]
        if found := [one for one in names if re.fullmatch(rf"{stem}(_\d+)?\.{ending}", one)]:
            return [[os.path.join(source, one)] for one in sorted(found, key=_number)]
    raise NoCheckpointError(
        f"{source} holds no model that is known: expected model.safetensors, pytorch_model.bin or an index of shards; "
        f"found {_some(names) or 'nothing'}. Give the file itself if it has another name."
    )


def _numbered(names: Iterable[str], stem: str) -> list[str]:
    """`optimizer.bin`, `optimizer_1.bin`, ... in order."""
    return sorted((one for one in names if re.fullmatch(rf"{stem}(_\d+)?\.(bin|pt)", one)), key=_number)


def _number(name: str) -> int:
    match = re.search(r"_(\d+)\.", name)
    return int(match[1]) if match else 0


def _in_order(what: str, values: Sequence[Any], options: ImportOptions, source: str) -> dict[str, Any]:
    """By the names that the user gave; an only one needs none."""
    if len(values) <= 1:
        return dict(zip([""], values, strict=False))
    if len(values) != len(options.names):
        raise ConfigError(
            f"{source} holds {len(values)} {what}; give their names in order as you give them to Run "
            f"(--names generator,discriminator), found {len(options.names)} names."
        )
    return dict(zip(options.names, values, strict=True))


def _merge_weights(files: Sequence[str], load: Load) -> Weights:
    weights: Weights = {}
    for file in files:
        loaded = load(file)
        if not _is_weights(loaded):
            raise CorruptCheckpointError(f"{file} holds no weights by name.", file)
        weights.update(loaded)
    return weights


def _add_safetensors(foreign: Foreign, name: str, files: Sequence[str]) -> None:
    """Tensors are mapped from the files. A name that the metadata ties to another one is an alias of it."""
    weights: Weights = {}
    noted: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                weights.update({key: file.get_tensor(key) for key in file.offset_keys()})
                noted.update(file.metadata() or {})
        except SafetensorError as error:
            raise CorruptCheckpointError(
                f"{path} cannot be read as safetensors ({error}). It is damaged, cut short or of another kind.", path
            ) from error
    if not weights:
        raise CorruptCheckpointError(f"{', '.join(files)} holds no tensors.", files[0])
    foreign.models[name] = weights
    foreign.tied[name] = {key: to for key, to in noted.items() if to in weights and key not in weights}


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON ({error}).", path) from error


def _read_trainer_state(foreign: Foreign, path: str) -> None:
    """transformers counts epochs as a fraction: whole ones are completed."""
    state = _read_json(path)
    epoch, step = float(state.get("epoch") or 0), int(state.get("global_step") or 0)
    foreign.facts = {"epochs_completed": int(epoch), "global_step": step}
    if not epoch.is_integer():
        foreign.notes.append(f"it was saved in the middle of an epoch ({epoch:.2f}), which begins again")
    for record in state.get("log_history") or []:
        if record.get("step") == step:
            foreign.facts.update({key: value for key, value in record.items() if key.startswith("eval_")})


# Names


def _map_names(foreign: Foreign, model: str, weights: Weights) -> Weights:
    options = foreign.options
    mapping = {key: key for key in weights}
    if not options.keep_names:
        mapping = {key: clean_name(key) for key in mapping}
        changed = sum(key != new for key, new in mapping.items())
        if changed:
            foreign.notes.append(f"{changed} names: _orig_mod. and the like taken off")
        _strip(mapping, "module.", foreign)
    is_lightning = "Lightning" in foreign.kind
    if options.prefix:
        _keep_prefixed(mapping, options.prefix, foreign)
    elif is_lightning and not options.keep_names and not _strip(mapping, "model.", foreign):
        foreign.notes.append("the names are the LightningModule's; --prefix takes those of one of its modules")
    if len(set(mapping.values())) != len(mapping):
        raise ConfigError("Two weights would get the same name when prefixes are taken off; give --keep-names.")
    tied = foreign.tied.get(model, {})
    foreign.tied[model] = {_like(mapping, key, to): mapping[to] for key, to in tied.items() if to in mapping}
    return {new: weights[key] for key, new in mapping.items()}


def _strip(mapping: dict[str, str], prefix: str, foreign: Foreign) -> bool:
    """Takes a prefix off that all names have."""
    if not mapping or not all(name.startswith(prefix) for name in mapping.values()):
        return False
    while all(name.startswith(prefix) for name in mapping.values()):
        mapping.update({key: name.removeprefix(prefix) for key, name in mapping.items()})
    foreign.notes.append(f"{len(mapping)} names: {prefix} taken off")
    return True


def _keep_prefixed(mapping: dict[str, str], prefix: str, foreign: Foreign) -> None:
    left = [key for key, name in mapping.items() if not name.startswith(prefix)]
    if len(left) == len(mapping):
        raise ConfigError(f"No weight's name begins with {prefix!r}; they are {_some(mapping.values())}.")
    for key in left:
        del mapping[key]
    mapping.update({key: name.removeprefix(prefix) for key, name in mapping.items()})
    foreign.notes.append(f"{len(mapping)} names: {prefix} taken off")
    if left:
        foreign.notes.append(f"not taken, since their names begin otherwise: {_some(left)}")


def _like(mapping: Mapping[str, str], key: str, example: str) -> str:
    """The new name of a key that is not among the weights, mapped as another one was."""
    lost = len(example) - len(mapping[example])
    return key[lost:] if key[:lost] == example[:lost] else clean_name(key)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
