"""Every layout of a model to every other: what is saved in one is loaded in the other, bit for bit, and the table.

    python -m tests.support.layout_matrix docs/layouts.md       tries all pairs and writes the page

A stand is a layout on a number of ranks. Each saves a run of its own through `Run`: a model and AdamW's state whose
values are known beforehand, whatever the layout, and two updates. Each then resumes from the runs of all stands, and
every rank compares what lies on it with what torch's own splitting says belongs there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import dist_train as dt
from dist_train.options import RunOptions
from dist_train.run import Run
from tests.support.forked import run_ranks

UPDATES = 2
COUNT = 7.0
"""AdamW's own counter."""
DEADLINE_SECONDS = 900.0
_MOST_LOADS = 12


class Specimen(nn.Module):
    """Rows that divide by no number of ranks, parameters with fewer elements than ranks, a tied one, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.up = nn.Linear(6, 11)
        self.down = nn.Linear(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.zeros(1))
        self.kernel = nn.Parameter(torch.zeros(5, 3, 4))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.low = nn.Parameter(torch.zeros(9, 2, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))


# Layouts: each takes a model that every rank holds whole and spreads it.


def ddp(model: Specimen, world_size: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model) if world_size > 1 else model


def fsdp(model: Specimen, world_size: int) -> nn.Module:
    fully_shard(model.up, mesh=_world_mesh(world_size))
    return fully_shard(model, mesh=_world_mesh(world_size), ignored_params={model.temperature})


def hsdp(model: Specimen, world_size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={model.temperature})


def tensor_parallel(model: Specimen, world_size: int) -> nn.Module:
    return _tensor_parallel(model, _world_mesh(world_size))


def copies_of_tensor_parallel(model: Specimen, world_size: int) -> nn.Module:
    """Each tensor knows the mesh of its own copy alone."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    return _tensor_parallel(model, mesh["tp"])


def fsdp_and_tensor_parallel(model: Specimen, world_size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(model, mesh["tp"])
    return fully_shard(model, mesh=mesh["dp"], ignored_params={model.temperature})


def hsdp_and_tensor_parallel(model: Specimen, world_size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2, world_size // 4), mesh_dim_names=("replicate", "shard", "tp"))
    _tensor_parallel(model, mesh["tp"])
    return fully_shard(model, mesh=mesh["replicate", "shard"], ignored_params={model.temperature})


def strided(model: Specimen, world_size: int) -> nn.Module:
    """A rank's part of a matrix is several pieces that are not adjacent, in both dimensions where there is room."""
    if world_size % 4 == 0:
        mesh = init_device_mesh("cpu", (2, world_size // 2))
        return _spread(model, lambda _, value: _by_hand(value, mesh, [_stride(0, 3), _stride(-1, 2)]))
    mesh = _world_mesh(world_size)
    return _spread(model, lambda _, value: _by_hand(value, mesh, [_stride(0, 2)]))


def mixture(model: Specimen, world_size: int) -> nn.Module:
    """Columns of some, rows of others, and plain ones."""
    mesh = _world_mesh(world_size)

    def place(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.dim() < 2:
            return value
        return _by_hand(value, mesh, [Shard(0 if name.startswith("kernel") else value.dim() - 1)])

    return _spread(model, place)


def idle_ranks(model: Specimen, world_size: int) -> nn.Module:
    """The matrices lie on a mesh without the last rank."""
    mesh = DeviceMesh("cpu", list(range(world_size - 1)))
    return _spread(model, lambda _, value: _by_hand(value, mesh, [Shard(0)]) if value.dim() > 1 else value)


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    spread: Callable[[Specimen, int], nn.Module]
    world_sizes: tuple[int, ...]


LAYOUTS = [
    Layout("whole (DDP)", ddp, (1, 2, 3, 4, 8)),
    Layout("FSDP2", fsdp, (1, 2, 3, 4, 8)),
    Layout("HSDP", hsdp, (2, 4, 8)),
    Layout("TP", tensor_parallel, (2, 3, 4, 8)),
    Layout("copies of TP", copies_of_tensor_parallel, (4, 8)),
    Layout("FSDP2 + TP", fsdp_and_tensor_parallel, (4, 8)),
    Layout("HSDP + TP", hsdp_and_tensor_parallel, (8,)),
    Layout("strided by hand", strided, (2, 3, 4, 8)),
    Layout("sharded and plain", mixture, (1, 2, 3, 4, 8)),
    Layout("a rank without", idle_ranks, (2, 3, 4)),
]


@dataclass(frozen=True, slots=True, order=True)
class Stand:
    """A layout on so many ranks."""

    world_size: int
    layout: str

    @property
    def id(self) -> str:
        return f"{self.layout.replace(' ', '-')}-on-{self.world_size}"


STANDS = sorted(Stand(world_size, layout.name) for layout in LAYOUTS for world_size in layout.world_sizes)


def _world_mesh(world_size: int) -> DeviceMesh:
    if not dist.is_initialized():  # a mesh of one rank wants a group, too
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (world_size,))


def _tensor_parallel(model: Specimen, mesh: DeviceMesh) -> nn.Module:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.temperature = nn.Parameter(distribute_tensor(model.temperature.detach(), mesh, [Replicate()]))
    return model


def _spread(model: Specimen, place: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module is not model.head:
                module._parameters[name] = nn.Parameter(place(prefix or name, parameter.detach()))
    model.head.weight = model.embed.weight
    return model


def _stride(dim: int, strips: int) -> Placement:
    return _StridedShard(dim, split_factor=strips)


def _by_hand(value: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    if value.dim() == 0:
        placements = [Replicate() for _ in placements]
    fixed = [
        _stride(one.dim % value.dim(), one.split_factor) if isinstance(one, _StridedShard) else one
        for one in placements
    ]
    local = as_torch_splits(value, mesh, fixed)
    return DTensor.from_local(local, mesh, fixed, run_check=False, shape=value.shape, stride=value.stride())


def as_torch_splits(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    """What belongs on this rank: torch's own splitting, one dimension of the mesh after the other."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return whole.new_empty(0)
    for index, (count, place) in enumerate(zip(mesh.shape, coordinate, strict=True)):
        if isinstance(placements[index], (Shard, _StridedShard)):
            pieces, _ = placements[index]._split_tensor(whole, count, with_padding=False, contiguous=True)  # type: ignore[attr-defined]
            whole = pieces[place]
    return whole


# What is in it


def value_of(name: str, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a name, the same wherever it is asked for; all bits of it mean something."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if not like.dtype.is_floating_point:
        return torch.randint(-(2**60), 2**60, like.shape, generator=generator, dtype=like.dtype)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


@dataclass(slots=True)
class Standing:
    """A stand's live objects."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that is saved but the counters, under names that no layout changes."""
        inner = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        yield from inner.named_buffers()
        for name, parameter in inner.named_parameters():
            yield name, parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key != "step":
                    yield f"{name}/{key}", value

    def counts(self) -> list[float]:
        """AdamW's, one a parameter."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.model.parameters()]
        return [float(state.get("step", -1)) if len(state) == 3 else -1 for state in states]


def build(stand: Stand, *, empty: bool) -> Standing:
    """In its layout, with AdamW's state as its first step makes it; every value as it is to be, or wiped out."""
    layout = next(one for one in LAYOUTS if one.name == stand.layout)
    model = layout.spread(Specimen(), stand.world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(COUNT), **moments}
    standing = Standing(model, optimizer)
    with torch.no_grad():
        for name, tensor in standing.tensors():
            _local(tensor).copy_(torch.zeros_like(_local(tensor)) if empty else _expected(name, tensor))
    if empty:
        optimizer.state.clear()
    return standing


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _expected(name: str, tensor: torch.Tensor) -> torch.Tensor:
    whole = value_of(name, tensor)
    return as_torch_splits(whole, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else whole


def differences(standing: Standing, *, counters: bool = True) -> list[str]:
    """Names of what is not, bit for bit, what belongs here."""
    wrong = [name for name, tensor in standing.tensors() if not same_bits(_local(tensor), _expected(name, tensor))]
    return wrong + [f"a step of {count}" for count in standing.counts() if counters and count != COUNT]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    flat = [torch.empty(one.numel(), dtype=one.dtype).copy_(tensor.reshape(-1)) for tensor in (one, other)]
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))


# On the ranks


def open_run(run_dir: Path, standing: Standing, resume: str) -> Run:
    policy = dt.CheckpointPolicy(at_end=False)
    options = RunOptions(own_gradients=True, hang_timeout="off")
    return Run(
        str(run_dir),
        model=standing.model,
        optimizer=standing.optimizer,
        policy=policy,
        resume=resume,
        options=options,
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Another world size is a warning, and nothing new here."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def save_all(stands: Sequence[Stand], folder: Path) -> None:
    """On every rank of one world: each stand's run with one checkpoint."""
    with quietly():
        for stand in stands:
            standing = build(stand, empty=False)
            with open_run(folder / stand.id, standing, "never") as run:
                for _ in run.epochs(1):
                    for _ in range(UPDATES):
                        run.step()
                    run.save(wait=True)


def load_all(stands: Sequence[Stand], sources: Sequence[Stand], folder: Path) -> dict[tuple[str, str], list[str]]:
    """On every rank of one world: what differs here after each stand has resumed from each source."""
    found: dict[tuple[str, str], list[str]] = {}
    with quietly():
        for stand in stands:
            for source in sources:
                standing = build(stand, empty=True)
                with open_run(folder / source.id, standing, "must") as run:
                    for _ in run.epochs(0):
                        pass
                    told = differences(standing)
                    told += [f"{run.global_step} updates"] if run.global_step != UPDATES else []
                found[source.id, stand.id] = told
    return found


def try_pairs(
    pairs: Sequence[tuple[Stand, Stand]], folder: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[tuple[str, str], list[str]]:
    """What differs, and where, after each pair (source, target); one set of ranks a world size saves, one loads."""
    for world_size in sorted({source.world_size for source, _ in pairs}):
        mine = sorted({source for source, _ in pairs if source.world_size == world_size})
        run_ranks(save_all, world_size, mine, folder, deadline_seconds=DEADLINE_SECONDS)
    found: dict[tuple[str, str], list[str]] = {}
    for world_size in sorted({target.world_size for _, target in pairs}):
        for sources, targets in _blocks([pair for pair in pairs if pair[1].world_size == world_size]):
            ranks = run_ranks(load_all, world_size, targets, sources, folder, deadline_seconds=DEADLINE_SECONDS)
            for rank, told in enumerate(ranks):
                for pair, wrong in told.items():
                    found.setdefault(pair, []).extend(f"rank {rank}: {text}" for text in wrong)
            tell(f"{len(found)} of {len(pairs)} pairs tried")
    return found


def _blocks(pairs: Sequence[tuple[Stand, Stand]]) -> Iterator[tuple[list[Stand], list[Stand]]]:
    """Pairs as (sources, targets) to be loaded in one go: few, as gloo keeps the threads of every mesh and run of a
    process, and hundreds of them keep all cores busy.
    """
    by_sources: dict[tuple[Stand, ...], list[Stand]] = {}
    for target in sorted({target for _, target in pairs}):
        by_sources.setdefault(tuple(source for source, other in pairs if other == target), []).append(target)
    for sources, targets in by_sources.items():
        for target in targets:
            yield from ((list(part), [target]) for part in _batched(sources, _MOST_LOADS))


def _batched(items: Sequence[Stand], count: int) -> Iterator[Sequence[Stand]]:
    return (items[start : start + count] for start in range(0, len(items), count))


def all_pairs() -> list[tuple[Stand, Stand]]:
    return [(source, target) for source in STANDS for target in STANDS]


INTRODUCTION = """\
# Any layout to any other

You may change the sharding, the mesh or the number of ranks between one start of a run and the next. Nothing is
converted, and no option says so: build the model in its new layout and run the same command. The ranks share the files
among them to verify them; then each reads its own part, and no rank holds more than that. Samples, updates and learning
rates go on as if nothing had changed. Random numbers that are drawn in training (dropout) do not, if the number of
ranks is another one: a warning says so.

The table shows what came of every pair of layouts, on gloo. *25 of 25* means: saved with each of five numbers of ranks,
loaded with each of five, and every time all weights, all buffers and all of AdamW's state were on every rank, bit for
bit, what belongs there, and the counters of optimizer and run were right. What belongs there is not asked of
dist_train: the values are known beforehand, and torch's own splitting says which of them a rank holds.

| layout | what it is |
|---|---|
| whole (DDP) | every rank holds all of it: `DistributedDataParallel`, and one process alone |
| FSDP2 | `fully_shard` on one mesh dimension: rows over all ranks, one parameter left out of it |
| HSDP | `fully_shard` on two mesh dimensions: two copies, each sharded |
| TP | `parallelize_module` by columns and by rows, over all ranks |
| copies of TP | tensor parallel inside of each half of the ranks; each tensor knows the mesh of its own half only |
| FSDP2 + TP | both, on two mesh dimensions: torch makes strided shards (`_StridedShard`) of it |
| HSDP + TP | all three, on three mesh dimensions |
| strided by hand | a rank's part of a tensor is several pieces that are not adjacent, in one dimension or in two |
| sharded and plain | some parameters by rows, some by columns, the others plain tensors on every rank |
| a rank without | the matrices lie on a mesh that leaves the last rank out |

The model has rows that divide by no number of ranks, parameters with fewer elements than ranks, a tied parameter, a
scalar and two dtypes.""".splitlines()
AFTER_TABLE = """\
`python -m tests.support.layout_matrix docs/layouts.md` tries every pair and writes this page; it takes six minutes on
two cores. `scripts/check.sh --all` tries every pair, too, and `scripts/check.sh` one pair for each layout. Layouts that
torch allows and no framework makes (ranks of a mesh in another order, one dimension cut twice, parts in odd memory, all
dtypes) are tried by `tests/distributed/test_odd_layouts.py`.

## What is refused

Each with a message that names the tensor, on every rank, before the first update (state that an optimizer makes in its
first step: at the first save):

- `Partial` placements: the values are sums of what several ranks hold, and lie on none of them. Reduce them first.
- Parts that are not what their placements say: padded ones, or a DTensor whose shape differs from rank to rank.
- Ranks that do not lay a tensor out alike: sharded on some and plain on others, or a mesh with its ranks in another
  order on some.
- Tensors that only some ranks have (the stages of a pipeline). `dcp.save` with `dt.StorageWriter` takes them.
- On load: plain tensors that an optimizer keeps of each rank's own part (blocks of 8 bits), where the layout has
  changed. Nothing tells how to cut them anew; in the same layout they come back.""".splitlines()


def page(found: Mapping[tuple[str, str], list[str]]) -> str:
    """docs/layouts.md, from what each pair's ranks have told."""
    head = [f"{layout.name} on {', '.join(map(str, layout.world_sizes))}" for layout in LAYOUTS]
    lines = [*INTRODUCTION, "", f"| saved as, down; loaded as, across | {' | '.join(head)} |"]
    lines.append("|---" * (len(LAYOUTS) + 1) + "|")
    for source, name in zip(LAYOUTS, head, strict=True):
        cells = []
        for target in LAYOUTS:
            told = [
                found.get((Stand(one, source.name).id, Stand(other, target.name).id))
                for one in source.world_sizes
                for other in target.world_sizes
            ]
            cells.append(f"{sum(one == [] for one in told)} of {len(told)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *AFTER_TABLE]) + "\n"


def main() -> int:
    """All pairs; those that fail are told, and there is no page then."""
    folder = Path(tempfile.mkdtemp(prefix="layouts-"))
    try:
        found = try_pairs(all_pairs(), folder, print)
    finally:
        shutil.rmtree(folder)
    failed = {pair: wrong for pair, wrong in found.items() if wrong}
    for (source, target), wrong in failed.items():
        print(f"{source} -> {target} FAILED: {'; '.join(wrong[:5])}")
    if failed or len(found) < len(all_pairs()):
        return 1
    Path(sys.argv[1]).write_text(page(found))
    print(f"{len(found)} pairs of {len(STANDS)} stands, all equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
