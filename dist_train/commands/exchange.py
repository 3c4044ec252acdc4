"""`export`, `import`, `pack`: checkpoints for other programs, from other programs, and for a download.

Invariant: a run that is there is never changed; what is written appears whole or not at all. The work is done by
`checkpoint.exchange` and `checkpoint.archive`.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from dist_train.commands.command import AddCommand, print_json, print_lines, selector
from dist_train.console import bytes_text, metric_text
from dist_train.errors import ConfigError, ExitCode
from dist_train.units import parse_bytes

if TYPE_CHECKING:
    from dist_train.checkpoint.adoption import Adopted
    from dist_train.checkpoint.archive import Packed
    from dist_train.checkpoint.exchange import Exported

_CONFIG = {"hf": "config.json", "peft": "adapter_config.json"}
"""What from_pretrained needs beside the weights, by format."""
_FRESH = {
    "optimizer": "no optimizer state: it starts fresh",
    "scheduler": "no scheduler state: it starts fresh",
    "scaler": "no GradScaler state: it starts fresh (it matters to fp16 only)",
    "rng": "no random generators: random numbers go on from the script's own seed",
}


def add_commands(add: AddCommand) -> None:
    _add_export(add)
    _add_import(add)
    _add_pack(add)


def _add_export(add: AddCommand) -> None:
    one = add("export", _export, "Write a checkpoint for other programs: .pth, safetensors, a Hugging Face folder.")
    which = "latest, best, epoch:N, step:N or a path; the best if there is one, else the latest"
    one.add_argument("which", nargs="?", type=selector, metavar="WHICH", help=which)
    formats = "pth: a dictionary of torch.save (the default); safetensors: the weights; hf: a folder of them, with "
    formats += "the run's attached files, for from_pretrained; peft: the same of an adapter, for PeftModel"
    one.add_argument("--format", choices=("pth", "safetensors", "hf", "peft"), default="pth", help=formats)
    one.add_argument("--to", metavar="PATH", help="file or folder to be written; RUN-WHICH.pth here by default")
    one.add_argument("--weights-only", action="store_true", help="without the state of optimizer, scheduler, scaler")
    shards = "largest file of --format hf; 5GB by default"
    one.add_argument("--max-shard-size", metavar="SIZE", type=_size, help=shards)
    one.add_argument("--force", action="store_true", help="replace what is there")


def _add_import(add: AddCommand) -> None:
    one = add("import", _import, "Make a run of what another program saved; no code of it is run.", on_a_run=False)
    known = ".pth, .pt, .ckpt, .bin or .safetensors; a folder of Accelerate, transformers or Hugging Face"
    one.add_argument("source", metavar="SOURCE", help=known)
    one.add_argument("--run", dest="run_dir", metavar="RUN", required=True, help="run directory to be made")
    one.add_argument("--epochs-completed", type=int, metavar="N", help="instead of what SOURCE says")
    one.add_argument("--global-step", type=int, metavar="N", help="updates made, instead of what SOURCE says")
    mode = "whether lower or higher is better for the best metric; judged by its name by default"
    one.add_argument("--mode", choices=("min", "max"), help=mode)
    one.add_argument("--prefix", default="", help="take only weights whose names begin so, without it (model.)")
    one.add_argument("--keep-names", action="store_true", help="do not take module. and _orig_mod. off")
    names = "names of the models, optimizers and schedulers in order, where a folder holds several"
    one.add_argument("--names", type=_words, default=(), metavar="A,B", help=names)
    without = "leave behind, so that it starts fresh: some of optimizer,scheduler,scaler"
    one.add_argument("--without", type=_words, default=(), metavar="PARTS", help=without)


def _add_pack(add: AddCommand) -> None:
    one = add("pack", _pack, "Put the best and the latest checkpoint into a zip that unpacks into a run directory.")
    choice = one.add_mutually_exclusive_group()
    help_of = {
        "best": "the best alone, for inference",
        "latest": "the latest alone, for going on elsewhere",
        "all": "every checkpoint",
    }
    for name, text in help_of.items():
        choice.add_argument(f"--{name}", dest="choice", action="store_const", const=name, help=text)
    one.set_defaults(choice="both")
    one.add_argument("--weights-only", action="store_true", help="without the state of optimizer, scheduler, scaler")
    limit = "refuse a zip that would be larger, for instance what is left of a quota"
    one.add_argument("--max-bytes", metavar="SIZE", type=_size, help=limit)
    one.add_argument("--to", metavar="FILE.zip", help="zip to be written; RUN.zip here by default")
    one.add_argument("--force", action="store_true", help="replace what is there")


def _export(args: argparse.Namespace) -> int:
    from dist_train.checkpoint.exchange import export_checkpoint  # brings torch

    done = export_checkpoint(
        args.run_dir,
        args.which,
        args.to,
        form=args.format,
        max_shard_bytes=args.max_shard_size,
        weights_only=args.weights_only,
        force=args.force,
    )
    return print_json(asdict(done)) if args.json else _say(_export_lines(done))


def _import(args: argparse.Namespace) -> int:
    from dist_train.checkpoint.exchange import import_checkpoint  # brings torch

    done = import_checkpoint(
        args.source,
        args.run_dir,
        prefix=args.prefix,
        names=args.names,
        keep_names=args.keep_names,
        without=args.without,
        epochs_completed=args.epochs_completed,
        global_step=args.global_step,
        mode=args.mode,
    )
    return print_json(asdict(done)) if args.json else _say(_import_lines(args.source, done))


def _pack(args: argparse.Namespace) -> int:
    from dist_train.checkpoint.archive import pack  # brings xxhash

    done = pack(
        args.run_dir,
        args.to,
        choice=args.choice,
        weights_only=args.weights_only,
        max_bytes=args.max_bytes,
        force=args.force,
    )
    return print_json(asdict(done)) if args.json else _say(_pack_lines(done))


def _say(lines: list[str]) -> int:
    print_lines(lines)
    return ExitCode.OK


def _export_lines(done: Exported) -> list[str]:
    files = f" in {done.num_files} files" if done.num_files > 1 else ""
    lines = [
        f"Wrote {done.path}: {bytes_text(done.num_bytes)}{files}, {_moment(done.epochs_completed, done.global_step)}, "
        f"of {done.checkpoint}"
    ]
    if done.left_out:
        lines.append(f"Not in it: {', '.join(done.left_out)}")
    if done.format == "pth":
        lines.append(f"Load it with torch.load({done.path!r}, weights_only=True)")
    if done.attached:
        lines.append(f"Beside the weights, as attached to the run: {', '.join(done.attached)}")
    if done.format in _CONFIG:
        lines.append(_publishing_line(done))
    return lines


def _publishing_line(done: Exported) -> str:
    config = _CONFIG[done.format]
    if config not in done.attached:
        copied = f"For from_pretrained, copy {config} (and the tokenizer's files) of the model beside it"
        return f"{copied}; run.attach(model, tokenizer) has them go along by themselves"
    if done.format == "peft":
        return f"Load it with PeftModel.from_pretrained(base_model, {done.path!r})"
    return f"Load it with AutoModel.from_pretrained({done.path!r}), or the class for its task"


def _import_lines(source: str, done: Adopted) -> list[str]:
    measured = "".join(f", {name} {metric_text(name, value)}" for name, value in done.metrics.items())
    best = f", best {done.best['monitor']} {metric_text(done.best['monitor'], done.best['value'])}" if done.best else ""
    counts = [f"{count:,} weights{f' of {name}' if name else ''}" for name, count in done.models.items()]
    there = [part for part in ("optimizer", "scheduler", "scaler") if part not in done.absent]
    return [
        f"Imported {source}, {done.kind}: {_moment(done.epochs_completed, done.global_step)}{measured}{best}",
        f"  taken: {', '.join([*counts, *there])}, {bytes_text(done.num_bytes)}",
        *(f"  {_FRESH[kind]}" for kind in done.absent if kind in _FRESH),
        *(f"  {note}" for note in done.notes),
        f"Train on with run_dir={done.run_dir!r}: it continues with epoch {done.epochs_completed + 1}",
    ]


def _pack_lines(done: Packed) -> list[str]:
    what = "weights only" if done.weights_only else "with all that a resume needs"
    return [
        f"Packed {done.path}: {bytes_text(done.num_bytes)}, {what}",
        *(
            f"  {os.path.basename(one.path)}: {_moment(one.epochs_completed, one.global_step)}, "
            f"{', '.join([bytes_text(one.num_bytes), *one.marks])}"
            for one in done.checkpoints
        ),
        f"After the download: sha256sum -c {os.path.basename(done.sums_path)}",
        f"It unpacks into {done.folder}/, a run directory: load_model({done.folder!r}, ...), or run_dir to train on",
    ]


def _moment(epochs: int, step: int) -> str:
    return f"epoch {epochs}, step {step}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _size(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
