"""The names that users see, what importing them costs, and law 8 on the syntax trees: no wait without a deadline."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_train as dt
from tests.support.launch import environment

PACKAGE = Path(dt.__file__).parent
# No wait may be without a deadline but these: "file:function" -> why it cannot be for ever.
ALLOWED = {
    "checkpoint/writer.py:Writer._work": "the thread's rest between saves: `close` sends None, and it is a daemon",
    "checkpoint/writer.py:Writer.run": "`Writer.join` of its own, which has a deadline",
    "checkpoint/writer.py:Writer.close": "`Writer.join` of its own, which has a deadline",
    "boundary.py:Boundary.wait_for_save": "`Checkpointer.wait`, which is `Writer.join`",
    "drill/injector.py:Injector._do": "`Checkpointer.wait`, which is `Writer.join`",
    "world.py:_StoreMailbox.take": "`get` after `wait` with a deadline: the key is there",
    "joining.py:_lead": "`get` after `check`: the keys are there",
    "joining.py:_follow": "`get` after `check`: the key is there",
    "joining.py:_acknowledged": "`get` after `check`: the key is there",
    "cluster/peers.py:Peers._read": "`get` after `check`: the key is there",
}


@pytest.mark.parametrize("name", dt.__all__)
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    found = getattr(dt, name)
    assert found.__name__ == name
    assert inspect.getdoc(found)


def test_the_public_names_are_those_that_are_listed_once() -> None:
    assert len(dt.__all__) == len(set(dt.__all__))
    assert set(dt.__all__) == set(dt._HOMES)
    assert set(dt.__all__) <= set(dir(dt))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dist_train' has no attribute 'Trainor'"):
        dt.Trainor  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import dist_train, sys; print([name for name in ('torch', 'numpy', 'accelerate') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


# Law 8

WAITS = {"wait", "wait_for", "join", "take", "get"}
LONG_LIVED = ("store", "_store", "_jobs", "queue", "_queue", "_mailbox", "mailbox")


def waits_without_a_deadline(source: str) -> list[tuple[str, int]]:
    """(function, line) of each call that may wait for ever, as far as a syntax tree can tell."""
    return [(function, call.lineno) for function, call in calls_of(ast.parse(source)) if may_wait_for_ever(call)]


def calls_of(node: ast.AST, scope: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        inner = (*scope, child.name) if named else scope  # type: ignore[attr-defined]
        if isinstance(child, ast.Call):
            yield ".".join(inner), child
        yield from calls_of(child, inner)


def may_wait_for_ever(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in WAITS:
        return False
    if any(word.arg and "timeout" in word.arg for word in call.keywords):
        return False
    method, given = call.func.attr, len(call.args)
    receiver = ast.unparse(call.func.value).rsplit(".", 1)[-1]
    if method == "join":  # of a thread; of strings and paths it has arguments
        return given == 0
    if method == "get":  # of a queue or a store; of a dictionary it has a key
        return given == 0 or receiver in LONG_LIVED
    if method == "wait" and receiver in LONG_LIVED:  # a store's: keys, then the deadline
        return given < 2
    return given < (2 if method in ("take", "wait_for") else 1)


def test_every_wait_of_the_package_has_a_deadline() -> None:
    """Law 8. Collectives have the deadline of their group, which `init_distributed` and `TorchWorld` give."""
    found = {
        f"{path.relative_to(PACKAGE)}:{function}": line
        for path in sorted(PACKAGE.rglob("*.py"))
        for function, line in waits_without_a_deadline(path.read_text())
    }
    faults = [f"{place} (line {line})" for place, line in found.items() if place not in ALLOWED]
    assert not faults, f"give a timeout, or a reason in ALLOWED: {faults}"


def test_the_list_of_exceptions_has_no_dead_entries() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{function}"
        for path in PACKAGE.rglob("*.py")
        for function, _ in waits_without_a_deadline(path.read_text())
    }
    assert sorted(set(ALLOWED) - found) == []


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("event.wait()", True),
        ("event.wait(5)", False),
        ("event.wait(timeout=5)", False),
        ("thread.join()", True),
        ("thread.join(timeout=CLOSE_SECONDS)", False),
        ("', '.join(names)", False),
        ("os.path.join(a, b)", False),
        ("self._jobs.get()", True),
        ("self._jobs.get(timeout=1)", False),
        ("settings.get('a')", False),
        ("self._store.get(key)", True),
        ("store.wait([key])", True),
        ("store.wait([key], timedelta(seconds=1))", False),
        ("condition.wait_for(predicate)", True),
        ("condition.wait_for(predicate, 5)", False),
        ("mailbox.take(key)", True),
        ("mailbox.take(key, 5.0)", False),
    ],
)
def test_the_scan_tells_waits_apart(call: str, fault: bool) -> None:
    assert bool(waits_without_a_deadline(f"def function():\n    {call}")) is fault
