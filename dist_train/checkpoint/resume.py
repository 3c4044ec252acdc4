"""Which checkpoint is meant, and which to resume from: pure choices among what was found.

    latest | best | epoch:N | step:N | path     a Selector, for people: show, export, load_model, and to branch from
    auto | must | never | a Selector            a ResumeRequest

Invariant: newest means the highest sequence, never the highest step. Verification and loading live elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dist_train.checkpoint.catalog import Found, committed
from dist_train.checkpoint.manifest import Manifest, parse_step_name
from dist_train.checkpoint.retention import select_best
from dist_train.errors import ConfigError, NoCheckpointError

SELECTORS: Final = "latest, best, epoch:10, step:1200 or the path of a checkpoint folder"


@dataclass(frozen=True, slots=True)
class Selector:
    """Names one checkpoint of a run; `number` is set for epoch and step, `path` for path."""

    kind: Literal["latest", "best", "epoch", "step", "path"]
    number: int = -1
    path: str = ""

    @staticmethod
    def parse(text: str) -> Selector:
        """Any text that is not one of the words is a path.

        Raises:
            ConfigError: no text, or no number after `epoch:` or `step:`.
        """
        kind, colon, digits = text.partition(":")
        if text in ("latest", "best"):
            return Selector("best" if text == "best" else "latest")
        if colon and kind in ("epoch", "step"):
            if not digits.isdecimal() or not digits.isascii():
                raise ConfigError(f"{text!r} is no checkpoint; write {SELECTORS}.")
            return Selector("epoch" if kind == "epoch" else "step", int(digits))
        if not text:
            raise ConfigError(f"An empty text names no checkpoint; write {SELECTORS}.")
        return Selector("path", path=text)


def select_named(selector: Selector, found: Sequence[Found]) -> Found | None:
    """The newest checkpoint that a selector other than a path names; one that cannot be used where no other does."""
    usable = sorted((one for one in found if one.manifest), key=_sequence)
    if selector.kind == "best":
        return _best(usable)
    named = [one for one in usable if one.manifest and is_named(selector, one.manifest)]
    broken = [one for one in found if one.manifest is None and selector.kind == "step"]
    broken = [one for one in broken if parse_step_name(one.path.rsplit("/", 1)[-1]) == selector.number]
    return next(iter([*reversed(named), *broken]), None)


def is_named(selector: Selector, manifest: Manifest) -> bool:
    progress = manifest.progress
    if selector.kind == "epoch":
        return progress.epochs_completed == selector.number and progress.samples_into_epoch == 0
    return selector.kind == "latest" or progress.global_step == selector.number


def _best(usable: Sequence[Found]) -> Found | None:
    """Which metric is monitored, and in which direction, the newest checkpoint says."""
    known = committed(usable)
    best = known[-1][1].best if known else None
    chosen = select_best(known, best.monitor, best.mode, 1) if best else []
    return next((one for one in usable if chosen and one.manifest is chosen[0][1]), None)


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """What the user asked for; `selector` is set for kind "branch"."""

    kind: Literal["auto", "must", "never", "branch"]
    text: str = ""
    """As the user wrote it: the same text continues the branch that it has started."""
    selector: Selector | None = None

    @staticmethod
    def parse(text: str) -> ResumeRequest:
        """`auto`, `must`, `never`, or a selector, to which `#label` gives a branch of its own."""
        kinds: dict[str, Literal["auto", "must", "never"]] = {"auto": "auto", "must": "must", "never": "never"}
        if text in kinds:
            return ResumeRequest(kinds[text], text)
        before, mark, label = text.rpartition("#")
        if mark and before and not label:
            raise ConfigError(
                f"resume={text!r} has no label after the #; write for instance {text + 'b'!r}, which starts a branch "
                f"there once more, or {before!r}."
            )
        named = before if mark and "/" not in label else text  # a folder's name may have a # of its own
        if named == "best" or named.startswith(("epoch:", "step:", "step-")) or "/" in named:
            return ResumeRequest("branch", text, Selector.parse(named))
        raise ConfigError(
            f"resume={text!r} is not known; give 'auto', 'must' or 'never', or start a branch with 'best', 'epoch:10', "
            f"'step:1200' or the path of a checkpoint."
        )


def select_candidates(request: ResumeRequest, found: Sequence[Found], run_dir: str) -> list[Found]:
    """Checkpoints to try, best first. Empty means a fresh start.

    Raises:
        ConfigError: "never", and the directory holds checkpoints that would be overwritten.
        NoCheckpointError: "must", and there is none.
    """
    usable = sorted((one for one in found if one.manifest), key=_sequence, reverse=True)
    if request.kind == "never" and found:
        raise ConfigError(
            f"resume='never', but {run_dir} holds {len(found)} checkpoints, the newest is {found[-1].path}. "
            f"Give another run_dir, or resume='auto' to continue them."
        )
    if request.kind == "must" and not usable:
        raise NoCheckpointError(no_checkpoint_message(run_dir, found))
    return usable


def no_checkpoint_message(run_dir: str, found: Sequence[Found]) -> str:
    """One paragraph that says why nothing can be resumed."""
    problems = " ".join(str(one.problem) for one in found if one.problem)
    return (
        f"resume='must', but {run_dir} holds no checkpoint that can be used. {problems} "
        f"Check the run directory, or give resume='auto' to start from the beginning."
    )


def relabelled(text: str) -> str:
    """The request that starts a branch from the same checkpoint once more."""
    return f"{text}2" if "#" in text.rpartition("/")[2] else f"{text}#b"


def not_found_message(
    text: str, selector: Selector, run_dir: str, found: Sequence[Found], elsewhere: Sequence[str] = ()
) -> str:
    """One paragraph that says why a selector names nothing, and what there is.

    Args:
        elsewhere: paths of checkpoints that it would name, had no branch left them behind.
    """
    usable = [manifest for _, manifest in committed(sorted(found, key=_sequence))]
    if not usable:
        problems = "".join(f" {one.problem}" for one in found if one.problem)
        what = "no checkpoint that can be used." if found else "no checkpoint yet: none was ever committed there."
        return f"{run_dir} holds {what}{problems} Check that this is the run you mean, or let it train on."
    if selector.kind == "best":
        return (
            f"{run_dir} holds no best checkpoint: no monitored metric is recorded in its {len(usable)} checkpoints "
            f"(metrics are what the loop gives to end_epoch). Choose latest, epoch:N or step:N."
        )
    done = [m.progress.epochs_completed for m in usable if m.progress.samples_into_epoch == 0]
    if selector.kind == "step":
        there = f"those of step {_some(_steps(usable))}"
        most, far = max(_steps(usable)), "step"
    else:
        there = f"those after epoch {_some(done)}" if done else "none that was saved at an epoch's end"
        most, far = max(m.progress.epochs_completed for m in usable), "the end of epoch"
    if elsewhere:
        more = f" A branch has left it behind as {_some(elsewhere)}: give that path."
    elif selector.number > most:
        more = f" It has not been trained beyond {far} {most}."
    elif selector.kind == "epoch":
        more = " The policy decides which epochs stay: CheckpointPolicy(keep_every_epochs=5) keeps every fifth."
    else:
        more = ""
    return f"{run_dir} holds no checkpoint for {text}; it holds {there}.{more}"


def _steps(usable: Sequence[Manifest]) -> list[int]:
    return [manifest.progress.global_step for manifest in usable]


def _some(those: Sequence[object]) -> str:
    texts = [str(one) for one in dict.fromkeys(those)]
    return ", ".join(texts if len(texts) <= 6 else [texts[0], "...", *texts[-4:]])


def _sequence(one: Found) -> int:
    return one.manifest.sequence if one.manifest else -1
