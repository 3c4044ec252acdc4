"""How two checkpoints differ: what their manifests say, and their tensors, bit by bit.

    compare_manifests (plain values) ; compare_tensors (streamed, one tensor and a few chunks in memory at a time)

Invariant: equal means equal bits: a NaN equals the same NaN, -0.0 is not 0.0. How far numbers lie apart is computed in
float64 over the elements that are finite on both sides. Changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dist_train.checkpoint.manifest import Manifest, TensorEntry
from dist_train.checkpoint.reader import CheckpointReader

Json = Any
Kind = Literal["equal", "differ", "shape", "dtype", "only in a", "only in b"]
CHUNK_ELEMENTS = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOT_SAID = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """One tensor of two checkpoints; the numbers are set where both have it in the same shape and dtype."""

    name: str
    kind: Kind
    a: TensorEntry | None
    b: TensorEntry | None
    elements: int = 0
    differing: int = 0
    """Elements whose bits differ."""
    not_finite: int = 0
    """Those of them where a NaN or an infinity is on one side or on both."""
    max_abs: float = 0.0
    """Largest absolute difference of finite elements."""
    relative: float = 0.0
    """L2 norm of the difference, divided by that of a; infinite where a is zero."""

    @property
    def rank(self) -> float:
        """How much it differs, for the order: what cannot be compared comes first."""
        return self.relative if self.kind == "differ" and not self.not_finite else math.inf


def compare_tensors(
    a: CheckpointReader,
    b: CheckpointReader,
    tables: tuple[Manifest, Manifest],
    on_bytes: Callable[[int], None],
    *,
    weights_only: bool = False,
) -> Iterator[TensorDifference]:
    """Every tensor that either has, in the order of a's table."""
    first, second = (_table(manifest) for manifest in tables)
    for name in dict.fromkeys([*tables[0].tensors, *tables[1].tensors]):
        if weights_only and not is_weight(name):
            continue
        one, other = first.get(name), second.get(name)
        if one is None or other is None:
            yield TensorDifference(name=name, kind="only in b" if one is None else "only in a", a=one, b=other)
        elif one.shape != other.shape or one.dtype != other.dtype:
            yield TensorDifference(name=name, kind="shape" if one.shape != other.shape else "dtype", a=one, b=other)
        else:
            yield _compare(name, one, other, a.view(name), b.view(name))
        for reader, entry in ((a, one), (b, other)):
            if entry is not None:
                on_bytes(reader.forget(name))


def is_weight(name: str) -> bool:
    """Parameters and buffers; not the optimizer's state nor what was registered."""
    return name.startswith(("model/", "buffer/", "rank-"))


def _table(manifest: Manifest) -> dict[str, TensorEntry]:
    """Tied names too: a tensor may be tied in one of two checkpoints."""
    tied = {name: manifest.tensors[stored] for name, stored in manifest.aliases.items()}
    return {**manifest.tensors, **tied}


def _compare(name: str, one: TensorEntry, other: TensorEntry, a: torch.Tensor, b: torch.Tensor) -> TensorDifference:
    """In chunks; a tensor that is equal costs no more than reading it."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    starts = range(0, flat_a.numel(), CHUNK_ELEMENTS)
    pairs = ((flat_a[start : start + CHUNK_ELEMENTS], flat_b[start : start + CHUNK_ELEMENTS]) for start in starts)
    differing = not_finite = 0
    max_abs = square = norm = 0.0
    for part_a, part_b in pairs:
        norm += _square_norm(part_a)
        mask = _bits(part_a) != _bits(part_b)
        count = int(mask.sum())
        if not count:
            continue
        differing += count
        x, y = (_wide(_bits(part)[mask].view(part.dtype)) for part in (part_a, part_b))
        finite = torch.isfinite(x) & torch.isfinite(y)
        not_finite += count - int(finite.sum())
        gap = (x - y).abs()[finite]
        if not (a.is_floating_point() or a.is_complex()):
            gap = gap.clamp(min=1.0)  # integers beyond 2**53, which float64 cannot tell apart
        if gap.numel():
            max_abs = max(max_abs, float(gap.max()))
            square += float(gap.square().sum())
    return TensorDifference(
        name=name,
        kind="differ" if differing else "equal",
        a=one,
        b=other,
        elements=flat_a.numel(),
        differing=differing,
        not_finite=not_finite,
        max_abs=max_abs,
        relative=_relative(max_abs, square, norm),
    )


def _relative(max_abs: float, square: float, norm: float) -> float:
    """Where squares are too small or too large for float64, the largest difference stands for all of them."""
    if max_abs == 0 or norm == 0:
        return math.inf if max_abs else 0.0
    far = math.sqrt(square) if 0 < square < math.inf else max_abs
    return far / math.sqrt(norm)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: what there are kernels for whatever the dtype, and NaN equals itself."""
    return values.view(_BITS[values.element_size()])


def _wide(values: torch.Tensor) -> torch.Tensor:
    """float64, or complex128."""
    if values.is_complex():
        return values.to(torch.complex128)
    narrow = values.is_floating_point() and values.element_size() == 1
    return (values.float() if narrow else values).double()


def _square_norm(values: torch.Tensor) -> float:
    wide = _wide(values).abs()
    return float(wide[torch.isfinite(wide)].square().sum())


# What the manifests say


def compare_manifests(a: Manifest, b: Manifest) -> dict[str, dict[str, tuple[Json, Json]]]:
    """Differences of plain values by section: place -> (in a, in b); None is what one side does not have.

    Who wrote a checkpoint and when (run, attempt, sequence, time) is no difference.
    """
    sides = [_sections(manifest) for manifest in (a, b)]
    return {
        section: {
            place: (sides[0][section].get(place), sides[1][section].get(place))
            for place in dict.fromkeys([*sides[0][section], *sides[1][section]])
            if _differ(sides[0][section].get(place, _NOT_SAID), sides[1][section].get(place, _NOT_SAID))
        }
        for section in sides[0]
    }


def _sections(manifest: Manifest) -> dict[str, dict[str, Json]]:
    progress = {name: getattr(manifest.progress, name) for name in manifest.progress.__slots__}
    settings = {name: value for name, value in manifest.settings.items() if name != "stripped_from"}
    rng = [json.get("rng") for json in manifest.rank_state]
    return {
        "progress": progress,
        "metrics": {"train loss": manifest.train_loss, **manifest.metrics},
        "settings": dict(_leaves(settings, "")),
        "environment": {**dict(_leaves(manifest.environment, "")), "world_size": manifest.world_size},
        "state": {**dict(_leaves(manifest.state, "")), "random generators": rng},
    }


def _leaves(value: Json, place: str) -> Iterator[tuple[str, Json]]:
    """Plain values by their place; tensors are compared elsewhere."""
    if isinstance(value, Mapping) and "$" not in value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}/{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}/{index}")
    elif isinstance(value, Mapping) and value["$"] in ("tuple", "set", "frozenset"):
        yield from _leaves(value["items"], place)
    elif isinstance(value, Mapping) and value["$"] == "float":
        yield place, float(value["value"])
    elif not (isinstance(value, Mapping) and value["$"] in ("tensor", "ndarray")):
        yield place, value


def _differ(one: Json, other: Json) -> bool:
    both_nan = one != one and other != other
    return bool(one is _NOT_SAID or other is _NOT_SAID or one != other) and not both_nan
