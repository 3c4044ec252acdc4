"""The agent of one node: torchrun's engine with a restart policy, quick restarts and an end that all nodes share.

    rendezvous -> start workers -> watch -> end what is left -> exchange reports -> decide together -> again, or stop

Invariant: an attempt ends on all nodes before the next one begins on any, and all nodes take the same decision. From
torch come the rendezvous and the assignment of ranks (`SimpleElasticAgent`); its loop, which restarts at once, waits
30 s for each worker that does not leave and counts on each node for itself, is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from dist_train.cluster.attempts import describe, merge, report_of_node
from dist_train.cluster.folder import Folder
from dist_train.cluster.grace import Grace
from dist_train.cluster.peers import SILENT_SECONDS, Peers
from dist_train.cluster.restart_policy import Ended, Restart, RestartPolicy, Stop
from dist_train.cluster.signals import TOLD_EARLY, Signals, StopAskedError
from dist_train.cluster.summary import NODES_CHANGED, Attempt, Conclusion
from dist_train.cluster.workers import AFTER_TERM_SECONDS, Workers
from dist_train.errors import DeadlineError, ExitCode
from dist_train.launched import LAUNCH_DIR, read_notes

Json = Any
FAILURE, MEMBERSHIP, ASKED = "failure", "membership", "asked"
"""Why an attempt ends before its workers have ended well."""
PEER_GRACE_SECONDS = 5.0
"""Workers that have lost another one notice by their next collective, and finish the save in flight."""
LONGEST_PEER_GRACE_SECONDS = 120.0
STOP_GRACE_SECONDS = 30.0
NOW_SECONDS = 5.0
"""After the second signal of a kind."""
MASTER_SECONDS = 60.0
ALONE_SECONDS = 1.0
"""Between looks at the clock on a single machine: ends and signals wake the agent."""
PATIENCE_POLL_SECONDS = 0.1
STOPPED_LOOKS = 5
"""A worker that SIGSTOP holds at so many looks in a row, a second apart, counts as dead. Time would not do: a platform
may suspend the launcher with its workers."""
LOST_RENDEZVOUS = (RendezvousError, dist.DistError)


class Agent(SimpleElasticAgent):
    """Runs attempts until the policy says stop.

    Args:
        most_nodes: 1 is this machine alone.
        grace: what workers that were asked to end may take; where nobody says so, by the measured times of saves,
            steps and evaluations.
        say: tells the user something at once.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        workers: Workers,
        policy: RestartPolicy,
        signals: Signals,
        folder: Folder,
        *,
        most_nodes: int,
        grace: Grace,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(spec)
        self._workers, self._policy, self._signals, self._folder = workers, policy, signals, folder
        self._most_nodes, self._grace, self._say = most_nodes, grace, say
        self._attempt = 0
        self._peers: Peers | None = None
        self._agreed = False
        self._began = 0.0
        self._kill_at = float("inf")
        self._warned = False
        self._next_look = 0.0
        self._looks: Counter[int] = Counter()

    def launch(self) -> Conclusion:
        """Attempts until one is the last."""
        conclusion, began = Conclusion(), time.monotonic()
        try:
            while isinstance(decision := self._live_once(conclusion), Restart):
                self._signals.rest(decision.pause_seconds)
            conclusion.exit_code, conclusion.why = decision.exit_code, decision.why
            self._agreed = True
        except StopAskedError:
            conclusion.exit_code, conclusion.why = self._signals.exit_code, TOLD_EARLY
        except LOST_RENDEZVOUS as error:
            conclusion.exit_code, conclusion.why = ExitCode.ERROR, _why_lost(error)
            stopped, ended_by_us = self._end_workers("the rendezvous is lost", None)
            if self._workers.exits:
                report = self._report(stopped, ended_by_us)
                self._remember(conclusion, merge([report], seconds=time.monotonic() - self._began), [report], "")
        finally:
            self._workers.close()
            conclusion.seconds = time.monotonic() - began
        return conclusion

    def part(self) -> None:
        """Closes the rendezvous where all nodes have agreed that it is over; who ends alone leaves it open."""
        if self._agreed and self._peers is not None:
            with contextlib.suppress(*LOST_RENDEZVOUS):
                self._peers.part(SILENT_SECONDS)
                self._worker_group.spec.rdzv_handler.shutdown()

    def _live_once(self, conclusion: Conclusion) -> Restart | Stop:
        self._attempt += 1
        group: Any = self._worker_group
        with self._signals.interrupting():
            if self._attempt == 1 or self._most_nodes > 1:  # alone, nothing can have changed
                self._rendezvous(group)
            self._serve_master(group)
        peers = self._peers = Peers(self._store_of_attempt(), group.group_rank, group.group_world_size)
        self._began = time.monotonic()
        self._policy.started()
        self._start_workers(group)
        why = self._watch(peers)
        stopped, ended_by_us = self._end_workers(why, peers)
        report = self._report(stopped, ended_by_us)
        reports, lost = peers.exchange(report, self._stop_grace() + SILENT_SECONDS)
        seconds = time.monotonic() - self._began
        ended = merge(reports, seconds=seconds, node_came=why == MEMBERSHIP, node_left=bool(lost))
        decision = self._agree(peers, self._policy.decide(ended), reports)
        self._remember(conclusion, ended, reports, decision.why)
        if isinstance(decision, Restart):
            what = NODES_CHANGED if ended.membership else describe(ended.causes[0])
            after = f" in {decision.pause_seconds:.0f} s" if decision.pause_seconds >= 1 else ""
            self._say(f"{what}; restarting{after}, {decision.why}")
        return decision

    def _remember(self, conclusion: Conclusion, ended: Ended, reports: Sequence[Json], why: str) -> None:
        step = max((one["step"] for one in reports if one["step"] is not None), default=None)
        world_size = self._worker_group.workers[0].world_size
        conclusion.attempts.append(
            Attempt(number=self._attempt, world_size=world_size, ended=ended, step=step, why=why)
        )
        run_dirs = [one["run_dir"] for one in reports if one["run_dir"]]
        conclusion.run_dir = run_dirs[0] if run_dirs else conclusion.run_dir
        conclusion.outcome = next((one["outcome"] for one in reports if one["outcome"]), None)

    # Before an attempt

    def _serve_master(self, group: Any) -> None:
        """A store for the workers' process group that knows nothing of earlier attempts, served by the first node.

        The rendezvous' own would be kept over restarts, with the addresses of the dead in it, and stays at the former
        first node when another one becomes the first.
        """
        host = "localhost" if self._most_nodes == 1 else group.master_addr
        self._master = None
        shared = self._store_of_attempt()
        if group.group_rank == 0:
            self._master = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            shared.set("master", json.dumps([host, self._master.port]))
        deadline = time.monotonic() + MASTER_SECONDS
        while not shared.check(["master"]):
            if time.monotonic() >= deadline:
                raise DeadlineError(
                    f"{socket.gethostname()} waited {MASTER_SECONDS:.0f} s for the first node's agent to serve a store "
                    f"for the workers. Look at what the launcher on {group.master_addr} says."
                )
            time.sleep(0.02)
        group.master_addr, group.master_port = json.loads(bytes(shared.get("master")))

    def _store_of_attempt(self) -> Any:
        """Of this round of the rendezvous. A static one has a single round for ever, as a machine alone has; there all
        nodes count alike.
        """
        group: Any = self._worker_group
        has_one_round = self._most_nodes == 1 or group.spec.rdzv_handler.get_backend() == "static"
        return dist.PrefixStore(f"dist_train/{self._attempt if has_one_round else 0}", group.store)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        folder = self._folder.renew(self._attempt)
        spec = worker_group.spec
        common = {
            "GROUP_RANK": worker_group.group_rank,
            "GROUP_WORLD_SIZE": worker_group.group_world_size,
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "MASTER_ADDR": worker_group.master_addr,
            "MASTER_PORT": worker_group.master_port,
            "TORCHELASTIC_RESTART_COUNT": self._attempt - 1,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", 1),
            LAUNCH_DIR: folder,
        }
        own = {
            worker.local_rank: {
                "RANK": worker.global_rank,
                "LOCAL_RANK": worker.local_rank,
                "ROLE_RANK": worker.role_rank,
                "WORLD_SIZE": worker.world_size,
                "ROLE_WORLD_SIZE": worker.role_world_size,
            }
            for worker in worker_group.workers
        }
        self._kill_at = float("inf")
        self._looks.clear()
        return self._workers.start(
            {rank: {k: str(v) for k, v in {**common, **one}.items()} for rank, one in own.items()}
        )

    @contextlib.contextmanager
    def record_duration(self, state: str) -> Iterator[None]:
        """Records nothing: each event of torch's looks up the host's full name, which takes seconds without a DNS."""
        yield

    # During an attempt

    def _watch(self, peers: Peers) -> str:
        """Until the attempt is over; returns why: "" where every worker of this node has ended well."""
        several = self._most_nodes > 1
        interval = self._worker_group.spec.monitor_interval if several else ALONE_SECONDS
        while self._workers.pids and not self._has_failure() and not self._has_stopped():
            peers.beat()
            self._workers.wait(interval)
            self._forward()
            if why := peers.why_ended():
                return why
            if several and not self._signals.any and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0:
                peers.end(MEMBERSHIP)
            if time.monotonic() >= self._kill_at:
                self._say("the workers did not end within their grace: killed")
                return ASKED
        if not (self._workers.pids or self._has_failure()):
            return ""
        why = ASKED if self._signals.any else FAILURE
        peers.end(why)
        return why

    def _has_failure(self) -> bool:
        return bool(self._workers.exits) and bool(self._report(frozenset(), frozenset())["causes"])

    def _has_stopped(self) -> bool:
        """Whether a worker does nothing any more though it lives; the others would wait for it in a collective."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + ALONE_SECONDS
            stopped = self._workers.stopped()
            self._looks = Counter({rank: self._looks[rank] + 1 for rank in stopped})
            self._warn_of_grace()
        return any(looks >= STOPPED_LOOKS for looks in self._looks.values())

    def _warn_of_grace(self) -> None:
        if not self._warned and (why := self._grace.why_too_short(_save_seconds(self._notes()))):
            self._warned = True
            self._say(why)

    def _forward(self) -> None:
        """Each signal that came, once to each worker of this node; from the first on they have a grace."""
        for one in self._signals.fresh():
            self._workers.send(one)
            again = self._signals.count[one] > 1
            grace = NOW_SECONDS if again else self._stop_grace()
            self._kill_at = min(self._kill_at, time.monotonic() + grace)
            if not again:
                self._say(f"{one.name}: the workers save and end, within {grace:.0f} s; the same again means now")

    def _end_workers(self, why: str, peers: Peers | None) -> tuple[set[int], set[int]]:
        """Ends what is left of this node's workers; returns the local ranks that SIGSTOP held, and those it ended.

        After a failure the others are given time to notice by themselves; who is asked to end gets the signal first.
        """
        if not self._workers.pids:
            return set(), set()
        if why == FAILURE:
            patience = self._peer_grace()
        else:
            patience = max(min(self._stop_grace(), self._kill_at - time.monotonic()), 0.0)
            if not self._signals.any:
                self._workers.send(signal.SIGTERM)
        stopped: set[int] = set()

        def wait(seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while self._workers.pids and time.monotonic() < min(deadline, self._kill_at):
                self._workers.wait(min(deadline - time.monotonic(), PATIENCE_POLL_SECONDS))
                self._forward()
                if peers is not None:
                    peers.beat()
                held = self._workers.stopped()
                stopped.update(held)
                self._workers.send(signal.SIGKILL, to=held)  # at once: the others may wait for it

        wait(patience)
        left = set(self._workers.pids)
        if why == FAILURE and self._workers.pids:
            self._workers.send(signal.SIGTERM)
            wait(AFTER_TERM_SECONDS)
        if self._workers.pids:
            self._workers.kill()
        return stopped, left

    def _peer_grace(self) -> float:
        """None where the dead one tells that the run was not entered: the others wait for it to join."""
        notes = self._notes()
        if notes and not any(note.get("begun") for note in notes.values()):
            return 0.0
        return min(PEER_GRACE_SECONDS + 2 * _save_seconds(notes), LONGEST_PEER_GRACE_SECONDS)

    def _stop_grace(self) -> float:
        """Where nobody says so: for the step or the evaluation that they are in, and the last save."""
        if self._grace.seconds is not None:
            return self._grace.seconds
        notes = self._notes()
        return max(STOP_GRACE_SECONDS, 3 * _save_seconds(notes) + 2 * _longest(notes, "longest_seconds"))

    # After an attempt

    def _notes(self) -> dict[int, dict[str, Json]]:
        """Of this node's workers; who else writes there is not heard."""
        pids = {*self._workers.pids.values(), *(one.pid for one in self._workers.exits.values())}
        notes = read_notes(self._folder.of_attempt(self._attempt))
        return {rank: note for rank, note in notes.items() if note.get("pid") in pids}

    def _report(self, stopped: Set[int], ended_by_us: Set[int]) -> dict[str, Json]:
        report = report_of_node(
            self._workers.exits,
            self._notes(),
            {worker.local_rank: worker.global_rank for worker in self._worker_group.workers},
            stopped=stopped,
            ended_by_us=ended_by_us,
            node=socket.gethostname() if self._most_nodes > 1 else "",
        )
        return {**report, "stop_asked": self._signals.any, "node": self._worker_group.group_rank}

    def _agree(self, peers: Peers, mine: Restart | Stop, reports: Sequence[Json]) -> Restart | Stop:
        leads = self._worker_group.group_rank == min(report["node"] for report in reports)
        agreed = peers.agree(asdict(mine), leads=leads, seconds=2 * SILENT_SECONDS)
        return Stop(**agreed) if "exit_code" in agreed else Restart(**agreed)

    # What the base class asks of a subclass, for whoever holds this one as such

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._workers.kill()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._has_failure():
            return RunResult(state=WorkerState.FAILED)
        return RunResult(state=WorkerState.HEALTHY if self._workers.pids else WorkerState.SUCCEEDED)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        self._workers.send(death_sig)
        self._workers.wait_all(timeout)
        self._workers.close()


def _save_seconds(notes: Mapping[int, Mapping[str, Json]]) -> float:
    return _longest(notes, "save_seconds")


def _longest(notes: Mapping[int, Mapping[str, Json]], key: str) -> float:
    return max((float(note.get(key, 0.0)) for note in notes.values()), default=0.0)


def _why_lost(error: BaseException) -> str:
    if isinstance(error, RendezvousClosedError):
        return "the launch has ended on the other nodes; the same command on all of them goes on"
    if isinstance(error, RendezvousTimeoutError):
        return "not enough nodes came in time (--nnodes, --rdzv-conf join_timeout=SECONDS)"
    return (
        f"the rendezvous is lost ({str(error).splitlines()[0] if str(error) else type(error).__name__}): its host died "
        f"or cannot be reached; the same command on all nodes goes on from the newest checkpoint"
    )
