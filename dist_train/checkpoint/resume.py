"""Which checkpoint to resume from: a pure choice among what was found. Verification and loading live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.checkpoint.catalog import Found
from dist_train.errors import ConfigError, NoCheckpointError


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """What the user asked for; `path` is set for kind "path"."""

    kind: Literal["auto", "must", "never", "path"]
    path: str = ""

    @staticmethod
    def parse(text: str) -> ResumeRequest:
        """`auto`, `must`, `never` or the path of a checkpoint folder."""
        kinds: dict[str, Literal["auto", "must", "never"]] = {"auto": "auto", "must": "must", "never": "never"}
        if text in kinds:
            return ResumeRequest(kinds[text])
        if "/" in text or text.startswith("step-"):
            return ResumeRequest("path", text)
        raise ConfigError(f"resume={text!r} is not known; give 'auto', 'must', 'never' or the path of a checkpoint.")


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


def _sequence(one: Found) -> int:
    return one.manifest.sequence if one.manifest else -1
