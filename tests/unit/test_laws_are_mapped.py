"""`docs/architecture.md` maps each law to the tests that guard it: every law has one, every one exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "architecture.md"
LAWS = range(1, 11)
REFERENCE = re.compile(r"tests/[\w./-]+?\.py(?:::\w+)*")
LAW_CELL = re.compile(r"^\W*(?:law\s+)?(\d+)\b", re.IGNORECASE)


def references_by_law(text: str) -> dict[int, list[str]]:
    """The test references in each table row whose first cell is, or starts with, the number of a law."""
    found: dict[int, list[str]] = {}
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            continue
        law = LAW_CELL.match(line.strip().strip("|").split("|")[0].strip())
        if law:
            found.setdefault(int(law.group(1)), []).extend(REFERENCE.findall(line))
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def classes_named(name: str) -> list[ast.ClassDef]:
    """Every class of that name in the tests: a contract class may be subclassed in another file."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    return [
        node
        for path in paths
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]


def has_function(body: list[ast.stmt], name: str) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name for node in body)


def has_method(node: ast.ClassDef, name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether the class or one of its bases, found by name, defines the method."""
    if has_function(node.body, name):
        return True
    bases = {base.id if isinstance(base, ast.Name) else getattr(base, "attr", "") for base in node.bases}
    seen |= {node.name}
    return any(has_method(base, name, seen) for base_name in bases - seen for base in classes_named(base_name))


def fault_of_reference(reference: str) -> str | None:
    """Why a reference like tests/unit/test_x.py::TestClass::test_name points at nothing, or None."""
    file, *names = reference.split("::")
    path = ROOT / file
    if not path.is_file():
        return f"{reference}: the file does not exist"
    if not names:
        return f"{reference}: name the test: {file}::test_name"
    body = tree_of(path).body
    if len(names) == 1 and has_function(body, names[0]) and names[0].startswith("test"):
        return None
    if len(names) == 2:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == names[0]]
        if names[1].startswith("test") and any(has_method(node, names[1]) for node in classes):
            return None
    return f"{reference}: {file} has no such test"


@pytest.fixture
def document() -> str:
    assert DOCUMENT.is_file(), f"{DOCUMENT.relative_to(ROOT)} does not exist: it must map each law to its tests"
    return DOCUMENT.read_text(encoding="utf-8")


def test_every_law_has_a_test(document: str) -> None:
    mapped = references_by_law(document)
    bare = [law for law in LAWS if not mapped.get(law)]
    assert not bare, (
        f"laws {bare} name no test: docs/architecture.md needs, for each, a table row that begins with the law's "
        "number and names at least one tests/path/test_x.py::test_name"
    )


def test_every_named_test_exists(document: str) -> None:
    faults = [
        fault for reference in sorted(set(REFERENCE.findall(document))) if (fault := fault_of_reference(reference))
    ]
    assert not faults, "\n".join(faults)


def test_rows_are_read_in_each_usual_form() -> None:
    text = """
| law | tests |
|---|---|
| 1 | `tests/unit/test_a.py::test_x`, `tests/unit/test_a.py::TestB::test_y[case]` |
| **2. Acknowledged means durable** | tests/unit/test_b.py::test_z |
| Law 3 | nothing yet |
4. not a row: tests/unit/test_c.py::test_w
"""
    assert references_by_law(text) == {
        1: ["tests/unit/test_a.py::test_x", "tests/unit/test_a.py::TestB::test_y"],
        2: ["tests/unit/test_b.py::test_z"],
        3: [],
    }


def test_dangling_references_are_faults() -> None:
    here = "tests/unit/test_laws_are_mapped.py"
    assert fault_of_reference(f"{here}::test_dangling_references_are_faults") is None
    for dangling in (here, f"{here}::test_no_such", f"{here}::has_function", "tests/unit/no_such_file.py::test_x"):
        assert fault_of_reference(dangling)
