"""A foreign checkpoint -> a run directory with one committed checkpoint, from which training goes on.

    parts of a source -> Capture, as a run's own objects would give it -> Checkpointer (plan, image, shards, commit)

Invariant: the run directory appears whole or not at all, values are bit for bit those of the source, and what it lacks
is named in the manifest's `absent`. It loads no file of another program and judges no name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dist_train.capture import Capture
from dist_train.checkpoint.catalog import list_checkpoints
from dist_train.checkpoint.checkpointer import Checkpointer, Draft
from dist_train.checkpoint.enclosure import require_outside_of_runs
from dist_train.checkpoint.facts import Facts, read_facts
from dist_train.checkpoint.foreign import Foreign
from dist_train.checkpoint.manifest import IMPORTED, Progress
from dist_train.checkpoint.outbox import new_folder, require_no_dead_link
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.checkpoint.store import CHUNK_BYTES, Operation, Store
from dist_train.checkpoint.tensor_file import DTYPE_NAMES
from dist_train.checkpoint.writer import Committed, SaveFailed
from dist_train.console import ByteMeter, EventLog, MetricsLog
from dist_train.errors import ConfigError, SaveFailedError, StorageError, UnsaveableStateError
from dist_train.model_state import clean_name
from dist_train.optimizer_state import positional_name
from dist_train.tied import storage_key
from dist_train.tree import encode
from dist_train.world import SoloWorld

Json = Any
REASON = "import"
_SLACK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What an import has made."""

    run_dir: str
    checkpoint: str
    """Its folder."""
    kind: str
    """What the source was taken for."""
    num_bytes: int
    global_step: int
    epochs_completed: int
    metrics: dict[str, float]
    train_loss: float | None
    best: dict[str, Json] | None
    models: dict[str, int]
    """Name -> tensors; "" is an only one."""
    absent: list[str]
    """Kinds of state that the source lacks: they start fresh."""
    notes: list[str] = field(default_factory=list)
    """What was mapped, guessed or not taken, for people."""


def adopt(foreign: Foreign, source: str, run_dir: str) -> Adopted:
    """Makes the run; see `exchange.import_checkpoint`.

    Raises:
        ConfigError: the run directory holds something already, or lies in another run.
        UnsaveableStateError: the source holds what tensors and JSON cannot hold.
        StorageError: it cannot be written; nothing is left of it.
    """
    _require_free(run_dir)
    options = foreign.options
    facts = read_facts(
        foreign.facts,
        list(foreign.optimizers.values()),
        epochs_completed=options.epochs_completed,
        global_step=options.global_step,
        mode=options.mode or foreign.mode,
    )
    notes = [*foreign.notes, *facts.notes]
    foreign = _leave_behind(foreign, options.without)  # only now: an optimizer's state has counted the updates
    capture = _capture(foreign)
    absent = _absent(capture.state)
    settings = {"absent": absent, "config": {"policy": {}, "data": {}, "user": {}}}
    settings[IMPORTED] = _encode_facts(foreign.facts, capture.tensors, notes)
    notes += _warn_of_schedulers(foreign.schedulers, facts.progress)
    if facts.others:
        notes.append(f"without a meaning here, kept for an export: {', '.join(facts.others)}")
    size = sum(tensor.nbytes for tensor in capture.tensors.values())
    meter = ByteMeter(size, sys.stderr, name=f"import {source}")
    with new_folder(run_dir, needed_bytes=size + _SLACK_BYTES, force=False) as staging:
        try:
            done = _commit(staging, capture, facts, settings, foreign.attached, meter)
        except SaveFailedError as error:
            raise StorageError(f"{run_dir} was not made: {error}. Free space, and import it again.") from error
        events = EventLog(staging)
        events.attempt = done.manifest.attempt
        told = {"source": os.path.abspath(source), "kind": foreign.kind, "absent": absent, "notes": notes}
        events.write("imported", path=done.path, **told)
    progress, best = done.manifest.progress, done.manifest.best
    return Adopted(
        run_dir=run_dir,
        checkpoint=os.path.join(run_dir, done.path),
        kind=foreign.kind,
        num_bytes=done.manifest.num_bytes,
        global_step=progress.global_step,
        epochs_completed=progress.epochs_completed,
        metrics=done.manifest.metrics,
        train_loss=done.manifest.train_loss,
        best=None if best is None else asdict(best),
        models={name: len(weights) for name, weights in foreign.models.items()},
        absent=absent,
        notes=notes,
    )


def _require_free(run_dir: str) -> None:
    require_no_dead_link(run_dir)
    if os.path.lexists(run_dir) and not os.path.isdir(run_dir):
        raise ConfigError(f"{run_dir} is a file, expected the directory of a new run. Give another --run.")
    held = len(list_checkpoints(Store(run_dir)))
    if held:
        raise ConfigError(
            f"{run_dir} is a run already, with {held} checkpoints; nothing was changed. An import makes a new run: "
            f"give another --run. To go on with the run that is there, start its training."
        )
    require_outside_of_runs(run_dir)
    if names := os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        raise ConfigError(
            f"{run_dir} is not empty ({', '.join(sorted(names)[:4])}); nothing was changed. An import makes a new run: "
            f"give another --run, or move away what is there."
        )


def _leave_behind(foreign: Foreign, parts: Collection[str]) -> Foreign:
    return replace(
        foreign,
        optimizers={} if "optimizer" in parts else foreign.optimizers,
        schedulers={} if "scheduler" in parts else foreign.schedulers,
        scaler=None if "scaler" in parts else foreign.scaler,
    )


def _commit(
    store: Store,
    capture: Capture,
    facts: Facts,
    settings: dict[str, Json],
    attached: Sequence[str],
    meter: ByteMeter,
) -> Committed:
    """By the machinery of every save, in a directory that nobody else knows yet."""

    def count(operation: Operation) -> None:
        if operation.kind == "write" and operation.path.endswith(".safetensors"):
            meter.add(CHUNK_BYTES)

    keeper = Checkpointer(Store(store.root, observer=count), SoloWorld(), CheckpointPolicy())
    try:
        keeper.open()
        keeper.attach(attached)
        progress = _write_history(store, keeper.attempt, facts)
        keeper.save(
            capture,
            Draft(
                progress=progress,
                reason=REASON,
                settings=settings,
                environment={},
                metrics=facts.metrics,
                train_loss=facts.train_loss,
                best=facts.best,
                rank_state={"loss": [(0.0).hex()] * 4},
            ),
        )
    finally:
        events = keeper.close()
        meter.pause()
    failures = [event.message for event in events if isinstance(event, SaveFailed)]
    if failures:
        raise SaveFailedError(failures[0].removeprefix("rank 0: ").rstrip("."))
    (done,) = [event for event in events if isinstance(event, Committed)]
    return done


def _write_history(store: Store, attempt: int, facts: Facts) -> Progress:
    """The first record of the run's metrics is what the source says of its last epoch."""
    log = MetricsLog(store)
    log.start(attempt, None, 0)
    if facts.metrics or facts.train_loss is not None:
        step, epoch = facts.progress.global_step, max(facts.progress.epochs_completed - 1, 0)
        log.write(kind="epoch", global_step=step, epoch=epoch, train_loss=facts.train_loss, **facts.metrics)
    return replace(facts.progress, metric_records=log.count)


def _capture(foreign: Foreign) -> Capture:
    """As a run's own objects would give it, by reference."""
    capture = Capture()
    for name, weights in foreign.models.items():
        _capture_weights(weights, foreign.tied.get(name, {}), _place("model", name), capture)
    for name, state in foreign.optimizers.items():
        place = _place("optimizer", name)
        capture.state[place] = _capture_optimizer(state, place, capture.tensors)
    for name, state in foreign.schedulers.items():
        place = _place("scheduler", name)
        capture.state[place] = encode(state, place, capture.tensors)
    if foreign.scaler:
        capture.state["scaler"] = encode(foreign.scaler, "scaler", capture.tensors)
    return capture


def _capture_weights(weights: Mapping[str, Any], tied: Mapping[str, str], place: str, capture: Capture) -> None:
    seen: dict[Any, str] = {}
    extra: dict[str, Any] = {}
    for name, value in weights.items():
        full = f"{place}/{name}"
        if not isinstance(value, torch.Tensor) or name.endswith("_extra_state"):
            extra[name] = value
        elif (first := seen.setdefault(storage_key(value), full)) != full:
            capture.aliases[full] = first
        else:
            capture.tensors[full] = value.detach()
    stored = {key: capture.aliases.get(f"{place}/{key}", f"{place}/{key}") for key in tied.values()}
    capture.aliases.update({f"{place}/{alias}": stored[key] for alias, key in tied.items()})
    if extra:
        capture.state[f"{place}/~extra"] = encode(extra, f"{place}/~extra", capture.tensors)


def _capture_optimizer(told: Mapping[str, Any], place: str, tensors: dict[str, torch.Tensor]) -> Json:
    """A torch optimizer's state_dict numbers its parameters; which names they have, the script that resumes knows."""
    names: dict[Any, str] = {}
    groups = []
    for index, group in enumerate(told["param_groups"]):
        members = [_member_name(index, position, number) for position, number in enumerate(group["params"])]
        names.update(zip(group["params"], members, strict=True))
        hyper = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": members, "settings": encode(hyper, f"{place}/~groups/{index}", tensors)})
    on_device = {number for group in told["param_groups"] if _counts_there(group) for number in group["params"]}
    state = {}
    for number, name in names.items():
        if number in told["state"]:
            json = encode(told["state"][number], f"{place}/{name}", tensors)
            state[name] = _where_the_parameter_lies(json, counters=number in on_device)
    loose = {str(key): value for key, value in told["state"].items() if key not in names}
    return {"groups": groups, "state": state, "loose": encode(loose, f"{place}/~loose", tensors)}


def _member_name(group: int, position: int, number: Any) -> str:
    """A number's name is its place; FSDP's full states have names instead."""
    return clean_name(number) if isinstance(number, str) else positional_name(group, position)


def _counts_there(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _where_the_parameter_lies(json: Json, *, counters: bool) -> Json:
    """Everything was loaded to the CPU; on a device it belongs where its parameter is, as torch's own load puts it,
    but for the count of steps of an optimizer that is neither fused nor capturable.
    """
    for key, value in json.items() if isinstance(json, dict) else ():
        if isinstance(value, dict) and value.get("$") == "tensor" and (key != "step" or counters):
            value["device"] = "cuda"
    return json


def _encode_facts(facts: Mapping[str, Any], tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, Json]:
    """What the source says beside its state, so that an export can say it again."""
    kept: dict[str, Json] = {}
    for key, value in facts.items():
        found: dict[str, torch.Tensor] = {}
        try:
            kept[key] = encode(value, f"{IMPORTED}/{key}", found)
        except UnsaveableStateError as error:
            notes.append(f"not taken: {error}")
            continue
        if all(one.layout == torch.strided and one.dtype in DTYPE_NAMES for one in found.values()):
            tensors.update(found)
        else:
            del kept[key]
            notes.append(f"not taken: {key}, which holds tensors of a kind that safetensors lacks")
    return kept


def _absent(state: Mapping[str, Json]) -> list[str]:
    there = {place.partition("/")[0] for place in state}
    return [kind for kind in ("optimizer", "scheduler", "scaler", "rng", "user") if kind not in there]


def _warn_of_schedulers(schedulers: Mapping[str, Any], progress: Progress) -> list[str]:
    """A schedule that counts epochs goes through its whole curve in a few updates where each of them steps it."""
    return [
        f"the scheduler counts epochs (last_epoch {state['last_epoch']}), and the Trainer steps a scheduler once an "
        f"update: step it once an epoch in a loop of your own, or leave its state behind (--without scheduler) and "
        f"make one that counts updates"
        for state in schedulers.values()
        if state.get("last_epoch") in (progress.epochs_completed, progress.epochs_completed - 1)
        and abs(state["last_epoch"] - progress.global_step) > 1
    ]


def _place(kind: str, name: str) -> str:
    return f"{kind}/{name}" if name else kind
