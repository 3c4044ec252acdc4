"""Cases of several ranks: what one returns is compared rank by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dist_train as dt
from tests.support.dcp_planners import BalancingSave, FailingSave, HalvingSave, QuietlyHalvingSave
from tests.support.dcp_storages import Storage, blank, failures, numbers


def replicas(storage: Storage) -> Any:
    """Equal keys are written once; which rank's value it is follows from the plan, or is the lowest rank's."""
    state = {f"t{index}": numbers(index + 1, seed=dist.get_rank()) for index in range(5)} | {"rank": dist.get_rank()}
    storage.save(state, "spread")
    storage.save(state, "lowest", planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True))
    return [storage.load(blank(state), name) for name in ("spread", "lowest")]


def balanced(storage: Storage) -> Any:
    state = {f"t{index}": numbers(3, seed=index) for index in range(2 * dist.get_world_size())}
    storage.save(state, planner=BalancingSave())
    return storage.load(blank(state))


def own_keys(storage: Storage) -> Any:
    """A key that only one rank has."""
    rank = dist.get_rank()
    storage.save({"common": numbers(3), f"rank-{rank}": numbers(2, seed=rank), f"n{rank}": rank})
    return storage.load({"common": torch.zeros(3), f"rank-{rank}": torch.zeros(2), f"n{rank}": None})


def sharded(*sizes: int, placements: Any, shape: tuple[int, ...], seed: int = 0) -> DTensor:
    mesh = init_device_mesh("cpu", sizes)
    return distribute_tensor(numbers(*shape, seed=seed), mesh, placements)


def layouts() -> dict[str, Callable[[], torch.Tensor]]:
    world = dist.get_world_size()
    mixed = {
        "2d": lambda: sharded(2, 2, placements=[Shard(0), Shard(1)], shape=(7, 5)),
        "hybrid": lambda: sharded(2, 2, placements=[Replicate(), Shard(0)], shape=(7, 5)),
        "twice": lambda: sharded(2, 2, placements=[Shard(0), Shard(0)], shape=(7, 5)),
    }
    return {
        "rows": lambda: sharded(world, placements=[Shard(0)], shape=(7, 5)),
        "columns": lambda: sharded(world, placements=[Shard(1)], shape=(7, 5)),
        "replicated": lambda: sharded(world, placements=[Replicate()], shape=(7, 5)),
        "plain": lambda: numbers(7, 5),
        **(mixed if world == 4 else {}),
    }


def resharding(storage: Storage) -> Any:
    """Every layout into every other one."""
    small = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(1,))
    storage.save({name: make() for name, make in layouts().items()} | {"small": small})
    loaded = {}
    for target, make in layouts().items():
        state = storage.load({source: blank(make()) for source in layouts()} | {"small": torch.zeros(1)})
        loaded[target] = {name: local(value) for name, value in state.items()}
    return loaded


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fsdp(storage: Storage) -> Any:
    model, optimizer = fsdp_trained(0)
    storage.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    return load_into_another(storage, *fsdp_trained(1))


def fsdp_trained(seed: int, mesh: DeviceMesh | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    return model, with_moments(model)


def sharded_tensors(storage: Storage) -> Any:
    """The kind before DTensor."""
    from torch.distributed._shard.sharded_tensor import Shard as OldShard
    from torch.distributed._shard.sharded_tensor import ShardMetadata, init_from_local_shards

    rank, world = dist.get_rank(), dist.get_world_size()

    def make(values: torch.Tensor) -> Any:
        place = ShardMetadata(shard_offsets=[2 * rank, 0], shard_sizes=[2, 3], placement=f"rank:{rank}/cpu")
        return init_from_local_shards([OldShard(values, place)], (2 * world, 3))

    storage.save({"old": make(numbers(2, 3, seed=rank))})
    state = storage.load({"old": make(torch.zeros(2, 3))})
    whole = storage.load({"old": torch.zeros(2 * world, 3)})
    return [state["old"].local_shards()[0].tensor, whole]


def in_groups(storage: Storage) -> Any:
    """Two groups at once, each with a checkpoint of its own; then the first group's, by everybody."""
    rank, half = dist.get_rank(), dist.get_world_size() // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, 2 * half)))]
    mine = rank // half
    state = {"t": numbers(4, seed=mine), "u": numbers(4, seed=mine + 5), "group": mine}
    storage.save(state, f"group-{mine}", process_group=groups[mine])
    dist.barrier()
    loaded = storage.load(blank(state), f"group-{mine}", process_group=groups[mine])
    return [loaded, storage.load(blank(state), "group-0")]


def alone_in_a_world(storage: Storage) -> Any:
    """`no_dist`: each rank has a checkpoint of its own, of all that it holds."""
    rank = dist.get_rank()
    state = {"t": numbers(4, seed=rank), "rank": rank}
    storage.save(state, f"rank-{rank}", no_dist=True)
    return storage.load(blank(state), f"rank-{rank}", no_dist=True)


def without_collectives(storage: Storage) -> Any:
    """Each rank's metadata and parts, under one path."""
    rank = dist.get_rank()
    weight = sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5))
    state = {"w": weight, "t": numbers(3, seed=rank), "rank": rank}
    for _ in range(2):
        storage.save(state, use_collectives=False)
    loaded = storage.load({"w": blank(weight), "t": torch.zeros(3), "rank": None})
    return [local(loaded["w"]), loaded["t"], loaded["rank"]]


def a_rank_that_fails(storage: Storage) -> Any:
    """Everybody learns of it, and the next save goes through."""
    state = {"w": sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5))}
    failed = failures(lambda: storage.save(state, "x", planner=FailingSave()))
    storage.save(state, "x")
    return [failed, storage.load({"w": torch.zeros(7, 5)}, "x")]


def a_coordinator_that_fails(storage: Storage) -> Any:
    class Failing(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            raise KeyError("no plan today")

    failed = failures(lambda: storage.save({"n": 1}, "x", planner=Failing()))
    storage.save({"n": 2}, "x")
    return [failed, storage.everything("x")]


def a_rank_that_asks_for_more(storage: Storage) -> Any:
    storage.save({"n": 1})
    wanted = {"n": 0} | ({"m": 0} if dist.get_rank() == 1 else {})
    return failures(lambda: storage.load(wanted))


def a_rank_with_nothing(storage: Storage) -> Any:
    has_any = dist.get_rank() == 1
    storage.save({"t": numbers(3), "n": 1} if has_any else {})
    return [storage.load({"t": torch.zeros(3)} if not has_any else {}), storage.everything()]


def read_by_each_alone(storage: Storage) -> Any:
    """A sharded tensor, whole."""
    storage.save({"w": sharded(dist.get_world_size(), placements=[Shard(1)], shape=(7, 5)), "n": 1})
    return storage.load({"w": torch.zeros(7, 5), "n": None}, no_dist=True)


def another_coordinator(storage: Storage) -> Any:
    options = {"coordinator_rank": 1}
    state = {"w": sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5)), "n": 1}
    dcp.save_state_dict(state, storage.writer(), **options)
    loaded = {"w": torch.zeros(7, 5), "n": None}
    dcp.load_state_dict(loaded, storage.reader(), **options)
    return loaded


def nothing_flattened(storage: Storage) -> Any:
    plain = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    state = {"w": sharded(dist.get_world_size(), placements=[Shard(0)], shape=(7, 5)), "n": {"deep": [1, 2]}}
    storage.save(state, planner=DefaultSavePlanner(**plain))
    loaded = storage.load({"w": blank(state["w"]), "n": None}, planner=DefaultLoadPlanner(**plain))
    return [local(loaded["w"]), loaded["n"]]


def cast_on_the_way(storage: Storage) -> Any:
    """Announced or not; of the smaller tensor the last rank has all, in a mesh that begins with it."""
    world = dist.get_world_size()
    backwards = DeviceMesh("cpu", list(reversed(range(world))))
    state = {"w": sharded(world, placements=[Shard(0)], shape=(7, 5)), "n": 1}
    state["small"] = distribute_tensor(numbers(1), backwards, [Shard(0)])
    loaded = []
    for name, planner in (("announced", HalvingSave()), ("quiet", QuietlyHalvingSave())):
        storage.save(state, name, planner=planner)
        loaded.append(storage.load({"w": torch.zeros(7, 5), "small": torch.zeros(1), "n": None}, name))
    return loaded


def on_a_sub_mesh(storage: Storage) -> Any:
    """The other ranks have the tensor, and no part of it."""
    mesh = DeviceMesh("cpu", [0, 1])
    state = {"w": distribute_tensor(numbers(7, 5), mesh, [Shard(0)]), "n": 1}
    storage.save(state)
    loaded = storage.load({"w": blank(state["w"]), "n": None})
    return [local(loaded["w"]), storage.load({"w": torch.zeros(7, 5)})]


def one_replica_saves(storage: Storage) -> Any:
    """HSDP as torch's documentation asks for it: the first replica's ranks, in their own group."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = fsdp_trained(0, mesh)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if mesh.get_local_rank("replicate") == 0:
        storage.save(state, process_group=mesh["shard"].get_group())
    dist.barrier()
    return load_into_another(storage, *fsdp_trained(1, mesh))


def tensor_parallel(storage: Storage) -> Any:
    """With FSDP2 above it where there are ranks enough."""
    model, optimizer = parallel_trained(0)
    storage.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    return load_into_another(storage, *parallel_trained(1))


def load_into_another(
    storage: Storage, model: nn.Module, optimizer: torch.optim.Optimizer, name: str = "a"
) -> list[Any]:
    state = storage.load(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), name)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    moments = [local(one[key]) for one in optimizer.state.values() for key in sorted(one)]
    return [[local(p.detach()) for p in model.parameters()], moments, storage.everything(name)]


def parallel_trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Columns and rows over pairs of ranks, FSDP2 over the pairs; one axis alone where the ranks are no pairs."""
    torch.manual_seed(seed)
    world = dist.get_world_size()
    wide = 2 if world % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (world // wide, wide), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    if wide > 1:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if world > wide:
        fully_shard(model, mesh=mesh["dp"])
    return model, with_moments(model)


def with_moments(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(numbers(4, 6)).square().mean().backward()
    optimizer.step()
    return optimizer


def pass_on(storage: Storage, before: str | None, after: str | None) -> Any:
    """One world of several that save for each other: what it found there, whole and in this rank's parts."""
    model, optimizer = parallel_trained(seed=0 if before is None else 1)
    if before is not None:
        moments = load_into_another(storage, model, optimizer, before)[:2]
    if after is not None:
        storage.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), after)
    return [storage.everything(before or after or ""), moments if before else None]


def load_from_a_run(root: str, runs: bool) -> Any:
    """What a sharded run has saved, loaded by dcp into another model of the same layout; both, in this rank's parts."""
    model, optimizer = parallel_trained(0)
    if runs:
        with dt.Run(f"{root}/run", model=model, optimizer=optimizer, policy=dt.CheckpointPolicy(at_end=False)) as run:
            for _ in run.epochs(1):
                run.step()
                run.save(wait=True)
    other, fresh = parallel_trained(1)
    state = dict(zip(("model", "optimizer"), get_state_dict(other, fresh), strict=True))
    dcp.load(state, storage_reader=dt.StorageReader(f"{root}/run/latest"))
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    pairs = [(model, optimizer), (other, fresh)]
    return [
        [local(p.detach()).tolist() for p in one.parameters()]
        + [local(values[key]).tolist() for values in two.state.values() for key in sorted(values)]
        for one, two in pairs
    ]


CASES = [
    replicas,
    balanced,
    own_keys,
    resharding,
    fsdp,
    tensor_parallel,
    one_replica_saves,
    on_a_sub_mesh,
    nothing_flattened,
    cast_on_the_way,
    sharded_tensors,
    in_groups,
    another_coordinator,
    alone_in_a_world,
    read_by_each_alone,
    without_collectives,
    a_rank_with_nothing,
    a_rank_that_fails,
    a_coordinator_that_fails,
    a_rank_that_asks_for_more,
]
