"""Does a plan's faults inside of the process that suffers them, at the moments that `phases` tells and in its store.

Invariant: nothing of a run is changed but by the fault itself; each is noted durably before it is done.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from dist_train import launched, phases
from dist_train.checkpoint.store import Store
from dist_train.drill.arrival import when_imported
from dist_train.drill.fault_plan import FaultPlan
from dist_train.drill.faults import SIGNALS, Fault
from dist_train.drill.siblings import say_pid, signal_all, signal_rank
from dist_train.phases import Phase

_SLICE_SECONDS = 1.0


class InjectedError(RuntimeError):
    """What `FaultPlan.raise_error` raises; not one of ours, since it stands for a mistake of the script's."""


class Injector:
    """The faults of one plan that concern this process."""

    def __init__(self, plan: FaultPlan, rank: int, world_size: int) -> None:
        self.run: Any = None
        """The `Run` that was entered last."""
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        mine = [fault for fault in plan.faults if fault.concerns(rank, world_size, plan.seed)]
        self._pending = [fault for fault in mine if not plan.has_fired(fault, rank)]
        self._seen: dict[int, int] = {}
        """How often a fault's moment came in this life."""
        self._failing: dict[int, int] = {}
        """Of faults of the store that have fired: how many operations are still to fail; negative is without end."""
        self._over: set[int] = set()
        """Faults that are done with: the log is not asked again."""
        self._lock = threading.Lock()

    def arm(self) -> None:
        """From now on they come; one `at_phase="start"` comes here."""
        say_pid(self._plan.folder, self._rank)
        when_imported("dist_train.run", self._watch_runs)
        phases.listen(lambda before, now: self._reach(str(now)))
        phases.on_reach(lambda point: self._reach(str(point)))
        if any(fault.kind == "fail_io" for fault in self._pending):
            self._watch_stores()
        self._reach(str(Phase.START))

    def _watch_runs(self, module: ModuleType) -> None:
        enter = module.Run.__enter__

        def watched_enter(run: Any) -> Any:
            self.run = run
            return enter(run)

        module.Run.__enter__ = watched_enter

    def _watch_stores(self) -> None:
        before = Store._before

        def failing_before(store: Store, kind: str, path: str, target: str = "") -> str:
            self._reach_operation(kind, path)
            return before(store, kind, path, target)

        Store._before = failing_before  # type: ignore[method-assign, assignment]

    # When

    def _reach(self, moment: str) -> None:
        for fault in self._pending:
            if (
                fault.number in self._over
                or fault.kind == "fail_io"
                or fault.at_phase != moment
                or phases.global_step() < fault.at_step
            ):
                continue
            if self._is_nth(fault) and self._can_be_done(fault) and self._claim(fault, moment):
                self._do(fault)

    def _reach_operation(self, kind: str, path: str) -> None:
        for fault in self._pending:
            if fault.kind != "fail_io" or fault.operation not in ("", kind) or fault.path not in path:
                continue
            if self._fails_on(fault):
                raise OSError(fault.code, os.strerror(fault.code), path)
            if fault.number in self._over or phases.global_step() < fault.at_step or not self._is_nth(fault):
                continue
            if self._claim(fault, f"{kind} {path}"):
                with self._lock:
                    self._failing[fault.number] = fault.times - 1
                raise OSError(fault.code, os.strerror(fault.code), path)

    def _is_nth(self, fault: Fault) -> bool:
        """Points are reached in more than one thread."""
        if not self._plan.may_come(fault):
            return False
        with self._lock:
            self._seen[fault.number] = self._seen.get(fault.number, 0) + 1
            return self._seen[fault.number] >= fault.nth

    def _fails_on(self, fault: Fault) -> bool:
        with self._lock:
            left = self._failing.get(fault.number, 0)
            if left > 0:
                self._failing[fault.number] = left - 1
            return left != 0

    def _claim(self, fault: Fault, moment: str) -> bool:
        if fault.number in self._over:
            return False
        self._over.add(fault.number)
        attempt = 0 if self.run is None else self.run.attempt
        return self._plan.claim(fault, rank=self._rank, attempt=attempt, global_step=phases.global_step(), phase=moment)

    def _can_be_done(self, fault: Fault) -> bool:
        if fault.kind == "kill_data_worker":
            return bool(_data_workers())
        if fault.kind == "corrupt_newest":
            return self.run is not None and len(_committed(self.run._store.root)) >= 2
        return True

    # What

    def _do(self, fault: Fault) -> None:
        if fault.kind in SIGNALS:
            self._send(signal.Signals[SIGNALS[fault.kind]], fault)
        elif fault.kind == "terminate_launcher":
            os.kill(_launcher(), signal.SIGTERM)
        elif fault.kind == "hang":
            _hang(fault.seconds)
        elif fault.kind == "raise_error":
            raise InjectedError(f"{fault.message} (rank {self._rank}, step {phases.global_step()})")
        elif fault.kind == "exit":
            os._exit(fault.code)
        elif fault.kind == "kill_data_worker":
            os.kill(_data_workers()[0], signal.SIGKILL)
        elif fault.kind == "corrupt_newest":
            if threading.current_thread() is threading.main_thread():
                self.run._checkpointer.wait()  # a save in flight would be newer than the damaged one
            _flip_a_byte(_committed(self.run._store.root)[-1])
            signal_all(self._plan.folder, signal.SIGKILL)

    def _send(self, what: signal.Signals, fault: Fault) -> None:
        if fault.rank == "all":
            signal_all(self._plan.folder, what)
            return
        for rank in fault.targets(self._world_size, self._plan.seed):
            signal_rank(self._plan.folder, rank, what)


def _hang(seconds: float) -> None:
    """In slices, so that a signal's handler can run, as in a loop of the script's."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _SLICE_SECONDS))


def _launcher() -> int:
    """Process id of the launcher; a worker that was forked from a server of its launcher's is its grandchild."""
    server = os.environ.get(launched.LAUNCHER_PID)
    return os.getppid() if server is None else psutil.Process(int(server)).ppid()


def _data_workers() -> Sequence[int]:
    """Process ids of this process's DataLoader workers: only the loaders' iterators know which children they are."""
    torch_loaders = sys.modules.get("torch.utils.data.dataloader")
    if torch_loaders is None:
        return []
    kind = torch_loaders._MultiProcessingDataLoaderIter
    # Asking an object for its class wakes deprecated stand-ins of torch's; asking for its type does not.
    iterators: list[Any] = [one for one in gc.get_objects() if issubclass(type(one), kind)]
    return [worker.pid for one in iterators for worker in getattr(one, "_workers", ()) if worker.is_alive()]


def _committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = []
    for manifest in root.glob("checkpoints/step-*/manifest.json"):
        try:
            found.append((int(json.loads(manifest.read_text())["sequence"]), manifest.parent))
        except (OSError, ValueError, KeyError):
            continue
    return [path for _, path in sorted(found)]


def _flip_a_byte(checkpoint: Path) -> None:
    """In the middle of its largest file, which stays as long as it was."""
    files = sorted(checkpoint.glob("*.safetensors"), key=lambda path: (path.stat().st_size, path.name))
    with files[-1].open("r+b") as file:
        middle = files[-1].stat().st_size // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())
