"""A world of ranks within a second: forked from a server that has imported torch, where torchrun imports it anew.

    results = run_ranks(function, 4, argument, deadline_seconds=60)
    run_script(2, "path/of/script.py", "--epochs", "2", deadline_seconds=60)

`function` is a module's (it is sent by name) and runs on every rank with a gloo process group and torchrun's variables
set; its results come back in rank order. A script runs as `torchrun script` would run it, to its end. Kills and
restarts are for `launch.torchrun`: this has no agent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT

_server = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first fully_shard imports, in each process anew.
_server.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "accelerate", "dist_train.trainer"])


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline_seconds: float = 60
) -> list[Any]:
    """Every rank's result (picklable); an error of a rank is raised here, with its traceback, and ends the others."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes = [_server.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _server.Process(target=_be_rank, args=(function, rank, world_size, folder, pipes[rank][1], arguments))
            for rank in range(world_size)
        ]
        try:
            for rank, (_, sender) in zip(ranks, pipes, strict=True):
                rank.start()
                sender.close()
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + deadline_seconds)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.join(0.2)
                    rank.kill()
                    rank.join()


def run_script(
    world_size: int, script: str, *arguments: str, deadline_seconds: float, extra: Mapping[str, str] | None = None
) -> None:
    """Fails with the traceback of a rank that raises or exits with anything but 0."""
    run_ranks(_be_script, world_size, script, arguments, dict(extra or {}), deadline_seconds=deadline_seconds)


def _be_script(script: str, arguments: tuple[str, ...], extra: dict[str, str]) -> None:
    os.environ.update(extra)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{script} ended with {end.code}") from None


def _collect(receivers: list[Connection], end: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        open_ones = {id(one): index for index, one in enumerate(receivers) if index not in results}
        ready = wait([receivers[index] for index in open_ones.values()], timeout=max(0.0, end - time.monotonic()))
        assert ready, f"ranks {sorted(open_ones.values())} did not answer before the deadline"
        for receiver in ready:
            rank = open_ones[id(receiver)]
            try:
                kind, value = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without an answer") from None
            assert kind == "result", f"rank {rank} of {len(receivers)}:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _be_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, answer: Connection, arguments: tuple[Any]
) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in numbers.items()})
    os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"})
    os.environ.update({"MASTER_PORT": "1"})  # for Accelerate, which wants one; the rendezvous is by file
    if world_size > 1:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    else:
        for name in (*numbers, "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    try:
        answer.send(("result", function(*arguments)))
    except BaseException:
        with contextlib.suppress(OSError):
            answer.send(("error", traceback.format_exc()))
    finally:
        answer.close()
        os._exit(0)  # the process group of a failed rank cannot be closed
