"""`dist-train launch`: the same command on every node, and the run goes on whatever happens to its processes.

    options -> fork server (imports meanwhile) -> rendezvous -> agent -> summary

Invariant: what a worker prints appears as it is; what the launcher says goes to stderr. When it returns no process of
it is left, and none of its files.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_train.cluster.folder import Folder, remove_shared_memory
from dist_train.cluster.gpus import find_gpus
from dist_train.cluster.grace import VARIABLE, Grace, find_grace
from dist_train.cluster.restart_policy import RestartPolicy
from dist_train.cluster.signals import TOLD_EARLY, Signals, StopAskedError
from dist_train.cluster.summary import Conclusion
from dist_train.cluster.worker import Program
from dist_train.cluster.workers import Workers
from dist_train.connections import watch_new_connections
from dist_train.errors import ConfigError

MAX_RESTARTS = 3
GIVE_UP_AFTER = 3
MONITOR_SECONDS = 0.1
RENDEZVOUS_DEFAULTS: dict[str, Any] = {
    "last_call_timeout": 3,
    "keep_alive_interval": 2,
    "keep_alive_max_attempt": 4,
    "read_timeout": 30,
}
"""Seconds; torch's are 30, 5 (three times) and 60. With the least number of nodes there, the others are waited for only
shortly: one that comes later is taken in by a restart, which is cheap here. A node that has died is dropped after 8 s.
"""
_START_VARIABLE = "DIST_TRAIN_SESSION_START"
"""`max_time` counts from it: over all restarts of the workers, and of the process that forks them."""
_OWN_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What `dist-train launch` is told; torchrun's names and meanings where it has them."""

    program: Program
    nnodes: str = "1"
    """`4`, or `2:4`: elastic."""
    nproc_per_node: str = "auto"
    """A number, `gpu`, `cpu`, or `auto`: one a GPU, one without a GPU."""
    rdzv_backend: str = "c10d"
    rdzv_endpoint: str = ""
    rdzv_id: str = "none"
    rdzv_conf: Mapping[str, str] = field(default_factory=dict)
    standalone: bool = False
    node_rank: int = 0
    """With the static backend only."""
    local_addr: str | None = None
    max_restarts: int = MAX_RESTARTS
    """Without a committed step in between; torchrun's counts over the whole launch."""
    give_up_after: int = GIVE_UP_AFTER
    """Attempts in a row that end at the same committed step."""
    monitor_interval: float = MONITOR_SECONDS
    """Seconds between looks at the other nodes; the workers of this one are watched without an interval."""
    start_method: str = "forkserver"
    """`spawn`: each worker is a fresh interpreter."""
    preload: Sequence[str] = ()
    grace: str | None = None
    """What workers that were asked to end may take; None goes by the platform's, else by the measured time of a save,
    at least 30 s."""

    @property
    def nodes(self) -> tuple[int, int]:
        """The least and the greatest number of nodes."""
        least, _, most = self.nnodes.partition(":")
        try:
            low, high = int(least), int(most or least)
        except ValueError:
            low = high = 0
        if not 1 <= low <= high:
            raise ConfigError(f"--nnodes is {self.nnodes!r}; give a number of nodes, 4, or a range, 2:4.")
        return low, high

    def count_workers(self) -> int:
        """On this node; CUDA is not touched."""
        gpus = len(find_gpus()) if self.nproc_per_node in ("auto", "gpu") else 0
        if self.nproc_per_node == "auto":
            return gpus or 1
        if self.nproc_per_node == "gpu" and not gpus:
            raise ConfigError("--nproc-per-node is gpu, and nvidia-smi shows none; leave it out, or give a number.")
        if self.nproc_per_node in ("gpu", "cpu"):
            return gpus or os.cpu_count() or 1
        if not self.nproc_per_node.isdecimal() or int(self.nproc_per_node) < 1:
            raise ConfigError(f"--nproc-per-node is {self.nproc_per_node!r}; give a number, gpu, cpu or auto.")
        return int(self.nproc_per_node)

    @property
    def is_alone(self) -> bool:
        """One node, and no endpoint to meet others at."""
        return self.standalone or (self.nodes[1] == 1 and not self.rdzv_endpoint)

    @property
    def address(self) -> str | None:
        """By which other nodes reach this one: what is told, else where the way to the endpoint leaves this machine.

        None leaves it to torch, which asks for the host's full name; many machines have none that others can resolve.
        """
        if self.local_addr or self.is_alone or not self.rdzv_endpoint:
            return self.local_addr
        host = self.rdzv_endpoint.rpartition(":")[0] or self.rdzv_endpoint
        try:
            family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(where)  # of a datagram socket: nothing is sent
                address = str(probe.getsockname()[0])
        except OSError:
            return None
        return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else address


def launch(options: LaunchOptions, say: Callable[[str], None]) -> Conclusion:
    """Runs the program on this node until its end; every node runs the same.

    Raises:
        ConfigError: options that cannot be; nothing was started.
    """
    count = options.count_workers()
    _require_possible(options)
    grace = find_grace(options.grace)
    environment = _environment(count)
    if grace.seconds is not None:
        environment[VARIABLE] = str(grace.seconds)
    folder = Folder()
    try:
        with Signals() as signals:
            workers = Workers(
                options.program,
                forks=options.start_method == "forkserver" and sys.platform == "linux",
                preload=options.preload,
                environment=environment,
                wake=signals.wake,
                say=say,
            )
            workers.open()
            try:
                return _launch(options, count, workers, signals, folder, grace, say)
            except StopAskedError:
                return Conclusion(exit_code=signals.exit_code, why=TOLD_EARLY)
            finally:
                workers.close()
                remove_shared_memory(workers.ended_pids)
    finally:
        folder.remove()


def _launch(
    options: LaunchOptions,
    count: int,
    workers: Workers,
    signals: Signals,
    folder: Folder,
    grace: Grace,
    say: Callable[[str], None],
) -> Conclusion:
    os.environ[_OWN_STORE_VARIABLE] = "1"  # the agent serves a store of its own for each attempt
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    from dist_train.cluster.agent import Agent

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # A call on a store whose host has vanished would wait for TCP to give up, 15 minutes, deaf to every signal.
    with signals.interrupting(), watch_new_connections():
        handler = _make_rendezvous(options)
    spec = WorkerSpec(
        role="default",
        local_world_size=count,
        entrypoint=options.program.name,
        rdzv_handler=handler,
        max_restarts=options.max_restarts,
        monitor_interval=options.monitor_interval,
        local_addr=options.address,
    )
    policy = RestartPolicy(options.max_restarts, give_up_after=options.give_up_after)
    agent = Agent(
        spec,
        workers,
        policy,
        signals,
        folder,
        most_nodes=1 if options.is_alone else options.nodes[1],
        grace=grace,
        say=say,
    )
    conclusion = agent.launch()
    agent.part()
    return conclusion


def _make_rendezvous(options: LaunchOptions) -> Any:
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    least, most = options.nodes
    endpoint, run_id = options.rdzv_endpoint, options.rdzv_id
    if options.is_alone:
        endpoint, run_id = "localhost:0", str(uuid.uuid4())
    configuration: dict[str, Any] = {**RENDEZVOUS_DEFAULTS, "timeout": 900, **options.rdzv_conf}
    if options.rdzv_backend == "static":
        configuration["rank"] = options.node_rank
    return get_rendezvous_handler(
        RendezvousParameters(
            "c10d" if options.is_alone else options.rdzv_backend,
            endpoint,
            run_id,
            1 if options.is_alone else least,
            1 if options.is_alone else most,
            options.address,
            **configuration,
        )
    )


def _require_possible(options: LaunchOptions) -> None:
    least, most = options.nodes
    if options.standalone and most > 1:
        raise ConfigError(f"--standalone is one node, and --nnodes is {options.nnodes}; leave one of them out.")
    if most > 1 and not options.rdzv_endpoint:
        raise ConfigError(
            f"--nnodes is {options.nnodes}, and the nodes do not know where to meet: give all of them the same "
            f"--rdzv-endpoint HOST:PORT, where HOST is one of them, for instance node0:29400."
        )
    if options.rdzv_backend == "static" and least != most:
        raise ConfigError(f"--nnodes {options.nnodes} is elastic, which the static rendezvous is not; leave it out.")
    if options.max_restarts < 0 or options.give_up_after < 1 or options.monitor_interval <= 0:
        raise ConfigError("--max-restarts must be 0 or more, --give-up-after 1 or more, --monitor-interval above 0.")
    program = options.program
    if not program.is_module and not os.path.exists(program.name):
        raise ConfigError(f"{program.name} is not there: give the path of a script, or -m and the name of a module.")


def _environment(count: int) -> dict[str, str]:
    """Of the workers. Several on one machine would otherwise start as many threads each as there are cores."""
    environment = {**os.environ}
    if count > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault(_START_VARIABLE, repr(time.time()))
    return environment
