"""What the numbers beside the tensors of a foreign checkpoint mean: epochs, steps, metrics, the best so far.

Invariant: pure; nothing is taken without being told in `notes` where it was guessed, and what is not
understood is told in `others`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from dist_train.checkpoint.manifest import Best, Progress

EPOCH_KEYS = ("epoch", "current_epoch", "last_epoch")
"""0-based index of the epoch that was finished, as scripts write it that save inside `for epoch in range(...)`."""
STEP_KEYS = ("global_step", "step", "steps", "iteration", "iterations", "num_updates", "n_iter")
LOSS_KEYS = ("train_loss", "training_loss", "avg_train_loss", "loss")
BEST = "best_"
_BEST_EPOCH = "best_epoch"
_MEASURED_ON = {"val", "valid", "validation", "eval", "dev", "test"}
_LOWER = {"loss", "error", "err", "smape", "mape", "mae", "mse", "rmse", "perplexity", "ppl", "wer", "cer", "fid"}
_HIGHER = {"acc", "acc1", "acc5", "accuracy", "f1", "auc", "auroc", "bleu", "rouge", "score", "iou", "miou", "dice"}
_HIGHER |= {"precision", "recall", "psnr", "ssim", "r2", "map"}
_RESERVED = {"kind", "attempt", "record", "global_step", "epoch", "train_loss"}
"""What the lines of metrics.jsonl call their own."""
Mode = Literal["min", "max"]


@dataclass(slots=True, kw_only=True)
class Facts:
    """What a manifest says besides the state."""

    progress: Progress
    metrics: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    best: Best | None = None
    others: list[str] = field(default_factory=list)
    """Names of what means nothing here: arguments, a configuration, lists of losses."""
    notes: list[str] = field(default_factory=list)


def read_facts(
    told: Mapping[str, Any],
    optimizers: Sequence[Any],
    *,
    epochs_completed: int | None = None,
    global_step: int | None = None,
    mode: Mode | None = None,
) -> Facts:
    """Reads what a source tells beside its tensors.

    Args:
        told: everything of the dictionary that is no state.
        optimizers: their state_dicts, which count updates.
        epochs_completed, global_step: instead of what the source says.
        mode: whether lower or higher is better; None judges by the metric's name.
    """
    rest = dict(told)
    facts = Facts(progress=Progress())
    epochs = _read_epochs(rest, epochs_completed, facts.notes)
    step = _read_step(rest, optimizers, global_step, facts.notes)
    facts.progress = Progress(
        global_step=step, epoch=epochs, epochs_completed=epochs, evaluation="done" if epochs else "none"
    )
    facts.train_loss = _take_number(rest, LOSS_KEYS)
    nested = rest.get("metrics")
    if isinstance(nested, Mapping) and nested and all(_number(value) is not None for value in nested.values()):
        measured = {str(key): float(_number(value) or 0.0) for key, value in nested.items()}
        facts.metrics = {key: value for key, value in measured.items() if key not in _RESERVED}
        del rest["metrics"]
    for key in [key for key in rest if _is_metric(key)]:
        if (value := _number(rest[key])) is not None:
            facts.metrics[key] = value
            del rest[key]
    facts.best = _read_best(rest, facts, mode)
    facts.others = list(rest)
    return facts


def _read_epochs(rest: dict[str, Any], given: int | None, notes: list[str]) -> int:
    said = rest.pop("epochs_completed", None)
    index = _take_whole(rest, EPOCH_KEYS)
    if given is not None:
        return given
    if isinstance(said, int):
        return said
    if index is not None:
        done = max(index + 1, 0)
        notes.append(f"epoch {index} is read as the index of a finished epoch, from 0: {done} completed")
        return done
    notes.append("it does not say how many epochs are completed: taken as 0 (--epochs-completed says otherwise)")
    return 0


def _read_step(rest: dict[str, Any], optimizers: Sequence[Any], given: int | None, notes: list[str]) -> int:
    told = _take_whole(rest, STEP_KEYS)
    if given is not None:
        return given
    if told is not None:
        return max(told, 0)
    counted = [_number(one.get("step")) for state in optimizers for one in state["state"].values() if _has_step(one)]
    if known := [int(count) for count in counted if count is not None]:
        notes.append(f"the global step is taken from the optimizer's own count of updates, {max(known)}")
        return max(known)
    notes.append("it does not say how many updates were made: the global step is taken as 0 (--global-step)")
    return 0


def _has_step(state: Any) -> bool:
    return isinstance(state, Mapping) and "step" in state


def _read_best(rest: dict[str, Any], facts: Facts, mode: Mode | None) -> Best | None:
    """The first `best_...` number; which metric it is of is judged by the names."""
    epoch = _take_whole(rest, (_BEST_EPOCH,))
    key = next((key for key in rest if key.startswith(BEST) and _number(rest[key]) is not None), None)
    if key is None:
        return None
    value = _number(rest.pop(key))
    assert value is not None
    named = key.removeprefix(BEST)
    monitor = next(
        (name for name in facts.metrics if name == named or name.endswith((f"_{named}", f"/{named}"))), named
    )
    direction = mode or mode_of(monitor)
    if mode is None:
        better = "lower" if direction == "min" else "higher"
        other = "max" if direction == "min" else "min"
        facts.notes.append(f"{key} is of {monitor}, where {better} is taken as better (--mode {other} says otherwise)")
    done, step = facts.progress.epochs_completed, facts.progress.global_step
    here = facts.metrics.get(monitor) == value or epoch == done - 1
    known = epoch + 1 if epoch is not None else 0
    return Best(
        monitor=monitor,
        mode=direction,
        value=value,
        global_step=step if here else 0,
        epochs_completed=done if here else known,
    )


def mode_of(metric: str) -> Mode:
    """Whether lower or higher is better, by the name."""
    words = set(_words(metric))
    return "max" if words & _HIGHER and not words & _LOWER else "min"


def _is_metric(key: str) -> bool:
    words = _words(key)
    return not key.startswith(BEST) and (words[0] in _MEASURED_ON or words[-1] in _LOWER | _HIGHER)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _take_whole(rest: dict[str, Any], keys: Sequence[str]) -> int | None:
    """A whole number under the first of the keys that has one."""
    for key in keys:
        value = _number(rest.get(key))
        if value is not None and value.is_integer():
            del rest[key]
            return int(value)
    return None


def _take_number(rest: dict[str, Any], keys: Sequence[str]) -> float | None:
    for key in keys:
        if (value := _number(rest.get(key))) is not None:
            del rest[key]
            return value
    return None


def _number(value: Any) -> float | None:
    """A number, also one in a tensor or of numpy."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else None
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.item() if value.size == 1 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
