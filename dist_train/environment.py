"""What exact resume depends on besides the checkpoint: recorded in every manifest, compared at every resume.

A difference is a warning, never silence and never an error.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from typing import Any

import torch

Json = Any
_PACKAGES = ("torch", "accelerate", "numpy", "safetensors", "dist-train")


def describe_environment(world_size: int, device: torch.device, precision: str = "no") -> dict[str, Json]:
    """World size, versions, threads, device, mixed precision and CPU capability of this process."""
    described: dict[str, Json] = {
        "world_size": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "mixed_precision": precision,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        described["cuda"] = torch.version.cuda
        described["cudnn"] = torch.backends.cudnn.version()
        described["tf32"] = _is_tf32_allowed()
    return {**described, **{name: version for name in _PACKAGES if (version := _version(name))}}


def compare_environments(then: dict[str, Json], now: dict[str, Json]) -> list[str]:
    """One line for each difference that may change bits."""
    keys = [key for key in now if key in then and then[key] != now[key]]
    return [f"{key} was {then[key]!r} and is {now[key]!r}" for key in keys]


def inexact_reasons(device: torch.device) -> list[str]:
    """What makes an exact resume impossible here, said at start."""
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return ["deterministic algorithms are off (torch.use_deterministic_algorithms(True) turns them on)"]
    return []


def _is_tf32_allowed() -> bool:
    """Since torch 2.9 a script may say it in either of two ways, and reading the old one fails after the new one."""
    matmul = torch.backends.cuda.matmul
    try:
        return bool(matmul.allow_tf32)
    except RuntimeError:
        return "tf32" in (matmul.fp32_precision, getattr(torch.backends, "fp32_precision", ""))


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
