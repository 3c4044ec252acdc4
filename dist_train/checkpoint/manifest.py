"""The root manifest of a checkpoint: its dataclasses, their JSON, and the names of things on disk.

Invariant: a manifest that parses has the digest of its own content, and `Manifest.from_json(m.to_json()) == m`.
Reads and writes no file. `docs/checkpoint-format.md` is the specification.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from dist_train.errors import CorruptCheckpointError, FormatVersionError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKPOINTS = "checkpoints"
ATTEMPTS = "attempts"
ABANDONED = f"{CHECKPOINTS}/abandoned"
SAVING_PREFIX = ".saving-"
TRASH_PREFIX = ".trash-"
CORRUPT_PREFIX = ".corrupt-"
MODEL_INDEX = "model.safetensors.index.json"
METRICS_LOG = "metrics.jsonl"
EVENTS_LOG = "run.jsonl"
RUN_FILE = "run.json"
STATUS_FILE = "status.json"
BRANCH_FILE = "branch.json"
TRACKING_FILE = "tracking.json"
WARM_START_FILE = "warm_start.json"
WARM_START = "warm_start"
"""Setting that says where the weights are from that the run started with."""
PINS = "pins"
IMPORTED = "imported"
"""Setting of an imported checkpoint: what its source said beside the state, under its own names."""
ATTACHED = "attached"
"""Setting: names of the files that the user had go along."""
DIGEST_BLOCK_BYTES = 8 << 20
"""A running digest is kept at the end of every block, so that verification names the first wrong byte range."""

Json = Any
_STEP_NAME = re.compile(r"step-(\d{8,})(?:\.\d+)?\Z")


def step_name(global_step: int, copy: int = 0) -> str:
    """Folder name of the committed checkpoint of a step; a later one of the same step is a copy with a number."""
    return f"step-{global_step:08d}" + (f".{copy}" if copy else "")


def parse_step_name(name: str) -> int | None:
    """The step of a committed folder's name, None for any other name."""
    match = _STEP_NAME.match(name)
    return int(match.group(1)) if match else None


def saving_name(target: str, attempt: int) -> str:
    """Folder name of a checkpoint that is being written; never considered by resume."""
    return f"{SAVING_PREFIX}{target}-a{attempt:06d}"


def shard_name(group: str, rank: int, world_size: int) -> str:
    """File name of one rank's tensors of a group, in Hugging Face's numbering."""
    return f"{group}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One data file: everything needed to prove that its bytes are those that were written."""

    size: int
    digest: str
    """xxh3-128 of the whole file, hexadecimal."""
    blocks: list[str] = field(default_factory=list)
    """First 16 hexadecimal digits of the running xxh3-128 at the end of every block of `DIGEST_BLOCK_BYTES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as the model sees it: global shape, whatever files hold its parts."""

    shape: list[int]
    dtype: str
    """safetensors' name of the element type, for instance F32."""
    order: list[int] | None = None
    """Dimensions from the slowest to the fastest in memory; None is the row-major order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the run is. Counts completed things only."""

    global_step: int = 0
    """Completed optimizer updates."""
    epoch: int = 0
    """0-based index of the pass in progress."""
    epochs_completed: int = 0
    samples_into_epoch: int = 0
    """Samples of the epoch's order that were consumed, over all ranks."""
    evaluation: Literal["none", "pending", "done"] = "none"
    """pending: the epoch's last update is in, its evaluation is not; resume runs it."""
    metric_records: int = 0
    """Length of the folded metrics history at this point."""
    stale_epochs: int = 0
    """Evaluations in a row without an improvement (early stopping)."""
    skipped_updates: int = 0
    """Updates that the GradScaler left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best value so far of the monitored metric, over the whole chain of resumes."""

    monitor: str
    mode: Literal["min", "max"]
    value: float
    global_step: int
    epochs_completed: int


class _Read:
    """Room for what is no part of the content."""

    __slots__ = ("_read_digest",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(_Read):
    """The commit: its presence in a folder under a committed name means that every file listed is durable."""

    run_id: str
    sequence: int
    """Increases with every commit of the run; newest means highest."""
    attempt: int
    parent: str | None
    """Digest of the manifest that was resumed from or committed before."""
    committed_at: float
    """Seconds since the epoch, for people; nothing orders by it."""
    progress: Progress
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    aliases: dict[str, str] = field(default_factory=dict)
    """Tied tensors: name -> name of the tensor that is stored."""
    state: dict[str, Json] = field(default_factory=dict)
    """What is equal on all ranks and is not a tensor: param groups, scheduler, scaler, registered objects."""
    rank_state: list[Json] = field(default_factory=list)
    """What differs by rank: RNG, loss sums. One entry a rank."""
    settings: dict[str, Json] = field(default_factory=dict)
    """Each setting's value at construction."""
    environment: dict[str, Json] = field(default_factory=dict)
    """What exact resume depends on: versions, threads, devices, CPU capability."""
    metrics: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    best: Best | None = None
    world_size: int = 1
    reason: str = ""
    """Why it was saved: every_steps, every_epochs, every, end, requested, import."""

    @property
    def absent(self) -> list[str]:
        """Kinds of state that it was made without: optimizer, scheduler, scaler, rng, user. They start fresh when it
        is resumed from.
        """
        return list(self.settings.get("absent", []))

    @property
    def stripped_from(self) -> str | None:
        """Digest of the manifest that it replaced, where retention has taken the optimizer's state away."""
        digest: str | None = self.settings.get("stripped_from")
        return digest

    @property
    def attached(self) -> list[str]:
        """Files that the user had go along: a config, a tokenizer."""
        return [name for name in self.settings.get(ATTACHED, []) if name in self.files]

    @property
    def optimizer_files(self) -> list[str]:
        """Files with the optimizer's tensors and nothing else."""
        return sorted(name for name in self.files if name.startswith("optimizer-"))

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> str:
        """JSON with the format version and the digest of everything else; dictionaries keep their order."""
        body = self._body()
        return to_json({**body, "digest": digest_of(body)})

    @property
    def digest(self) -> str:
        """Of one that was read, what its file says and was checked; thousands of tensors take their time."""
        return getattr(self, "_read_digest", None) or digest_of(self._body())

    def _body(self) -> dict[str, Json]:
        """As it will be read back: keys may be numbers, which sort otherwise than the strings that they become."""
        content = {one.name: _as_json(getattr(self, one.name)) for one in fields(self)}
        body: dict[str, Json] = json.loads(to_json({"format": FORMAT_VERSION, **content}))
        return body

    @staticmethod
    def from_json(text: str | bytes, path: str = "") -> Manifest:
        """Parses and checks the digest.

        Raises:
            FormatVersionError: written by a newer version.
            CorruptCheckpointError: not JSON, a wrong digest, missing or unknown fields.
        """
        try:
            body = json.loads(text)
            version = body.pop("format", None)
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(f"{path}: the manifest is not JSON ({error}).", path) from error
        if type(version) is not int or version < 1:
            raise CorruptCheckpointError(f"{path}: the manifest's format is {version!r}, expected a number.", path)
        expected = body.pop("digest", None)
        found = digest_of({"format": FORMAT_VERSION, **body})
        if version != FORMAT_VERSION and found == expected:  # one flipped bit makes 3 of 1: ours, and damaged
            raise CorruptCheckpointError(f"{path}: the manifest's format was changed to {version}.", path)
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: format {version!r}, this version of dist_train reads {FORMAT_VERSION}. "
                f"Upgrade dist-train to read it; the checkpoint was left as it is.",
                path,
            )
        if found != expected:
            raise CorruptCheckpointError(f"{path}: the manifest's digest is {found}, expected {expected}.", path)
        manifest = _build(body, path)
        object.__setattr__(manifest, "_read_digest", found)
        return manifest


def digest_of(body: Json) -> str:
    """Digest of a JSON value in canonical form, with sorted keys (the first 128 bits of sha256)."""
    return hashlib.sha256(to_json(body, sort_keys=True).encode()).hexdigest()[:32]


def to_json(body: Json, *, sort_keys: bool = False) -> str:
    """No spaces, ASCII only. NaN and infinities, which JSON lacks, are tagged as in `tree`."""
    try:
        return json.dumps(body, sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a diverged run has such losses and metrics; a bare NaN would be no JSON for other languages
        return json.dumps(_tag_non_finite(body), sort_keys=sort_keys, separators=(",", ":"), allow_nan=False)


def _as_json(value: Any) -> Json:
    """A field's value with dictionaries in place of our dataclasses; nothing is copied that need not be."""
    if is_dataclass(value):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, dict):
        return {key: _as_json(inner) if is_dataclass(inner) else inner for key, inner in value.items()}
    return value


def _tag_non_finite(value: Json) -> Json:
    if isinstance(value, dict):
        return {key: _tag_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tag_non_finite(inner) for inner in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else {"$": "float", "value": repr(value)}


def _number(value: Json) -> Json:
    """A number that may have been tagged."""
    return float(value["value"]) if isinstance(value, dict) else value


def _build(body: dict[str, Json], path: str) -> Manifest:
    try:
        best = body.pop("best")
        return Manifest(
            **{
                **body,
                "progress": Progress(**body["progress"]),
                "files": {name: FileEntry(**entry) for name, entry in body["files"].items()},
                "tensors": {name: TensorEntry(**entry) for name, entry in body["tensors"].items()},
                "metrics": {name: _number(value) for name, value in body["metrics"].items()},
                "train_loss": _number(body["train_loss"]),
                "best": Best(**{**best, "value": _number(best["value"])}) if best else None,
            }
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: the manifest lacks or has an unknown field: {error}.", path) from error
