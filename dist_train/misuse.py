"""What scripts get wrong with a run, caught before it costs work: each message names the place and the way out.

Invariant: nothing here changes a run that is used right; a check costs nothing that a step would feel.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_train import unsaved
from dist_train.capture import Capture
from dist_train.data import training_sampler
from dist_train.errors import ConfigError, RunInUseError
from dist_train.fully_sharded import is_sharded, reshard
from dist_train.model_state import clean_name
from dist_train.optimizer_state import innermost_optimizer
from dist_train.places import Place
from dist_train.tied import storage_key
from dist_train.world import World

logger = logging.getLogger(__name__)
_open_runs: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_MOST_NAMES = 4


def require_one_world(accelerator: Any | None, world: World) -> None:
    """Raises ConfigError when Accelerate believes in another number of processes than were launched."""
    if accelerator is not None and accelerator.num_processes != world.world_size:
        raise ConfigError(
            f"{world.world_size} processes were launched, but the Accelerator believes in "
            f"{accelerator.num_processes}. Call dist_train.init_distributed() before Accelerator() is made "
            f"(on a machine without a GPU, Accelerator(cpu=True) does it too)."
        )


def is_prepared(one: Any) -> bool:
    """Whether it is Accelerate's wrapper and not the object that the script made."""
    return type(one).__module__.partition(".")[0] == "accelerate"


def refuse_prepared(schedulers: Mapping[str, Any], loader: Any | None) -> None:
    """Raises ConfigError for what `accelerator.prepare` makes inexact."""
    for name, scheduler in schedulers.items():
        if is_prepared(scheduler):
            which = f"The scheduler {name!r}" if name else "The scheduler"
            raise ConfigError(
                f"{which} was given to accelerator.prepare, which would step it once a process and count updates that "
                f"the GradScaler left out. Leave it out there, and step it yourself once an optimizer update: "
                f"`if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped: scheduler.step()`."
            )
    if is_prepared(loader):
        raise ConfigError(
            f"The loader was given to accelerator.prepare ({type(loader).__name__}), which reads a batch ahead, draws "
            f"from the global random generators and pads the last batch: no resume can be exact. Leave it out there: "
            f"run.batches moves batches to the device, and dist_train.data_loader shards (a DataLoader of your own "
            f"takes a torch.utils.data.DistributedSampler)."
        )


def refuse_unsharded(accelerator: Any | None, models: Mapping[str, nn.Module], world: World) -> None:
    """Raises ConfigError where FSDP was asked for and is not there, or is the one that no checkpoint here can hold."""
    for name, model in models.items():
        if type(model).__name__ == "DeepSpeedEngine":
            raise ConfigError(
                f"{_title('model', name)} is a DeepSpeedEngine, which keeps weights and optimizer state in forms of "
                f"its own that no checkpoint here can hold. Shard with FSDP2 instead (TrainConfig(sharding='fsdp'), or "
                f"FullyShardedDataParallelPlugin(fsdp_version=2)), or save by engine.save_checkpoint."
            )
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            raise ConfigError(
                f"{_title('model', name)} is sharded by FSDP1, which flattens parameters into one another: they have "
                f"no names or shapes of their own to be saved by. Use FSDP2: "
                f"FullyShardedDataParallelPlugin(fsdp_version=2), or torch.distributed.fsdp.fully_shard."
            )
    asked = accelerator is not None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    kind = str(getattr(getattr(accelerator, "distributed_type", ""), "value", ""))
    if asked and world.world_size > 1 and kind != "FSDP" and not any(is_sharded(model) for model in models.values()):
        raise ConfigError(
            f"FSDP was asked for (a FullyShardedDataParallelPlugin, or ACCELERATE_USE_FSDP=true), but Accelerate "
            f"leaves it out on this device (its distributed_type is {kind}): each of the {world.world_size} ranks "
            f"would hold and train the whole model. Make the Accelerator with "
            f"dist_train.sharding.make_accelerator(plugin, ...), which shards on CPUs, too (the Trainer: "
            f"TrainConfig(sharding='fsdp')), or leave FSDP out."
        )


def require_averaged(
    models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], world: World, loader: Any = None
) -> None:
    """Raises ConfigError for a model that is trained on several ranks and whose gradients nothing averages over them.

    Args:
        models: as the Run was given them. A frozen one, and an average that no optimizer moves, need nothing.
        optimizers: innermost; without any, every parameter that takes a gradient counts as trained.
        loader: one of ours knows which ranks train on the same samples: nothing has to be averaged over these.
    """
    stepped = {id(p) for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    sampler = training_sampler(loader)
    place = Place(world.rank, world.world_size) if sampler is None else sampler.place
    for name, model in models.items() if place.count > 1 else ():
        averaged = {
            id(p) for part in model.modules() if isinstance(part, DistributedDataParallel) for p in part.parameters()
        }
        alone = [
            key
            for key, p in model.named_parameters()
            if p.requires_grad and not _is_spread(p, place) and id(p) not in averaged
            if not stepped or id(p) in stepped
        ]
        if not alone:
            continue
        if place.ranks is not None:
            raise ConfigError(
                f"{_title('model', name)} ({type(model).__name__}) is trained on samples of its own at each of the "
                f"{place.count} places of the mesh, and nobody averages the gradients over these ({_some(alone)}): "
                f"each would train apart. Call torch.distributed.fsdp.fully_shard(model, mesh=mesh['dp']) after the "
                f"model was parallelized, on the dimensions over which samples are divided. A loop that averages the "
                f"gradients by itself says so: options=RunOptions(own_gradients=True)."
            )
        if not is_sharded(model) and any(isinstance(p, DTensor) for p in model.parameters()):
            raise ConfigError(
                f"{_title('model', name)} is tensor parallel, and nobody averages the gradients of {len(alone)} plain "
                f"parameters in it over the {world.world_size} processes ({_some(alone)}). Where these take the same "
                f"samples nothing has to be averaged: give dist_train.data_loader the mesh (mesh=), and the Run that "
                f"loader. Where some take others, call torch.distributed.fsdp.fully_shard over those. A loop that sees "
                f"to it by itself says so: options=RunOptions(own_gradients=True)."
            )
        if is_sharded(model):
            raise ConfigError(
                f"{_title('model', name)} is sharded by fully_shard, but for {len(alone)} trained parameters whose "
                f"gradients nobody would average over the {world.world_size} processes ({_some(alone)}): each would "
                f"train values of its own. Leave them out of ignored_modules (ignored_params), freeze them with "
                f"requires_grad_(False), or, where the loop averages their gradients itself, say so: "
                f"options=RunOptions(own_gradients=True)."
            )
        raise ConfigError(
            f"{_title('model', name)} ({type(model).__name__}) was not given to accelerator.prepare: its gradients "
            f"would not be averaged over the {world.world_size} processes, which would train apart "
            f"({_some(alone)}). Give the Run what accelerator.prepare returns (or DistributedDataParallel, or a "
            f"model after fully_shard), and call that in the loop. A loop that averages the gradients by itself "
            f"says so: options=RunOptions(own_gradients=True)."
        )


def _is_spread(parameter: torch.Tensor, place: Place) -> bool:
    """Whether it lies on ranks that train on other samples, too: its gradients are averaged there."""
    if not isinstance(parameter, DTensor):
        return False
    return place.ranks is None or not set(parameter.device_mesh.mesh.reshape(-1).tolist()) <= set(place.ranks)


def require_used_right(*, entered: bool, in_epoch: bool = True, call: str) -> None:
    """Raises ConfigError for a call before `with run:` or outside of the loop over `run.epochs`."""
    if not entered:
        raise ConfigError(f"{call} was called outside of the run: write `with dist_train.Run(...) as run:` around it.")
    if not in_epoch:
        raise ConfigError(f"{call} belongs inside `for epoch in run.epochs(...):`; no epoch is in progress here.")


def note_open(run_dir: str, run: Any) -> str:
    """This run is the newest of this process on its directory, whose place is returned for `require_newest`."""
    place = os.path.realpath(run_dir)
    _open_runs[place] = run
    return place


def require_newest(place: str, run: Any) -> None:
    """Raises RunInUseError when this process has opened a later run on the same directory."""
    if _open_runs.get(place, run) is not run:
        raise RunInUseError(
            f"{place} was opened by a second Run of this process, which owns it now; this older one ends at once, so "
            f"that two do not write in turns. Give each Run its own run_dir, or leave the first `with` block before "
            f"the second begins."
        )


class ParameterWatch:
    """Notices that a model's parameters, or an optimizer's groups, are not those that the run began with.

    Args:
        models, optimizers: innermost, by name.
    """

    def __init__(self, models: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self._groups = {name: _members(optimizer) for name, optimizer in optimizers.items()}
        self._models = models
        self._optimizers = optimizers
        self._known = _parameters_of(models)
        if lazy := [name for name, one in self._known.items() if nn.parameter.is_lazy(one)]:
            raise ConfigError(
                f"The model has lazy parameters that have no shape yet: call the model on one batch before the "
                f"optimizer and the Run are made ({_some(lazy)})."
            )
        self._kinds = {name: (tuple(one.shape), one.dtype) for name, one in self._known.items()}
        self._require_own_parameters()

    def require_unchanged(self) -> None:
        """Raises ConfigError, naming the parameters that were added, removed, replaced or converted, or the optimizer
        whose groups were.
        """
        now = _parameters_of(self._models)
        changed = {
            "added": now.keys() - self._known.keys(),
            "removed": self._known.keys() - now.keys(),
            "replaced by other tensors": {n for n in now.keys() & self._known.keys() if now[n] is not self._known[n]},
        }
        same = now.keys() & self._known.keys() - changed["replaced by other tensors"]
        kinds = {name: (tuple(now[name].shape), now[name].dtype) for name in same}
        changed["given another shape or dtype"] = {name for name in same if kinds[name] != self._kinds[name]}
        told = [f"{what}: {_some(names)}" for what, names in changed.items() if names]
        if told:
            raise ConfigError(
                f"The model was changed after the Run was made ({'; '.join(told)}), so the optimizer may train tensors "
                f"that the model does not use, and no checkpoint would fit. Change the model first (a new head, "
                f".to(dtype), lazy layers), then make the optimizer, then the Run."
            )
        for name, optimizer in self._optimizers.items():
            self._require_same_groups(name, self._groups[name], _members(optimizer))

    def _require_same_groups(self, name: str, then: list[list[Any]], now: list[list[Any]]) -> None:
        """A restart of the script makes the groups of then, which no checkpoint with those of now would fit."""
        ids = [[[id(p) for p in group] for group in groups] for groups in (then, now)]
        if ids[0] != ids[1]:
            sizes = [", ".join(str(len(group)) for group in groups) for groups in (then, now)]
            sizes[1] += " others" if sizes[0] == sizes[1] else ""
            raise ConfigError(
                f"{_title('optimizer', name)}'s parameter groups were changed after the Run was made (they held "
                f"{sizes[0]} parameters and hold {sizes[1]}): the script started again makes them as they were, and "
                f"would refuse a checkpoint of what they are now, so none was written. Make every group before the "
                f"Run; one that is to be trained later has a learning rate of 0 until then."
            )

    def require_captured(self, capture: Capture, registered: Mapping[str, Any]) -> None:
        """Raises ConfigError for an optimizer's parameters that no checkpoint would hold."""
        kept = {storage_key(one) for one in [*capture.tensors.values(), *capture.per_rank.values()]}
        modules = [one for one in registered.values() if isinstance(one, nn.Module)]
        kept |= {storage_key(p) for module in [*self._models.values(), *modules] for p in module.parameters()}
        for name, optimizer in self._optimizers.items():
            lost = [p for group in optimizer.param_groups for p in group["params"] if storage_key(p) not in kept]
            if lost:
                shapes = _some([str(list(p.shape)) for p in lost])
                raise ConfigError(
                    f"{_title('optimizer', name)} trains {len(lost)} tensors (of shape {shapes}) that belong to no "
                    f"model of the Run and to nothing registered: they would not be saved. Give that module in "
                    f"`model={{...}}`, or call run.register(name, module) before run.epochs()."
                )

    def _require_own_parameters(self) -> None:
        mine = {id(parameter) for parameter in self._known.values()}
        for name, optimizer in self._optimizers.items():
            members = [p for group in optimizer.param_groups for p in group["params"]]
            if mine and members and not any(id(p) in mine for p in members):
                raise ConfigError(
                    f"{_title('optimizer', name)} trains no parameter of the model that the Run was given. Make the "
                    f"optimizer from that model's parameters, after the last change to it, and give both as they come "
                    f"from accelerator.prepare."
                )


class SchedulerWatch:
    """Notices a scheduler that no checkpoint would hold: its optimizer tells of it before anything is restored; and
    what else is not saved (see `unsaved`).

    A ReduceLROnPlateau leaves no mark on its optimizer and is not noticed.

    Args:
        optimizers: as the Run was given them, by name.
        schedulers, models: those that the Run was given.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Any],
        schedulers: Mapping[str, Any],
        models: Mapping[str, nn.Module],
        accelerator: Any | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._schedulers = schedulers
        self._models = models
        self._optimizers = {name: innermost_optimizer(one) for name, one in optimizers.items()}
        self._scheduled = {name: one for name, one in optimizers.items() if _has_scheduler(one)}

    def warn_of_unsaved(self, registered: Mapping[str, Any]) -> None:
        """When everything that will be saved is known.

        Raises:
            ConfigError: something was registered with Accelerate only.
        """
        unsaved.require_registered(
            self._accelerator, [*registered.values(), *self._schedulers.values(), *self._models.values()]
        )
        unsaved.warn_of_hooks(self._models)
        unsaved.warn_of_held_objects(self._optimizers, registered)
        owners = [getattr(one, "optimizer", None) for one in self._schedulers.values()]
        if None in owners:
            return  # one of a user's own, that does not tell which optimizer it moves
        owners += [getattr(one, "optimizer", None) for one in registered.values()]
        saved = {id(link) for owner in owners for link in _links(owner)}
        for name, optimizer in self._scheduled.items():
            if not any(id(link) in saved for link in _links(optimizer)):
                logger.warning(
                    "%s has a scheduler that the Run was not given: it is not saved, and starts again from its first "
                    "step after every resume. Give it to the Run as scheduler=, or call run.register(name, scheduler) "
                    "before run.epochs().",
                    _title("optimizer", name),
                )


def _has_scheduler(optimizer: Any) -> bool:
    """Source: LRScheduler.__init__ of torch 2.13, which wraps `optimizer.step` and leaves `initial_lr` in each group;
    schedulers of other libraries do the latter.
    """
    wrapped = any(hasattr(getattr(link, "step", None), "_wrapped_by_lr_sched") for link in _links(optimizer))
    return wrapped or any(
        "initial_lr" in group for link in _links(optimizer) for group in getattr(link, "param_groups", ())
    )


def _links(optimizer: Any) -> list[Any]:
    """An optimizer and what it wraps."""
    links: list[Any] = []
    while optimizer is not None and not any(optimizer is link for link in links):
        links.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return links


def _parameters_of(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    reshard(models.values())  # a forward pass of the loop's own may have left gathered ones in their places
    return {
        clean_name(f"{name}.{key}" if name else key): parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
    }


def _members(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The parameters of each group."""
    return [list(group["params"]) for group in optimizer.param_groups]


def _title(kind: str, name: str) -> str:
    return f"The {kind} {name!r}" if name else f"The {kind}"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST_NAMES} more" if len(ordered) > _MOST_NAMES else ""
    return ", ".join(ordered[:_MOST_NAMES]) + more
