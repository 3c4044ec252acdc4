"""Model tensors that checkpoints do without: a frozen base that the script loads from elsewhere, a large constant.

Invariant: what is excluded is never written and never filled. That it is the same at every start, and that training
leaves it alone, is checked by digests of its values.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

from dist_train.errors import ConfigError
from dist_train.model_state import clean_name, hidden_buffers, tied_names
from dist_train.optimizer_state import TensorSource
from dist_train.partial import find_idle, matches, plain_name, some

logger = logging.getLogger(__name__)
Json = Any
EXCLUDE = "exclude"
"""Setting that says what was excluded."""
_CHUNK_ELEMENTS = 1 << 24
_NOTHING: Json = {"patterns": [], "tensors": {}}


def absent_names(saved: Json) -> set[str]:
    """Full names of what a checkpoint was saved without; `saved` is `settings["exclude"]`, None without any."""
    return set((saved or _NOTHING)["tensors"])


class Exclusion:
    """What the patterns of `RunOptions.exclude` match in the models as they are now.

    Args:
        models: innermost, by place (`model`, or `model/NAME` for one of several).
        optimizers: innermost.

    Raises:
        ConfigError: a pattern matches nothing, or a parameter that an optimizer trains.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> None:
        self.patterns = tuple(patterns)
        self._models = models
        self._names = {place.removeprefix("model").removeprefix("/") for place in models}
        self.names: set[str] = set()
        """Full names; a tied tensor is excluded when all of its names match."""
        self._digests: dict[str, str | None] = {}
        self._versions: dict[str, int] = {}
        self._told = False
        if patterns:
            self._find({id(p) for one in optimizers.values() for group in one.param_groups for p in group["params"]})
            self._require_untrained(optimizers)

    def _find(self, trained: Collection[int]) -> None:
        everything = self._live()
        plain = {full: self.plain(full) for full in everything}
        if idle := find_idle(self.patterns, plain.values()):
            raise ConfigError(
                f"exclude={self.patterns!r}: {some(idle)} matches no tensor of the model, which has "
                f"{some(plain.values())}. Patterns are those of fnmatch, over the names of its state_dict; of several "
                f"models they begin with the model's name."
            )
        for place, model in self._models.items():
            for group in _groups(model, place):
                matched = [full for full in group if matches(plain[full], self.patterns)]
                if len(matched) == len(group):
                    self.names.update(group)
                elif matched and id(everything[matched[0]]) not in trained:
                    self._warn_of_tied(matched[0], next(full for full in group if full not in matched))
        self._digests = {full: digest(everything[full]) for full in sorted(self.names)}
        self._versions = {full: _version(everything[full]) for full in self.names}

    def _warn_of_tied(self, matched: str, other: str) -> None:
        logger.warning(
            "exclude=%r matches %s, which is tied to %s, and that it does not match: the tensor stays in checkpoints. "
            "Match all of its names to leave it out.",
            self.patterns,
            self.plain(matched),
            self.plain(other),
        )

    def plain(self, full: str) -> str:
        return plain_name(full, self._names)

    def leaves_out(self, full: str, value: Any) -> bool:
        """Whether a tensor that is about to be captured is not to be saved."""
        if full not in self.names:
            return bool(self.patterns) and self._is_extra(full, value)
        if isinstance(value, torch.Tensor) and not self._told:
            self._require_untouched(full, value)
        return True

    def describe(self) -> dict[str, Json]:
        """For a manifest's settings: the patterns, and of each tensor a digest (null where it is sharded, or of a kind
        that has no plain bytes).
        """
        return {EXCLUDE: {"patterns": list(self.patterns), "tensors": self._digests}} if self.patterns else {}

    def compare(self, saved: Json, source: TensorSource) -> list[str]:
        """What people should know of how it differs from the run that saved; a line each.

        Args:
            saved: `settings["exclude"]` of the checkpoint, None where nothing was excluded.
        """
        then = saved or _NOTHING
        notes = []
        if tuple(then["patterns"]) != self.patterns:
            notes.append(
                f"exclude is {self.patterns!r} now and was {tuple(then['patterns'])!r}: {len(self.names)} tensors of "
                f"the model are left out of checkpoints from here on, {len(then['tensors'])} were."
            )
        stored = set(source.names("model/")) | set(source.names("buffer/"))
        self._warn_of_others({full: _digest_then(full, then["tensors"], stored, source) for full in self._digests})
        return notes

    def compare_absent(self, saved: Json) -> list[str]:
        """Where weights alone are loaded: what their checkpoint was saved without stays as it is here."""
        then = saved or _NOTHING
        live = sorted(absent_names(saved) & self._live().keys() - self.names)
        if not live:
            return []
        is_other = self._warn_of_others({full: then["tensors"][full] for full in live})
        unknown = [full for full in live if then["tensors"][full] is None]
        known = "" if is_other or unknown else ", with the values of the training"
        unsure = f"; of {len(unknown)} nobody can tell whether they have the values of the training" if unknown else ""
        return [
            f"{len(live)} tensors are not in the checkpoint, which was saved with exclude={tuple(then['patterns'])!r}, "
            f"and stay as they are in the model{known}: {some(map(self.plain, live))}{unsure}."
        ]

    def _warn_of_others(self, then: Mapping[str, str | None]) -> bool:
        """Where values are not those of the run that saved; None of those is not known."""
        live = self._live() if then else {}
        now = {full: self._digests.get(full) or digest(live[full]) for full, one in then.items() if one is not None}
        others = sorted(self.plain(full) for full, one in now.items() if one not in (None, then[full]))
        if others:
            logger.warning(
                "%d tensors that are not in checkpoints do not have the values that they had in the run that saved "
                "(%s): the checkpoint belongs to another base. Load the base that it was trained with.",
                len(others),
                some(others),
            )
        return bool(others)

    def _live(self) -> dict[str, torch.Tensor]:
        return {full: value for place, model in self._models.items() for full, value in _tensors(model, place)}

    def _is_extra(self, full: str, value: Any) -> bool:
        """What an excluded module returns from get_extra_state goes with its tensors."""
        is_extra = not isinstance(value, torch.Tensor) or full.endswith("_extra_state")
        return is_extra and matches(self.plain(full), self.patterns)

    def _require_untrained(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        held = {id(p) for one in optimizers.values() for group in one.param_groups for p in group["params"]}
        trained = [
            self.plain(full)
            for place, model in self._models.items()
            for key, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in held and (full := f"{place}/{clean_name(key)}") in self.names
        ]
        if trained:
            raise ConfigError(
                f"exclude={self.patterns!r} matches {some(trained)}, which an optimizer trains: no checkpoint would "
                f"hold what it learns. Narrow the pattern, or make the optimizer of the other parameters alone."
            )

    def _require_untouched(self, full: str, value: torch.Tensor) -> None:
        """Says it once where training changes what no checkpoint holds (BatchNorm's statistics, a moving teacher)."""
        before, version = self._digests.get(full), _version(value)
        if before is None or version == self._versions[full]:
            return
        self._versions[full] = version
        if digest(value) != before:
            self._told = True
            logger.warning(
                "%s is excluded, and training has changed it: no checkpoint holds that, so a resume will not be exact. "
                "Take it out of exclude=%r, or leave it unchanged (a frozen module belongs in eval mode).",
                self.plain(full),
                self.patterns,
            )


def _tensors(model: nn.Module, place: str) -> list[tuple[str, torch.Tensor]]:
    named = [(f"{place}/{name}", value) for names, value in tied_names(model) for name in names]
    return [*named, *((f"buffer/{place}/{name}", value) for name, value in hidden_buffers(model))]


def _groups(model: nn.Module, place: str) -> list[list[str]]:
    """Full names of each tensor; a tied one has several."""
    hidden = [[f"buffer/{place}/{name}"] for name, _ in hidden_buffers(model)]
    return [[f"{place}/{name}" for name in names] for names, _ in tied_names(model)] + hidden


def _digest_then(full: str, then: Mapping[str, str | None], stored: set[str], source: TensorSource) -> str | None:
    """Of the values when the checkpoint was saved, whether it was excluded then or lies there; None: not known."""
    return digest(source.create(full, torch.device("cpu"))) if full in stored else then.get(full)


def _version(tensor: torch.Tensor) -> int:
    """Counts what is done to it in place."""
    return 0 if tensor.is_inference() else tensor._version


def digest(tensor: torch.Tensor) -> str | None:
    """xxh3-128 of dtype, shape and bytes in row-major order; a device's memory is read in pieces. None where it is
    sharded, or of a kind that has no plain bytes.
    """
    if isinstance(tensor, DTensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    running = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    for piece in flat.split(_CHUNK_ELEMENTS) if flat.numel() else ():
        running.update(piece.cpu().view(torch.uint8).numpy())
    return running.hexdigest()
