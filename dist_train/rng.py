"""The random generators of a process as plain values, and back: python, numpy, torch and CUDA.

Invariant: capturing draws no number; what is restored draws what the captured ones would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dist_train.tree import decode, encode

Json = Any


def capture_rng() -> dict[str, Json]:
    """State of every random generator that training may draw from in this process."""
    generators: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
        if others := _other_devices():
            generators["cuda_others"] = others
    tensors: dict[str, torch.Tensor] = {}
    plain = {**generators, "python": list(generators["python"]), "numpy": list(generators["numpy"])}
    plain["python"][1] = np.array(plain["python"][1], dtype=np.uint64).astype(np.uint32).tobytes()
    plain["numpy"][1] = plain["numpy"][1].tobytes()
    encoded: dict[str, Json] = encode(plain, "rng", tensors)
    return encoded


def restore_rng(json: Mapping[str, Json]) -> None:
    """Puts back what `capture_rng` saw; a generator that was not captured is left alone."""
    plain = decode(json, _no_tensors)
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(int(word) for word in np.frombuffer(words, dtype=np.uint32)), gauss))
    kind, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(plain["torch"]), dtype=torch.uint8))
    if "cuda" in plain and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(plain["cuda"]), dtype=torch.uint8))
        for index, state in plain.get("cuda_others", {}).items():
            if int(index) < torch.cuda.device_count():
                torch.cuda.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), int(index))


def _other_devices() -> dict[str, bytes]:
    """Generators of GPUs that this process uses besides its own (a model spread over several of them).

    A state is the seed and how many numbers were drawn, 8 bytes each; one that never drew was not used.
    """
    here = torch.cuda.current_device()
    states = {index: torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count()) if index != here}
    return {str(index): state.numpy().tobytes() for index, state in states.items() if state[8:].any()}


def _no_tensors(name: str, device: str) -> torch.Tensor:
    raise AssertionError(f"{name}: RNG state holds no tensors")
