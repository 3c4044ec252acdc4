"""What each rank of a real world sees, written to a file a rank: for tests that compare the ranks' answers.

ranks.py collectives|replicas|own-buffers|lost-peer|silent-peer OUT
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from dist_train.errors import DeadlineError, DisagreementError
from dist_train.replicas import evaluating, fix_bucket_layout
from dist_train.rng import capture_rng
from dist_train.run import Run
from dist_train.world import TorchWorld, World, current_world, init_distributed
from tests.support.small_run import SmallRun, small_model, squared_error

FLOATS = [math.nan, math.inf, -math.inf, -0.0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308]
SAME, OTHER = "0123456789abcdef" * 2, "0123456789abcdee" * 2


def tensors(rank: int) -> dict[str, torch.Tensor]:
    """Of another value on each rank; the main rank's is what all must have in the end."""
    base = torch.arange(12.0).reshape(3, 4) + 100 * rank
    return {
        "float32": base.clone(),
        "odd": torch.tensor([math.nan, -0.0, math.inf]) if rank == 0 else torch.zeros(3),
        "bf16": base.to(torch.bfloat16),
        "fp8": (torch.arange(6.0) * (rank + 1)).to(torch.float8_e4m3fn),
        "bool": base % (rank + 2) == 0,
        "int64": (base * 2**40).to(torch.int64),
        "complex": torch.complex(base, -base),
        "transposed": base.clone().t(),
        "strided": base.repeat(2, 1)[::2],
        "channels_last": base.clone().reshape(1, 3, 2, 2).to(memory_format=torch.channels_last),
        "0-d": torch.tensor(7.0 + rank),
        "0-d-int": torch.tensor(7 + rank),
        "empty": torch.empty(0),
        "empty-bf16": torch.empty(0, 3, dtype=torch.bfloat16),
        "empty-bool": torch.empty(2, 0, dtype=torch.bool),
    }


def bits(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return f"{list(tensor.shape)} {tensor.dtype} {bytes(flat.view(torch.uint8).tolist()).hex() if len(flat) else ''}"


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (DeadlineError, DisagreementError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def collectives() -> dict[str, Any]:
    init_distributed()
    group = dist.group.WORLD
    init_distributed()
    world = current_world()
    seen: dict[str, Any] = {
        "same_group": dist.group.WORLD is group,
        "kind": type(world).__name__,
        "believes": Accelerator().num_processes,
        "rank": [world.rank, world.local_rank, world.world_size, world.is_main],
        "max": world.max([world.rank, -world.rank, 2**62 + world.rank], "a"),
        "sum": world.sum([world.rank + 1, -(2**40)], "a"),
        "broadcast": world.broadcast({"of": world.rank, "text": "ü" * (1 + 50 * world.rank), "list": []}, "a"),
        "broadcast_none": world.broadcast(None if world.is_main else "something longer", "a"),
        "gather": world.gather({"of": world.rank, "pad": "x" * 100 * world.rank}, "a"),
        "floats": [[value.hex() for value in row] for row in world.gather_floats(FLOATS[world.rank :])],
    }
    mine = tensors(world.rank)
    strides = {name: value.stride() for name, value in mine.items()}
    for value in mine.values():
        world.broadcast_tensor(value)
    seen["tensors"] = {name: bits(value) for name, value in mine.items()}
    seen["strides_kept"] = strides == {name: value.stride() for name, value in mine.items()}
    seen["equal"] = message_of(lambda: world.require_equal(SAME, "manifest"))
    seen["different"] = message_of(lambda: world.require_equal(OTHER if world.rank == 1 else SAME, "manifest"))
    return {**seen, **mail(world)}


def mail(world: World) -> dict[str, Any]:
    """Each rank's thread sends to the main rank's while the main threads exchange vectors."""
    received: list[str] = []

    def exchange() -> None:
        box = world.open_mailbox()
        box.put(f"letter/{world.rank}", f"from {world.rank}".encode())
        for rank in range(world.world_size) if world.is_main else ():
            received.append(box.take(f"letter/{rank}", 60.0).decode())

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    sums = [world.sum([1], "a")[0] for _ in range(20)]
    thread.join(timeout=60.0)
    box = world.open_mailbox()
    world.max([0], "that all letters were taken")
    left = [box._store.check([f"{box._prefix}/letter/{rank}"]) for rank in range(world.world_size)]  # type: ignore[attr-defined]
    late = message_of(lambda: box.take(f"never/{world.rank}", 0.05))
    second = current_world()  # as a second Run in this process: its letters are its own
    box.put(f"old/{world.rank}", b"of the first world")
    stale = message_of(lambda: second.open_mailbox().take(f"old/{world.rank}", 0.05))
    return {"received": received, "sums": sums, "left": left, "late": late, "stale": stale}


def replicas() -> dict[str, Any]:
    init_distributed()
    world = current_world()
    model = small_model()
    model[0].bias.requires_grad_(False)
    ddp = DistributedDataParallel(model)
    before = {name: bits(value) for name, value in model.state_dict().items()}
    rng = capture_rng()
    fix_bucket_layout(ddp)
    seen: dict[str, Any] = {
        "unchanged": before == {name: bits(value) for name, value in model.state_dict().items()},
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "rng": capture_rng() == rng,
        "rebuilt_again": ddp.reducer._rebuild_buckets(),
    }
    fix_bucket_layout(ddp)
    squared_error(ddp, batch_of(world.rank)).backward()
    seen["gradients"] = [bits(p.grad) for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(world.rank + 1)
    with evaluating(ddp, world) as inner:
        seen["evaluated_with"] = [float(buffer.max()) for buffer in inner.buffers()]
        ddp(batch_of(world.rank)[0])  # turns DDP's next exchange of buffers off, which must not last
    for buffer in model.buffers():
        buffer.detach().fill_(world.rank + 1)
    squared_error(ddp, batch_of(world.rank)).backward()  # its forward takes over the main rank's buffers
    seen["after"] = [float(buffer.float().sum()) for buffer in model.buffers()]
    own = small_model()
    keeper = DistributedDataParallel(own, broadcast_buffers=False)
    for buffer in own.buffers():
        buffer.detach().fill_(world.rank + 1)
    with evaluating(keeper, world) as inner:
        seen["own_evaluated_with"] = [float(buffer.max()) for buffer in inner.buffers()]
    seen["own_after"] = [float(buffer.max()) for buffer in own.buffers()]
    return seen


def batch_of(rank: int) -> Any:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    return inputs, inputs.sum(1), None


def own_buffers(folder: Path) -> dict[str, Any]:
    """DDP without broadcast buffers: an uninterrupted run, and one that is left and resumed with new objects."""
    init_distributed()

    def loop(name: str, **options: Any) -> SmallRun:
        accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
        return SmallRun(run_dir=folder / name, epochs=2, accelerator=accelerator, **options)

    def buffers(one: SmallRun) -> list[str]:
        return [bits(buffer) for buffer in one.prepared.module.buffers()]

    twin = loop("twin")
    twin.train()
    first = loop("run", max_steps=7)
    first.train()
    resumed: list[list[str]] = []
    second = loop("run", at_epoch=lambda run: resumed.append(buffers(second)))
    second.train()
    return {"twin": buffers(twin), "left": buffers(first), "resumed": resumed[0], "end": buffers(second)}


def lost_peer(out: Path, rank_lives: Callable[[], None]) -> dict[str, Any]:
    """Rank 1 leaves after the world was made; the others ask it something."""
    init_distributed()
    world = TorchWorld(timeout_seconds=3.0)
    world.max([1], "that all are here")
    if world.rank == 1:
        rank_lives()
        os._exit(0)
    started = time.monotonic()
    message = message_of(lambda: world.max([1], "whether to save or stop"))
    return {"message": message, "waited": time.monotonic() - started}


def wait_for_peer(out: Path) -> None:
    """Alive, and silent until the others have given up."""
    end = time.monotonic() + 60
    while not (out / "rank-0.json").exists() and time.monotonic() < end:
        time.sleep(0.02)


def main() -> None:
    warnings.simplefilter("ignore")
    check, out = sys.argv[1], Path(sys.argv[2])
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "collectives": collectives,
        "replicas": replicas,
        "own-buffers": lambda: own_buffers(out),
        "lost-peer": lambda: lost_peer(out, lambda: None),
        "silent-peer": lambda: lost_peer(out, lambda: wait_for_peer(out)),
    }
    seen = checks[check]()
    path = out / f"rank-{os.environ['RANK']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(seen))
    path.with_suffix(".tmp").rename(path)
    if "peer" in check:
        os._exit(0)  # the group is broken, and cannot be closed


if __name__ == "__main__":
    assert Run  # the package is whole before ranks begin to wait for each other
    main()
