"""Accelerate with FSDP2: an Accelerator that shards wherever it is asked to, and what the Trainer asks of it.

    none    every rank holds the model (DistributedDataParallel)
    fsdp    parameters, gradients and optimizer state are spread over all ranks
    hsdp    spread over the ranks of a host, and a copy on each host

Invariant: alone there is nothing to share, and the model stays as it is: a checkpoint of any layout loads into it.
It shards nothing by itself, and knows nothing of checkpoints.
Source: accelerate 1.15, state.py (AcceleratorState.__init__) and utils/fsdp_utils.py (fsdp2_prepare_model).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
import xxhash
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ParallelismConfig,
    convert_to_fp32,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import ConfigError
from dist_train.fully_sharded import is_sharded
from dist_train.world import World

logger = logging.getLogger(__name__)
KINDS: Final = ("none", "fsdp", "hsdp")
_HALF: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(plugin: FullyShardedDataParallelPlugin, **options: Any) -> Accelerator:
    """`Accelerator(fsdp_plugin=plugin, **options)` that shards on CPUs, too. After `dist_train.init_distributed()`.

    Accelerate 1.15 forgets the plugin where the ranks are on CPUs, and would train a copy of the model on each. On
    other devices, and alone, this is just that call.

    Raises:
        ConfigError: the plugin is of FSDP1, or an Accelerator of another kind was made before in this process.
    """
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "FullyShardedDataParallelPlugin is of FSDP1, which flattens parameters into one another: no checkpoint of "
            "them fits another number of ranks. Give fsdp_version=2."
        )
    cpu = bool(options.get("cpu")) or parse_flag_from_env("ACCELERATE_USE_CPU")
    if PartialState(cpu).distributed_type == DistributedType.MULTI_CPU:
        precision = options.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            plugin.set_mixed_precision(precision)
        # What AcceleratorState does for other devices, which takes over what it finds here.
        PartialState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if accelerator.num_processes > 1 and not accelerator.is_fsdp2:
        raise ConfigError(
            f"An Accelerator was made before in this process, without the plugin ({accelerator.distributed_type}): "
            f"Accelerate keeps what the first one was told. Make only this one."
        )
    return accelerator


def make_trainers_accelerator(
    kind: str, model: nn.Module, units: Sequence[str], world: World, **options: Any
) -> Accelerator:
    """What the Trainer prepares its model with. Collective.

    Args:
        kind: of `KINDS`.
        units: class names of what is gathered at a time; none for what `find_units` finds.

    Raises:
        ConfigError: a unit is not in the model, or hosts have different numbers of ranks.
    """
    if units:
        _require_units(model, units)
    shape = _mesh_shape(kind, world)
    if shape is None:
        return Accelerator(**options)
    _require_bare(model)
    names = _require_apart(model, units) if units else find_units(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap" if names else "no_wrap",
        transformer_cls_names_to_wrap=names,
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        mixed_precision_policy=_precision(options.get("mixed_precision")),
    )
    if len(shape) > 1:
        options["parallelism_config"] = ParallelismConfig(dp_replicate_size=shape[0], dp_shard_size=shape[1])
    # Gradients that wait for their window's end unreduced are whole ones: as large as the model, on each rank.
    steps = GradientAccumulationPlugin(num_steps=1, sync_each_batch=True)
    accelerator = make_accelerator(plugin, gradient_accumulation_plugin=steps, **options)
    _require_computable(model, accelerator)
    give_all_ranks_one_start(model, world)
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As `accelerator.prepare`, for the Trainer. Collective.

    Raises:
        ConfigError: the optimizer has state, of parameters that sharding would replace; it trains other parameters
            than the model's, or wants a closure.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS evaluates the loss several times an update, by a closure, which the Trainer does not give: use it "
            "in a loop of your own (docs/own-loops.md), or another optimizer."
        )
    if accelerator.is_fsdp2:
        _require_of_model(optimizer, model)
    if accelerator.is_fsdp2 and optimizer.state:
        raise ConfigError(
            f"{type(optimizer).__name__} holds state before its first step, of parameters that FSDP2 replaces by "
            f"sharded ones: Accelerate would lose it. Give an optimizer that makes its state in its first step (AdamW, "
            f"SGD), or sharding='none'; in a loop of your own call torch.distributed.fsdp.fully_shard, then make the "
            f"optimizer."
        )
    with _in_units_alone(model) if accelerator.is_fsdp2 and _carves_into_units(accelerator, model) else nullcontext():
        model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        # As Accelerate does it around autocast. An `output_dtype` would be that of each block, too.
        model.register_forward_hook(lambda module, inputs, outputs: convert_to_fp32(outputs))
    return model, optimizer


def find_units(model: nn.Module) -> list[str]:
    """Class names of the blocks that a model is made of: what it says itself (`_no_split_modules` of transformers),
    else what its outermost ModuleLists hold, else its own classes that occur more than once among a Sequential's
    parts. One that shares a parameter with the rest of the model (tied embeddings) is none. Without any the model is
    gathered whole.
    """
    present = {type(module).__name__ for module in model.modules()}
    found = {name for name in getattr(model, "_no_split_modules", None) or () if name in present}
    found = found or {type(block).__name__ for block in _blocks(model) if _is_unit(block)}
    while tied := _shared_beyond(model, found):
        found -= {unit for unit, _ in tied}
    return sorted(found)


def give_all_ranks_one_start(model: nn.Module, world: World) -> None:
    """The main rank's weights for all, as DistributedDataParallel does it: each rank keeps a part of its own model, and
    parts of different ones are no model, nor copies of one another. Nothing is sent where they are equal. Collective.
    """
    if world.world_size == 1:
        return
    tensors = [one.detach() for one in [*model.parameters(), *model.buffers()]]
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        data: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    if len(set(world.gather(digest.hexdigest(), "the model's first weights"))) == 1:
        return
    if world.is_main:
        logger.warning(
            "The ranks have initialised the model differently; all take the main rank's. Seed before the model is made "
            "(dist_train.seed_everything), or runs with another number of ranks begin with other weights."
        )
    for tensor in tensors:
        world.broadcast_tensor(tensor)


def _mesh_shape(kind: str, world: World) -> tuple[int, ...] | None:
    """(ranks), or (hosts, ranks of a host); None where there is nobody to share with. Collective for hsdp."""
    if kind == "none" or world.world_size == 1:
        return None
    if kind == "fsdp":
        return (world.world_size,)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    sizes = world.gather(local, "the number of ranks of each host")
    if len(set(sizes)) > 1 or world.world_size % local:
        raise ConfigError(
            f"sharding='hsdp' shards within a host and keeps a copy on each, so all hosts need the same number of "
            f"ranks; the {world.world_size} ranks tell that their hosts have {sizes} (LOCAL_WORLD_SIZE). Launch as "
            f"many on each host, or shard over all of them: sharding='fsdp'."
        )
    if local == 1:
        logger.warning(
            "sharding='hsdp' shards within a host, and each of the %d has one rank: every rank holds the whole model. "
            "sharding='fsdp' shards over all of them.",
            world.world_size,
        )
        return None
    return (local,) if local == world.world_size else (world.world_size // local, local)


def _precision(name: str | None) -> Any:
    """Computes in half precision and sums gradients in float32: what they are does not depend on over how many ranks
    they are summed, beyond float32's rounding.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if name not in _HALF:
        return None
    return MixedPrecisionPolicy(param_dtype=_HALF[name], reduce_dtype=torch.float32)


def _require_computable(model: nn.Module, accelerator: Accelerator) -> None:
    """FSDP2 casts parameters and leaves buffers as they are, autocast casts neither of a BatchNorm's."""
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.affine]
    if accelerator.device.type == "cpu" and accelerator.mixed_precision in _HALF and norms:
        raise ConfigError(
            f"The model has {len(norms)} {type(norms[0]).__name__}, whose weights FSDP2 casts to "
            f"{accelerator.mixed_precision} and whose running means it leaves in float32: a CPU computes no such "
            f"mixture. Use mixed_precision='no', another normalisation (LayerNorm, GroupNorm), or sharding='none'."
        )


def _require_bare(model: nn.Module) -> None:
    if is_sharded(model) or any(isinstance(one, DTensor) for one in model.parameters()):
        raise ConfigError(
            "The model is sharded already (fully_shard, or DTensors in it), and the Trainer shards by itself: give it "
            "the plain model, or train the sharded one in a loop of your own (docs/own-loops.md)."
        )
    if wrapped := next((one for one in model.modules() if isinstance(one, DistributedDataParallel)), None):
        raise ConfigError(
            f"The model is, or holds, a {type(wrapped).__name__}, which keeps the whole model on each rank. Give the "
            f"Trainer the bare model: it shards or wraps by itself."
        )
    if scalars := [name for name, one in model.named_parameters() if one.dim() == 0]:
        raise ConfigError(
            f"FSDP2 cannot shard parameters without a dimension ({', '.join(scalars[:4])}): make them of shape [1], "
            f"torch.zeros(1) in place of torch.tensor(0.0), or use sharding='none'."
        )


def _require_of_model(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Accelerate gives the optimizer sharded parameters for those of the model, and knows no others."""
    known = {id(one) for one in model.parameters()}
    strange = [one for group in optimizer.param_groups for one in group["params"] if id(one) not in known]
    if strange:
        shapes = ", ".join(str(list(one.shape)) for one in strange[:4])
        raise ConfigError(
            f"{type(optimizer).__name__} trains {len(strange)} tensors that are no parameters of the model (of shape "
            f"{shapes}). Make the optimizer from the model's parameters, after the last change to the model."
        )


def _require_units(model: nn.Module, units: Sequence[str]) -> None:
    present = Counter(type(module).__name__ for module in model.modules() if any(True for _ in module.parameters()))
    if missing := [name for name in units if name not in present]:
        held = ", ".join(f"{name} ({count})" for name, count in present.most_common(12))
        raise ConfigError(
            f"shard_units names {', '.join(missing)}, and no module of the model with parameters is of such a class; "
            f"there are {held}. Name the class of the model's blocks, or leave shard_units out."
        )


def _require_apart(model: nn.Module, units: Sequence[str]) -> list[str]:
    """FSDP2 gathers a unit's parameters for it alone, which another module that has one of them would not find."""
    if tied := _shared_beyond(model, units):
        unit, name = tied[0]
        raise ConfigError(
            f"shard_units names {unit}, and {name} belongs to modules inside and outside of one {unit} (it is tied): "
            f"FSDP2 gathers a unit's parameters for that unit alone. Leave {unit} out of shard_units, or name a class "
            f"whose modules hold all of its places."
        )
    return list(units)


def _units_of(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """The outermost modules of these classes, the model itself aside."""
    if not names:
        return []
    found: list[nn.Module] = []
    for child in model.children():
        found += [child] if {kind.__name__ for kind in type(child).__mro__} & {*names} else _units_of(child, names)
    return found


def _shared_beyond(model: nn.Module, names: Collection[str]) -> list[tuple[str, str]]:
    """(class, parameter) of units that have a parameter in common with what is outside of them."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for one in module.parameters(recurse=False):
            owners.setdefault(id(one), set()).add(module)
    keys = {id(one): key for key, one in model.named_parameters()}
    return [
        (next(kind.__name__ for kind in type(unit).__mro__ if kind.__name__ in names), keys[id(one)])
        for unit in _units_of(model, names)
        for one in unit.parameters()
        if not owners[id(one)] <= set(unit.modules())
    ]


def _carves_into_units(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether what Accelerate makes units of besides those that it is told of (the input embedding; the final norm
    with the output embedding) lies in one of them, or shares a parameter with a third module: torch refuses both.
    """
    units = _units_of(model, accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or ())
    inner = {id(module) for unit in units for module in unit.modules() if module is not unit}
    ends = [one() for name in ("get_input_embeddings", "get_output_embeddings") if (one := getattr(model, name, None))]
    ends = [one for one in ends if one is not None]
    held = {id(one) for end in ends for one in end.parameters()}
    others = [module for module in model.modules() if not any(module is end for end in ends)]
    shared = any(id(one) in held for module in others for one in module.parameters(recurse=False))
    norms = _children_of_base(model)
    return shared or any(id(one) in inner for one in [*ends, *norms])


def _children_of_base(model: nn.Module) -> list[nn.Module]:
    """Where Accelerate looks for the final norm."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    return [one for one in base.children() if "Norm" in type(one).__name__] if isinstance(base, nn.Module) else []


@contextmanager
def _in_units_alone(model: nn.Module) -> Iterator[None]:
    """Meanwhile Accelerate finds neither embeddings nor a final norm: they are gathered with the model's root.
    Source: accelerate 1.15, utils/fsdp_utils.py (fsdp2_prepare_model, _find_final_norm).
    """
    hidden: dict[str, Any] = {
        "get_input_embeddings": lambda: None,
        "get_output_embeddings": lambda: None,
        "base_model_prefix": "no such module",
    }
    before = {name: vars(model)[name] for name in hidden if name in vars(model)}
    vars(model).update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del vars(model)[name]
        vars(model).update(before)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
    if isinstance(model, nn.Sequential):
        kinds = Counter(type(child) for child in model)
        yield from (child for child in model if kinds[type(child)] > 1)


def _is_unit(block: nn.Module) -> bool:
    """Made of modules itself and with something to shard; a lone layer is too small to be gathered by itself."""
    return any(True for _ in block.children()) and any(True for _ in block.parameters())
