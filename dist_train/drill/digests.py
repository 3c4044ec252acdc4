"""Short digests of what a step depends on: batches, random generators, weights, and what lies about in the script.

Invariant: taking one changes nothing, and equal digests mean equal bits (64 of them, against chance). torch is imported
when the first one is taken: the script decides when that is.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from types import FrameType
from typing import Any, Final

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MOST_ITEMS: Final = 1000
_MOST_ELEMENTS: Final = 1 << 20
_MOST_FRAMES: Final = 6
_SHOWN: Final = 40
_NOT_THE_SCRIPTS: Final = ("dist_train", "torch", "accelerate", "runpy", "contextlib", "builtins", "numpy")


def digest_of(value: Any) -> str:
    """Of tensors, arrays, plain values and containers of them; of anything else its type alone."""
    import xxhash

    hasher = xxhash.xxh3_64()
    for part in _parts(value):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield _bytes_of(value)
    elif numpy is not None and isinstance(value, numpy.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield repr(value.tolist()).encode() if value.dtype == object else numpy.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        yield b"{"
        for key, inner in value.items():
            yield repr(key).encode()
            yield from _parts(inner)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield b"["
        for inner in value:
            yield from _parts(inner)
    elif isinstance(value, Set):
        yield repr(sorted(map(repr, value))).encode()
    else:
        yield (repr(value) if isinstance(value, _PLAIN) else type(value).__name__).encode()


def _bytes_of(tensor: Any) -> memoryview:
    import torch

    local = getattr(tensor, "_local_tensor", tensor).detach()  # of a sharded one, this rank's part
    if local.layout is not torch.strided:
        local = local.to_dense()
    flat = local.contiguous().reshape(-1).cpu()
    return memoryview(flat.view(torch.uint8).numpy())


def digests_of_generators() -> dict[str, str]:
    """Of python's, numpy's and torch's, and the present GPU's, by the names that a checkpoint gives them."""
    import numpy as np
    import torch

    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: digest_of(state) for name, state in states.items()}


def digests_of_models(models: Mapping[str, Any]) -> dict[str, str]:
    """Each parameter and buffer by the name that its checkpoint gives it, more or less: without wrappers."""
    found = {}
    for model_name, model in models.items():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            plain = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
            found[f"{model_name}.{plain}" if model_name else plain] = digest_of(value)
    return found


# What lies about in the script


def surroundings(known: Sequence[Any]) -> dict[str, str]:
    """Variables of the script's functions that are running now, and of its module: name -> a value or a digest.

    Args:
        known: objects that the checkpoint holds; nothing is said of them.
    """
    skipped = {id(one) for one in known}
    found: dict[str, str] = {}
    for frame in _frames_of_script():
        for name, value in {**_plain_globals(frame), **frame.f_locals}.items():
            if not name.startswith("_") and id(value) not in skipped and name not in found:
                found.update(_told(name, value, skipped))
    return found


def _frames_of_script() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None and count < _MOST_FRAMES:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in _NOT_THE_SCRIPTS and not frame.f_code.co_filename.startswith("<"):
            count += 1
            yield frame
        frame = frame.f_back


def _plain_globals(frame: FrameType) -> dict[str, Any]:
    return {name: value for name, value in frame.f_globals.items() if not callable(value) or hasattr(value, "__dict__")}


def _told(name: str, value: Any, skipped: set[int], deep: bool = True) -> dict[str, str]:
    """Of an object of the script's own class, its attributes one level down."""
    if isinstance(value, (str, bytes)) and len(value) > _MOST_ITEMS:
        return {}
    if isinstance(value, _PLAIN):
        return {name: repr(value)[:_SHOWN]}
    if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        try:
            return {name: f"{type(value).__name__} {digest_of(value.state_dict())[:6]}"}
        except Exception:  # it is only looked at
            return {}
    if isinstance(value, (list, tuple, dict, set, frozenset)) or type(value).__name__ in ("deque", "Counter"):
        plain = len(value) <= _MOST_ITEMS and all(isinstance(one, _PLAIN) for one in value)
        values = list(value.values()) if isinstance(value, dict) else []
        if plain and all(isinstance(one, _PLAIN) for one in values):
            return {name: repr(value) if len(repr(value)) <= _SHOWN else f"{len(value)} items, {digest_of(value)[:6]}"}
        return {}
    if _is_small_array(value):
        return {name: f"{type(value).__name__} {digest_of(value)[:6]}"}
    own = type(value).__module__.partition(".")[0]
    if deep and hasattr(value, "__dict__") and own not in (*_NOT_THE_SCRIPTS, "argparse", "collections", "typing"):
        inner: dict[str, str] = {}
        for key, one in vars(value).items():
            if not key.startswith("__") and id(one) not in skipped and not callable(one):
                inner.update(_told(f"{name}.{key}", one, skipped, deep=False))
        return inner
    return {}


def _is_small_array(value: Any) -> bool:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return not value.requires_grad and bool(value.numel() <= _MOST_ELEMENTS)
    return numpy is not None and isinstance(value, numpy.ndarray) and bool(value.size <= _MOST_ELEMENTS)
