"""The GPUs of this machine, counted without CUDA: a process that has called cuInit cannot fork workers that use it.

Invariant: asks nvidia-smi, and answers "none" where it is not there.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

BF16_CAPABILITY = (8, 0)
"""Compute capability from which on bf16 is native; a T4 has 7.5, a P100 6.0."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    name: str
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        return self.capability >= BF16_CAPABILITY


def find_gpus() -> tuple[Gpu, ...]:
    """As nvidia-smi names them, those hidden by CUDA_VISIBLE_DEVICES left out; without it there are none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = tuple(_parse_gpu(line) for line in said.splitlines() if line.strip())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else gpus[: len([one for one in visible.split(",") if one.strip()])]


def _parse_gpu(line: str) -> Gpu:
    name, _, capability = line.rpartition(",")
    major, _, minor = capability.strip().partition(".")
    return Gpu(name.strip(), (int(major), int(minor or 0)) if major.isdecimal() else (0, 0))
