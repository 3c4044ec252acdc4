"""Settings that every test needs, made before torch is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, by the first import of torch; inherited by child processes

import pytest
from hypothesis import settings

# A slow CI core must not fail an example by its duration; each test has pytest's own timeout.
settings.register_profile("dist_train", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("dist_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the `gpu` tests without a CUDA device; torch is imported only when there is such a test."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))
