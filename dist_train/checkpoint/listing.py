"""The facts of `overview` as lines of text that a person enjoys: what `dist-train` prints without --json.

Invariant: plain text without colours, numbers aligned, wrapped to the terminal but for tables. Prints nothing, reads
no file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.checkpoint.text import (
    age_text,
    counted,
    labelled,
    number_text,
    some_names,
    table,
    value_text,
    when_text,
    wrap,
)
from dist_train.console import bytes_text, metric_text

Json = Any
Facts = Mapping[str, Json]
_SHOWN_FILES = 16
_LEFTOVERS = {
    "abandoned": "left behind by a branch in checkpoints/abandoned/",
    "saving": "being written, or torn (.saving-)",
    "trash": "on the way out (.trash-)",
}


def list_lines(rows: Sequence[Facts], leftovers: Mapping[str, Mapping[str, int]]) -> list[str]:
    """All of `ls`."""
    usable = [row for row in rows if "problem" not in row]
    size = bytes_text(sum(row["bytes"] for row in usable))
    lines = [*_list_table(rows), "", f"{counted(len(usable), 'checkpoint')}, {size}"] if rows else []
    lines += _leftover_lines(leftovers)
    unusable = [row for row in rows if "problem" in row]
    lines += ["", "cannot be used:"] if unusable else []
    for row in unusable:
        lines += [f"  {os.path.basename(row['path'])}", *wrap(row["problem"].rstrip("."), "    ")]
    return lines


def abandoned_lines(rows: Sequence[Facts]) -> list[str]:
    """What `ls --all` shows besides."""
    if not rows:
        return []
    lines = ["", "left behind by branches; resume= the path of one starts a branch there:"]
    for row in rows:
        done = f"epochs {row['epochs_completed']}, {bytes_text(row['bytes'])}"
        lines.append(f"  {row['path']}  {row.get('problem', done)}")
    return lines


def show_lines(run: Facts | None, one: Facts) -> list[str]:
    """All of `show`; a checkpoint may belong to no run."""
    return [
        *([f"Run {run['run_dir']}", *labelled(_run_pairs(run)), ""] if run else []),
        f"Checkpoint {one['path']}",
        *labelled({**_progress_pairs(one), **_settings_pairs(one)}),
        "",
        *_contents(one),
    ]


def result_lines(result: Facts, name: str, width: int) -> list[str]:
    """What `verify` says of one checkpoint; `width` is that of the longest name."""
    if result["ok"]:
        return [f"ok       {name:{width}}  {bytes_text(result['bytes'])} in {counted(result['files'], 'file')}"]
    indent = " " * 9
    lines = [f"DAMAGED  {name}"]
    for damage in result["damages"]:
        start, stop = damage["start"], damage["stop"]
        span = "" if start is None else f", bytes {start} to {stop - 1}"
        lines += wrap(f"{damage['file']}{span}: {damage['problem'].rstrip('.')}", indent)
        if damage["tensors"]:
            lines += wrap(f"tensors there: {some_names(damage['tensors'])}", indent)
        elif damage["tensors"] is None:
            lines += wrap("its header cannot be read: any tensor of the file may be wrong", indent)
    return lines


def verdict_lines(count: int, damaged: int, num_bytes: int, seconds: float) -> list[str]:
    """The end of `verify`."""
    speed = f", {bytes_text(num_bytes / seconds)}/s" if num_bytes and seconds >= 0.1 else ""
    read = f"{bytes_text(num_bytes)} read in {seconds:.1f} s{speed}"
    if not damaged:
        return wrap(f"{counted(count, 'checkpoint')} verified: every byte is as committed ({read})")
    text = (
        f"{damaged:,} of {counted(count, 'checkpoint')} {'is' if damaged == 1 else 'are'} damaged ({read}). A resume "
        f"verifies first, sets what is damaged aside and takes the newest whole checkpoint, or starts anew if there is "
        f"none. To use a damaged one itself, put the named files back from a copy; and check the disk."
    )
    return ["", *wrap(text)]


# ls


def _list_table(rows: Sequence[Facts]) -> list[str]:
    monitors = list(dict.fromkeys(row["monitor"] for row in rows if row["monitor"]))
    header = ["step", "epochs", "seq", "size", *monitors, "loss", "committed", ""]
    now = time.time()
    cells = [
        [
            _step_text(row),
            value_text(row["epochs_completed"]),
            value_text(row["sequence"]),
            bytes_text(row["bytes"]),
            *(number_text(monitor, row["metrics"].get(monitor)) for monitor in monitors),
            number_text("loss", row["train_loss"]),
            when_text(row["committed_at"], now),
            ", ".join(_marks(row)),
        ]
        for row in rows
    ]
    return table([header, *cells], left={len(header) - 2, len(header) - 1})


def _step_text(row: Facts) -> str:
    """The step; with its number where it is a further copy of the same step."""
    copy = os.path.basename(row["path"]).rpartition("step-")[2].partition(".")[2]
    return value_text(row["step"]) + (f".{copy}" if copy else "")


def _marks(row: Facts) -> list[str]:
    marks = [name.replace("_", " ") for name in ("latest", "best", "pinned", "weights_only") if row[name]]
    if row.get("best_here"):  # a better one was saved elsewhere
        marks[marks.index("best")] = "best here"
    return ["corrupt", *marks] if "problem" in row else marks


def _leftover_lines(leftovers: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"{found['count']} {_LEFTOVERS[kind]}, {bytes_text(found['bytes'])}"
        for kind, found in sorted(leftovers.items())
    ]


# show


def _run_pairs(run: Facts) -> dict[str, str]:
    elsewhere, best = run["better_elsewhere"], os.path.basename(run["best"] or "")
    unusable = f", and {run['unusable']} that cannot be used" if run["unusable"] else ""
    return {
        "id": value_text(run["run_id"]),
        "created": when_text(run["created"]),
        "status": _status_text(run["status"] or {}, run["owner"]),
        "error": (run["status"] or {}).get("error", ""),
        "attempts": value_text(run["attempts"]),
        "checkpoints": f"{run['checkpoints']}{unusable}",
        "newest": os.path.basename(run["newest"] or ""),
        "best": f"{_best_text(elsewhere)}; not in this directory" if elsewhere else best,
        "best here": best if elsewhere else "",
        "besides": "; ".join(_leftover_lines(run["leftovers"])),
    }


def _status_text(status: Facts, owner: Facts | None) -> str:
    if not status:
        return "not written yet"
    code = "" if status.get("exit_code") is None else f" (exit code {status['exit_code']})"
    epochs = counted(status.get("epochs_completed", 0), "epoch")
    held = ""
    if owner and not owner["released"] and status.get("status") != "killed":
        held = f"; held by process {owner['pid']} on {owner['hostname']}"
    return f"{status.get('status')}{code} at step {status.get('global_step', 0)}, {epochs} completed{held}"


def _progress_pairs(one: Facts) -> dict[str, str]:
    return {
        "committed": f"{when_text(one['committed_at'])} ({age_text(one['committed_at'], time.time())})",
        "reason": f"{one['reason']}, attempt {one['attempt']}, sequence {one['sequence']}",
        "kept": _kept_text(one),
        "progress": _progress_text(one),
        "train loss": "" if one["train_loss"] is None else metric_text("loss", one["train_loss"]),
        "metrics": ", ".join(f"{name} {metric_text(name, value)}" for name, value in one["metrics"].items()),
        "best so far": _best_text(one["best"]),
        "started from": _origin_text(one["warm_start"]),
        "left out": _excluded_text(one["exclude"]),
    }


def _origin_text(origin: Facts | None) -> str:
    """Where the weights were from that the run began with."""
    if origin is None:
        return ""
    which = f", step {origin['global_step']} of run {origin['run_id'][:8]}" if "run_id" in origin else ""
    return f"the weights of {origin['path']}{which}"


def _excluded_text(excluded: Facts | None) -> str:
    if excluded is None:
        return ""
    return f"{counted(len(excluded['tensors']), 'tensor')} of the model ({', '.join(excluded['patterns'])})"


def _kept_text(one: Facts) -> str:
    kind = "weights-only" if one["weights_only"] else "in part"
    fresh = f"{kind} (a resume starts fresh: {', '.join(one['absent'])})" if one["absent"] else ""
    return ", ".join(part for part in ("pinned" if one["pinned"] else "", fresh) if part)


def _progress_text(one: Facts) -> str:
    progress = one["progress"]
    samples, total = progress["samples_into_epoch"], (one["data"] or {}).get("num_samples")
    parts = [f"step {progress['global_step']}", f"{counted(progress['epochs_completed'], 'epoch')} completed"]
    if samples:
        parts.append(f"{samples:,}{f' of {total:,}' if total else ''} samples into epoch {progress['epoch'] + 1}")
    if progress["evaluation"] == "pending":
        parts.append("its evaluation is pending")
    if progress["skipped_updates"]:
        parts.append(f"{counted(progress['skipped_updates'], 'update')} skipped by the GradScaler")
    return ", ".join(parts)


def _best_text(best: Facts | None) -> str:
    if best is None:
        return ""
    value = metric_text(best["monitor"], best["value"])
    direction = "lower" if best["mode"] == "min" else "higher"
    known = best["global_step"] or best["epochs_completed"]  # an import may tell the value alone
    place = f" at step {best['global_step']}, epoch {best['epochs_completed']}" if known else ""
    return f"{best['monitor']} {value}{place} ({direction} is better)"


def _settings_pairs(one: Facts) -> dict[str, str]:
    data = one["data"] or {}
    micro = f" (micro-batch {data['micro_batch_size']})" if data.get("micro_batch_size") else ""
    shown_already = ("global_batch_size", "micro_batch_size")
    return {
        "learning rate": "; ".join(dict.fromkeys(map(_rate_text, one["learning_rates"]))),
        "global batch": f"{data['global_batch_size']}{micro}" if data.get("global_batch_size") else "",
        "world size": value_text(one["world_size"]),
        "policy": _settings_text(one["policy"]),
        "data": _settings_text({name: value for name, value in data.items() if name not in shown_already}),
        "config": _settings_text(one["config"]),
        "environment": _settings_text({k: v for k, v in one["environment"].items() if k != "world_size"}),
    }


def _rate_text(rate: Facts) -> str:
    if rate["now"] is None:
        return "held in a tensor"
    then = rate["at_construction"]
    return f"{rate['now']:.6g}" + (f" ({then:.6g} at construction)" if then not in (None, rate["now"]) else "")


def _settings_text(settings: Facts | None) -> str:
    """Plain values that were given; nested ones are left to --json."""
    plain = {name: value for name, value in (settings or {}).items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{name}={_plain_text(value)}" for name, value in plain.items() if value is not None)


def _plain_text(value: Json) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _contents(one: Facts) -> list[str]:
    rows = [["", "files", "tensors", "elements", "size"]]
    for group, counts in one["groups"].items():
        if counts["tensors"]:
            numbers = [f"{counts[key]:,}" for key in ("files", "tensors", "elements")]
            rows.append([group, *numbers, bytes_text(counts["file_bytes"])])
    files = [[name, bytes_text(size)] for name, size in one["files"].items()]
    hidden = len(files) - _SHOWN_FILES
    more = [f"... and {hidden} more (--json lists them all)"] if hidden > 0 else []
    lines = [*table(rows, left={0}), "", *table(files[:_SHOWN_FILES], left={0}), *more, "", *_memory_lines(one)]
    return [f"  {line}".rstrip() for line in lines]


def _memory_lines(one: Facts) -> list[str]:
    sizes = one["image_bytes_by_rank"]
    rank = "" if len(sizes) == 1 else f" on the fullest rank, {bytes_text(sum(sizes))} over {len(sizes)} ranks"
    return [
        f"{bytes_text(one['bytes'])} on disk",
        f"{bytes_text(max(sizes))} of host memory for a save{rank}",
    ]
