"""Who am I among the processes, and how all of them agree: `init_distributed`, `SoloWorld`, `TorchWorld`.

Invariant: no wait without a deadline and a message; collectives run on the main thread, on a CPU (gloo) group of their
own; background threads talk through a `Mailbox`, a key-value client that nobody shares. It knows nothing of
checkpoints.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_train import errors, launched, phases
from dist_train.connections import watch_new_connections
from dist_train.errors import ConfigError, DeadlineError, DisagreementError, DistTrainError, LauncherLostError
from dist_train.joining import JOIN_TIMEOUT_SECONDS, join
from dist_train.phases import Phase

logger = logging.getLogger(__name__)
Json = Any
CONTROL_TIMEOUT_SECONDS = 1800.0
"""A collective of the control group waits as long as the slowest rank's step: compilation and evaluation included."""


class Mailbox(ABC):
    """A key-value client for one background thread; keys are deleted by whoever has read them."""

    @abstractmethod
    def put(self, key: str, value: bytes) -> None: ...

    @abstractmethod
    def take(self, key: str, timeout_seconds: float) -> bytes:
        """Waits for a key, returns its value and deletes it. Raises DeadlineError."""


class World(ABC):
    """The ranks of one attempt. Every method but `open_mailbox` is collective: all ranks call it, on the main
    thread.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @abstractmethod
    def max(self, values: Sequence[int], what: str) -> list[int]:
        """Element-wise maximum of int64 values over all ranks."""

    @abstractmethod
    def sum(self, values: Sequence[int], what: str) -> list[int]:
        """Element-wise sum of int64 values over all ranks."""

    @abstractmethod
    def broadcast(self, value: Json, what: str) -> Json:
        """The main rank's JSON value, on every rank."""

    @abstractmethod
    def gather(self, value: Json, what: str) -> list[Json]:
        """Every rank's JSON value, in rank order, on every rank."""

    @abstractmethod
    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrites a dense tensor of any device with the main rank's."""

    @abstractmethod
    def open_mailbox(self) -> Mailbox:
        """A client of its own for one background thread."""

    def on_main(self, work: Callable[[], Json], what: str) -> Json:
        """The main rank's JSON result, on every rank; its errors are raised on every rank alike.

        Raises:
            DistTrainError: of the class that `work` raised; an OSError becomes a StorageError.
        """
        answer = self.broadcast(_attempt(work) if self.is_main else None, what)
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer["value"]

    def gather_floats(self, values: list[float]) -> list[list[float]]:
        """Every rank's float64 values, in rank order, bit for bit (`float.hex` keeps NaN and infinities too)."""
        rows = self.gather([value.hex() for value in values], "the sums of a metric")
        return [[float.fromhex(text) for text in row] for row in rows]

    def require_equal(self, digest: str, what: str) -> None:
        """Raises DisagreementError on all ranks when their 128-bit hexadecimal digests differ."""
        words = [int(digest[start : start + 8], 16) for start in range(0, 32, 8)]
        highest = self.max([*words, *(-word for word in words)], what)
        if any(high + low for high, low in zip(highest[:4], highest[4:], strict=True)):
            raise DisagreementError(
                f"Rank {self.rank}: the ranks do not hold the same {what} (here {digest}). "
                f"All ranks must build the same objects and see the same run directory."
            )


class SoloWorld(World):
    """One process: no process group, no waiting."""

    def __init__(self) -> None:
        self._mail: dict[str, bytes] = {}
        self._news = threading.Condition()

    def max(self, values: Sequence[int], what: str) -> list[int]:
        return list(values)

    def sum(self, values: Sequence[int], what: str) -> list[int]:
        return list(values)

    def broadcast(self, value: Json, what: str) -> Json:
        return value

    def gather(self, value: Json, what: str) -> list[Json]:
        return [value]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        pass

    def open_mailbox(self) -> Mailbox:
        return _LocalMailbox(self._mail, self._news)


class _LocalMailbox(Mailbox):
    def __init__(self, mail: dict[str, bytes], news: threading.Condition) -> None:
        self._mail = mail
        self._news = news

    def put(self, key: str, value: bytes) -> None:
        with self._news:
            self._mail[key] = value
            self._news.notify_all()

    def take(self, key: str, timeout_seconds: float) -> bytes:
        with self._news:
            if not self._news.wait_for(lambda: key in self._mail, timeout_seconds):
                raise DeadlineError(f"{key} did not come within {timeout_seconds:.0f} s.")
            return self._mail.pop(key)


class TorchWorld(World):
    """The ranks of the default process group. Constructing it is collective."""

    def __init__(self, *, timeout_seconds: float = CONTROL_TIMEOUT_SECONDS) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._timeout_seconds = timeout_seconds
        self._thread = threading.get_ident()
        with watch_new_connections():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        # Keys of an earlier world in the same store must not be taken for ours.
        self._prefix = f"dist_train/{self.broadcast(uuid.uuid4().hex, 'the mailbox prefix')}"

    def max(self, values: Sequence[int], what: str) -> list[int]:
        return self._reduce(values, dist.ReduceOp.MAX, what)

    def sum(self, values: Sequence[int], what: str) -> list[int]:
        return self._reduce(values, dist.ReduceOp.SUM, what)

    def broadcast(self, value: Json, what: str) -> Json:
        data = _encode(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._run(what, lambda: dist.broadcast(length, 0, group=self._group))
        buffer = data if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        self._run(what, lambda: dist.broadcast(buffer, 0, group=self._group))
        return _decode(buffer)

    def gather(self, value: Json, what: str) -> list[Json]:
        data = _encode(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        self._run(what, lambda: dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group))
        longest = int(max(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        rows = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        self._run(what, lambda: dist.all_gather(rows, padded, group=self._group))
        return [_decode(row[: int(length)]) for row, length in zip(rows, lengths, strict=True)]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        staged = tensor.detach().to("cpu", copy=True).contiguous()
        flat = staged.reshape(-1).view(torch.uint8) if staged.numel() else staged
        self._run("a tensor of the main rank", lambda: dist.broadcast(flat, 0, group=self._group))
        if not self.is_main:
            tensor.detach().copy_(staged)

    def open_mailbox(self) -> Mailbox:
        store: Any = dist.distributed_c10d._get_default_store()
        return _StoreMailbox(store.clone(), self._prefix, self.rank)

    def _reduce(self, values: Sequence[int], operation: Any, what: str) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        self._run(what, lambda: dist.all_reduce(tensor, operation, group=self._group))
        return [int(value) for value in tensor.tolist()]

    def _run(self, what: str, collective: Callable[[], Any]) -> None:
        assert threading.get_ident() == self._thread, f"law 10: {what} was asked for in a background thread"
        # all_reduce on a destroyed group does nothing and says nothing.
        if not dist.is_initialized():
            raise DisagreementError(
                f"Rank {self.rank} of {self.world_size} cannot agree on {what}: the process group was destroyed before "
                f"the run had ended. Call accelerator.end_training() and destroy_process_group() after the `with Run` "
                f"block, or leave them out: the run closes its trackers itself."
            )
        started = time.monotonic()
        try:
            with phases.awaiting(what):
                collective()
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise DeadlineError(
                f"Rank {self.rank} of {self.world_size} waited {waited:.1f} s (of at most {self._timeout_seconds:.0f}) "
                f"for the other ranks to agree on {what}, and lost them: {_first_line(error)}. "
                f"Look at the first rank that failed; the launcher restarts all of them from the newest checkpoint."
            ) from error


class _StoreMailbox(Mailbox):
    def __init__(self, store: Any, prefix: str, rank: int) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank

    def put(self, key: str, value: bytes) -> None:
        with self._launcher_alive(key):
            self._store.set(f"{self._prefix}/{key}", value)

    def take(self, key: str, timeout_seconds: float) -> bytes:
        full = f"{self._prefix}/{key}"
        with self._launcher_alive(key):
            try:
                self._store.wait([full], timedelta(seconds=timeout_seconds))
            except dist.DistNetworkError:
                raise
            except RuntimeError as error:
                raise DeadlineError(
                    f"Rank {self._rank} waited {timeout_seconds:.0f} s for {key}, and it did not come: "
                    f"{_first_line(error)}."
                ) from error
            value = self._store.get(full)
            self._store.delete_key(full)
        return bytes(value)

    @contextmanager
    def _launcher_alive(self, key: str) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError as error:
            lost, then = "the launcher's store", "run the same command again to go on from the newest checkpoint"
            if not _launcher_serves_store():
                lost = "rank 0, which serves their store,"
                then = "the launcher starts all ranks again from the newest checkpoint"
            raise LauncherLostError(
                f"Rank {self._rank} lost {lost} over {key}: {_first_line(error)}. Training ends here; {then}."
            ) from error


def count_collectives() -> int | None:
    """Those of all groups so far: whether this rank has waited for others between two moments. None where a backend
    does not count them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    groups: Iterable[Any] = dist.distributed_c10d._world.pg_map
    try:
        return int(sum(group._get_sequence_number_for_group() for group in groups))
    except RuntimeError:
        return None


def _attempt(work: Callable[[], Json]) -> Json:
    try:
        return {"value": work()}
    except DistTrainError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        message = f"{error}. Check the run directory and run the same command again."
        return {"error": "StorageError", "message": message}


def current_world() -> World:
    """The world of this process: `TorchWorld` where a process group exists, else alone. Collective.

    Raises:
        DisagreementError: several processes were launched and none of them has made the process group.
        ConfigError: it was made by somebody else, and would not survive the restarts that the launcher promises.
    """
    _require_group_that_survives_restarts()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchWorld()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise DisagreementError(
            f"{launched} processes were launched (WORLD_SIZE), but rank {os.environ.get('RANK')} has no process group. "
            f"Call dist_train.init_distributed() at the top of the script, before Accelerator() is made."
        )
    return SoloWorld()


def init_distributed(timeout_seconds: float = CONTROL_TIMEOUT_SECONDS) -> None:
    """Makes the process group under torchrun or accelerate launch; does nothing when alone or when it exists.

    Call it before `Accelerator()`. torchrun's agent keeps one store over restarts and the workers of torch 2.13 no
    longer prefix their keys by attempt, so that restarted workers read the addresses of dead ones. Here all ranks
    agree on a generation first (see `joining`) and the process group lives under its prefix. The restart count cannot
    serve as one: on several nodes it counts only on the node whose workers failed.

    Raises:
        DeadlineError: not all ranks came; names those that are missing.
        ConfigError: the group exists, and would not survive the restarts that the launcher promises.
    """
    global _group_is_ours
    _require_group_that_survives_restarts()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or world_size < 2 or "RANK" not in os.environ:
        return
    launched.note(begun=False)  # who waits in here for a dead rank has nothing to save
    with phases.within(Phase.RENDEZVOUS):
        _make_group(world_size, timeout_seconds)
    _group_is_ours = True
    atexit.register(_destroy_process_group)


def _make_group(world_size: int, timeout_seconds: float) -> None:
    rank = int(os.environ["RANK"])
    store = _connect_store(rank, world_size)
    generation = join(store, rank, world_size)
    if rank == 0:
        _warn_of_store_that_takes_no_host_in()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
        # Without it Accelerator() under torchrun on a machine without a GPU believes to be alone.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    with watch_new_connections():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"dist_train/group/{generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )


_group_is_ours = False


def _require_group_that_survives_restarts() -> None:
    """Accelerator() makes a group of its own where there is none; a restarted worker would hang in it (see above)."""
    made = dist.is_available() and dist.is_initialized() and not _group_is_ours
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if made and restarts and dist.get_world_size() > 1:
        raise ConfigError(
            f"Rank {dist.get_rank()}: the process group was made before dist_train.init_distributed(), probably by "
            f"Accelerator(). The launcher would restart workers up to {restarts} times, and restarted workers hang in "
            f"such a group. Call dist_train.init_distributed() at the top of the script, before Accelerator() is made."
        )


def _destroy_process_group() -> None:
    """A group that outlives the interpreter aborts the process."""
    if dist.is_initialized():
        # gloo's threads drop the tensors of the last collective with the GIL, under a lock that destroying needs: let
        # them have it first, or both wait for ever.
        time.sleep(0.1)
        dist.destroy_process_group()


def _connect_store(rank: int, world_size: int) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(
        host,
        port,
        world_size=world_size,
        is_master=not _launcher_serves_store() and rank == 0,
        timeout=timedelta(seconds=JOIN_TIMEOUT_SECONDS),
        multi_tenant=True,
        wait_for_workers=False,
    )


def _launcher_serves_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _warn_of_store_that_takes_no_host_in() -> None:
    """torchrun's agents learn the store's address in their first round and keep it. Source:
    DynamicRendezvousHandler.next_rendezvous of torch 2.13, where an agent that comes later waits 60 s for an address
    that nobody publishes any more; where the first host is lost, the others keep asking it.
    """
    hosts = int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if hosts > 1 and _launcher_serves_store() and launched.by_elastic() and not launched.by_dist_train():
        logger.warning(
            "This launch on %d machines cannot take in a machine that comes later or comes back: that would end it. "
            "Start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every launcher (as "
            "launch/torchrun.sh does), or with dist-train launch.",
            hosts,
        )


def _encode(value: Json) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Json:
    return json.loads(data.numpy().tobytes())


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
