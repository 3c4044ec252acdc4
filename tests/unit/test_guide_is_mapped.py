"""`docs/guide.md`: every row of its tables names a test, and every one exists."""

from __future__ import annotations

import pytest

from tests.unit.test_laws_are_mapped import REFERENCE, ROOT, fault_of_reference

DOCUMENT = ROOT / "docs" / "guide.md"
SECTIONS = {
    "What is saved, and when": 6,
    "Resuming": 5,
    "Use cases": 4,
    "Downloading": 3,
    "Disk space": 4,
    "Monitoring": 4,
    "Best practices": 5,
    "Troubleshooting": 3,
}
"""Headings of the guide's chapters and how many items of each must be in the table at the least."""


def rows_by_section() -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    section = ""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| item"):
            rows.setdefault(section, []).append(line)
    return rows


@pytest.mark.parametrize(("section", "items"), SECTIONS.items(), ids=SECTIONS)
def test_every_item_of_the_guide_has_a_row(section: str, items: int) -> None:
    assert len(rows_by_section().get(section, [])) >= items


def test_every_row_names_a_test_that_exists() -> None:
    faults = []
    for rows in rows_by_section().values():
        for row in rows:
            found = REFERENCE.findall(row.rsplit("|", 2)[1])
            faults += [fault for one in found if (fault := fault_of_reference(one))] if found else [f"no test: {row}"]
    assert not faults, "\n".join(faults)
