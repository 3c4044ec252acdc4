"""What it costs to find out who writes and who reads what: many small sharded tensors, on 4 gloo ranks.

Each is a matrix of a few rows, cut into rows over all ranks, some unevenly. Nothing here depends on the tensors' sizes.
Times are medians over the rounds, of the slowest rank: wall-clock seconds, and CPU seconds of that rank beside them,
which a busy machine does not change much.

    python -m benchmarks.planning_cost [--tensors 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dist_train as dt
from dist_train.capture import Capture
from dist_train.checkpoint.joint_plan import plan_together
from dist_train.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, Manifest, step_name
from dist_train.checkpoint.plan import make_plan, signature_of
from dist_train.checkpoint.reader import CheckpointReader
from dist_train.checkpoint.store import Store
from dist_train.checkpoint.survey import take_survey
from dist_train.options import RunOptions
from dist_train.run import Run
from dist_train.world import current_world
from tests.support.forked import run_ranks

RANKS = 4
Times = dict[str, list[tuple[float, float]]]


class Many(nn.Module):
    """Matrices of 7 to 11 rows of 3."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (RANKS,))
        for index in range(tensors):
            rows = 7 + index % 5
            local = torch.full((rows, 3), float(index)).chunk(RANKS)
            mine = local[dist.get_rank()] if dist.get_rank() < len(local) else torch.empty(0, 3)
            shape = torch.Size((rows, 3))
            whole = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=shape, stride=(3, 1))
            self.register_parameter(f"p{index}", nn.Parameter(whole))


def measure(folder: Path, tensors: int, rounds: int) -> Times:
    """On each rank."""
    logging.disable(logging.WARNING)
    model = Many(tensors)
    times: Times = {}

    def note(what: str, work: Callable[[], Any]) -> Any:
        dist.barrier()
        started, used = time.perf_counter(), time.process_time()
        result = work()
        times.setdefault(what, []).append((time.perf_counter() - started, time.process_time() - used))
        return result

    capture = Capture(tensors={f"model/{name}": one.detach() for name, one in model.named_parameters()})
    world = current_world()
    for _ in range(rounds):
        survey = note("save: what ranks tell each other", lambda: take_survey(capture, world))
        note("save: the plan of a rank", partial(make_plan, capture, world.rank, world.world_size, survey))
        note("save: all plans, seen to fit together", partial(plan_together, capture, world))
        note("save: is the kept plan still right", lambda: signature_of(capture))
    with contextlib.redirect_stdout(io.StringIO()):
        _save_and_load(folder, model, rounds, note)
    state = {name: one.detach() for name, one in model.named_parameters()}
    for index in range(rounds):
        note("torch's dcp.save, all of it", partial(dcp.save, state, checkpoint_id=folder / f"dcp-{index}"))
    return times


def _save_and_load(folder: Path, model: nn.Module, rounds: int, note: Callable[[str, Callable[[], Any]], Any]) -> None:
    options = RunOptions(own_gradients=True, hang_timeout="off")
    policy = dt.CheckpointPolicy(at_end=False, keep_last=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(rounds):
        run_dir = folder / f"run-{index}"
        with Run(str(run_dir), model=model, optimizer=optimizer, policy=policy, options=options) as run:
            for _ in run.epochs(1):
                run.step()
                note("first save of a run, all of it", partial(run.save, wait=True))
                run.step()
                note("every other save, all of it", partial(run.save, wait=True))
        store, path = Store(run_dir), f"{CHECKPOINTS}/{step_name(2)}"
        manifest = note("load: manifest", partial(_read_manifest, store, path))
        reader = note("load: headers of all files", partial(CheckpointReader, store, path, manifest))
        note("load: the tensors", partial(_fill, reader, model))
        reader.close()


def _read_manifest(store: Store, path: str) -> Manifest:
    return Manifest.from_json(store.read(f"{path}/{MANIFEST_NAME}"))


def _fill(reader: CheckpointReader, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        reader.fill(f"model/{name}", parameter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, RANKS, Path(folder), args.tensors, args.rounds, deadline_seconds=600)
    print(f"{args.tensors} sharded tensors on {RANKS} ranks: seconds, and CPU seconds of a rank\n")
    for what in ranks[0]:
        medians = [[statistics.median(column) for column in zip(*told[what], strict=True)] for told in ranks]
        wall, cpu = (max(column) for column in zip(*medians, strict=True))
        print(f"  {what:36} {wall:8.3f} {cpu:8.3f}")


if __name__ == "__main__":
    main()
