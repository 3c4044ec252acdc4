"""docs/gpu-results.md names every test of tests/gpu, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/gpu-results.md").read_text(encoding="utf-8")


def test_the_page_names_every_test_that_runs_on_a_gpu() -> None:
    files = sorted((ROOT / "tests/gpu").glob("test_*.py"))
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    table = PAGE.split("## What the tests cover")[1].split("\n## ")[0]
    named = set(re.findall(r"`(?:\w+\.py::)?(test_\w+)`", table))
    assert named == tests
    assert {f"{file.name}::" for file in files} == set(re.findall(r"test_\w+\.py::", table))


def test_a_test_without_a_twin_needs_a_gpu_by_its_mark() -> None:
    """What the page says of [gpu] and [both] is what the marks say."""
    rows = re.findall(r"^\| \[(gpu|both)\].*?`(test_\w+\.py)::(\w+)`", PAGE, re.MULTILINE)
    assert {kind for kind, _, _ in rows} == {"gpu", "both"}
    for kind, file, name in rows:
        source = (ROOT / "tests/gpu" / file).read_text()
        marked = "pytestmark = pytest.mark.gpu" in source or f"@pytest.mark.gpu\ndef {name}(" in source
        assert marked == (kind == "gpu"), name
