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
from collections.abc import Iterator, Sequence
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

from dist_train.errors import ConfigError
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
    names = _require_units(model, units) if units else find_units(model)
    shape = _mesh_shape(kind, world)
    if shape is None:
        return Accelerator(**options)
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
        ConfigError: the optimizer has state, of parameters that sharding would replace.
    """
    if accelerator.is_fsdp2 and optimizer.state:
        raise ConfigError(
            f"{type(optimizer).__name__} holds state before its first step, of parameters that FSDP2 replaces by "
            f"sharded ones: Accelerate would lose it. Give an optimizer that makes its state in its first step (AdamW, "
            f"SGD), or sharding='none'; in a loop of your own call torch.distributed.fsdp.fully_shard, then make the "
            f"optimizer."
        )
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        # As Accelerate does it around autocast. An `output_dtype` would be that of each block, too.
        model.register_forward_hook(lambda module, inputs, outputs: convert_to_fp32(outputs))
    return model, optimizer


def find_units(model: nn.Module) -> list[str]:
    """Class names of the blocks that a model is made of: what it says itself (`_no_split_modules` of transformers),
    else what its outermost ModuleLists hold, else its own classes that occur more than once among a Sequential's
    parts. Without any the model is gathered whole.
    """
    present = {type(module).__name__ for module in model.modules()}
    if told := [name for name in getattr(model, "_no_split_modules", None) or () if name in present]:
        return sorted(told)
    return sorted({type(block).__name__ for block in _blocks(model) if _is_unit(block)})


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


def _require_units(model: nn.Module, units: Sequence[str]) -> list[str]:
    present = Counter(type(module).__name__ for module in model.modules() if any(True for _ in module.parameters()))
    if missing := [name for name in units if name not in present]:
        held = ", ".join(f"{name} ({count})" for name, count in present.most_common(12))
        raise ConfigError(
            f"shard_units names {', '.join(missing)}, and no module of the model with parameters is of such a class; "
            f"there are {held}. Name the class of the model's blocks, or leave shard_units out."
        )
    return list(units)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)
    if isinstance(model, nn.Sequential):
        kinds = Counter(type(child) for child in model)
        yield from (child for child in model if kinds[type(child)] > 1)


def _is_unit(block: nn.Module) -> bool:
    """Made of modules itself and with something to shard; a lone layer is too small to be gathered by itself."""
    return any(True for _ in block.children()) and any(True for _ in block.parameters())
