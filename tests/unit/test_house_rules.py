"""The map of `docs/architecture.md`, enforced on the syntax trees. A module not written yet is no error."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dist_train"
NAME = PACKAGE.name

# Modules are named without the package: "run", "checkpoint.store", "checkpoint" (the room's __init__), "" (the root's).
ROOMS = {"checkpoint", "health", "cluster", "drill"}
ERRORS, GROUND, PARTS, RUN, TRAINER, TOP = range(6)
LEVEL_OF_MODULE = {
    "errors": ERRORS,
    "field_docs": ERRORS,
    "units": GROUND,
    "world": GROUND,
    "joining": GROUND,
    "lost": GROUND,
    "phases": GROUND,
    "launched": GROUND,
    "connections": GROUND,
    "checkpoint.manifest": GROUND,
    "checkpoint.store": GROUND,
    "checkpoint.catalog": GROUND,  # the one definition of "committed", which resume and retention share
    "checkpoint.ownership": GROUND,
    "checkpoint.policy": GROUND,
    "checkpoint.resume": GROUND,
    "checkpoint.retention": GROUND,
    "checkpoint.parents": GROUND,
    "tree": PARTS,
    "tagged": PARTS,
    "each_rank": PARTS,
    "tied": PARTS,
    "capture": PARTS,
    "state": PARTS,
    "model_state": PARTS,
    "optimizer_state": PARTS,
    "local_state": PARTS,
    "partial": PARTS,
    "exclusion": PARTS,
    "registered": PARTS,
    "rate_meter": PARTS,
    "rates": PARTS,
    "pairing": PARTS,
    "buffers": PARTS,
    "generators": PARTS,
    "open_window": PARTS,
    "scheduler_state": PARTS,
    "schedule": PARTS,
    "fingerprints": PARTS,
    "rng": PARTS,
    "order": PARTS,
    "places": PARTS,
    "data": PARTS,
    "metrics": PARTS,
    "environment": PARTS,
    "differences": PARTS,
    "replicas": PARTS,
    "fully_sharded": PARTS,
    "sharding": RUN,  # beside `run`: both know Accelerate
    "agreement": PARTS,
    "feed": PARTS,
    "console": PARTS,
    "history": PARTS,
    "goodput": PARTS,
    "time_ledger": PARTS,
    "tracking": PARTS,
    "wandb_file": PARTS,
    "reporter": PARTS,
    "progress": PARTS,
    "options": PARTS,
    "beginning": PARTS,
    "boundary": PARTS,
    "callbacks": PARTS,
    "ending": PARTS,
    "evaluation": PARTS,
    "intake": PARTS,
    "ledger": PARTS,
    "construction": PARTS,
    "recovery": PARTS,
    "registering": PARTS,
    "misuse": PARTS,
    "unsaved": PARTS,
    "monitoring": PARTS,
    "standing": PARTS,
    "user_loader": PARTS,
    "run": RUN,
    "trainer": TRAINER,
    "cli": TOP,
    "__main__": TOP,
    "": TOP,  # lazy public names; nothing inside the package may import them
}
LEVEL_OF_ROOM = {"checkpoint": PARTS, "health": PARTS, "cluster": PARTS, "drill": TOP, "commands": TOP}
NOT_FOR_TRAINING_CODE = {"cluster", "drill"}
CLI_MAY_IMPORT = {
    "errors",
    "units",
    "launched",
    "console",
    "history",
    "goodput",
    "time_ledger",
    "checkpoint",
    "cluster",
    "drill",
    "cli",
    "commands",
}

STDLIB_ONLY = [
    "errors",
    "phases",
    "launched",
    "goodput",
    "checkpoint.manifest",
    "checkpoint.store",
    "checkpoint.catalog",
    "checkpoint.ownership",
    "checkpoint.policy",
    "checkpoint.resume",
    "checkpoint.retention",
]
WITHOUT_TORCH = ["", "cli"]
HEAVY = ["torch", "numpy", "accelerate", "safetensors", "xxhash"]

RUNS_CODE_ON_LOAD = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
# "sharding" makes an Accelerator, for loops of one's own and for the Trainer.
IMPORTERS_OF_ACCELERATE = {"world", "run", "trainer", "sharding"}
# .pth goes in and out here, and what torch's planners hand over in memory: torch.save, and torch.load with a literal
# weights_only=True.
EXCHANGE = {"checkpoint.exchange", "checkpoint.plain_values"}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450
LONG_FOR_A_REASON: dict[str, str] = {}  # "checkpoint/store.py" or "run.py:Run.step" -> the reason


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is absolute, like "torch.nn" or "dist_train.checkpoint.store"."""

    target: str
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in paths}


def file_of(module: str) -> Path:
    base = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def where(module: str, line: int) -> str:
    return f"{file_of(module).relative_to(ROOT)}:{line}"


def absolute_base(node: ast.ImportFrom, module: str) -> str:
    """The module that `from X import ...` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    package = [NAME, *module.split(".")] if module else [NAME]
    if file_of(module).name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, node.module] if node.module else package)


def imports_of(module: str, tree: ast.Module | None = None) -> Iterator[Import]:
    """Every import of a module, those inside functions, under TYPE_CHECKING and through importlib included."""
    for node in ast.walk(tree or modules()[module]):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, module)
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                yield Import(first.value, node.lineno)


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text, "" for what is not a plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def internal_module(target: str) -> str | None:
    """The module of ours that an absolute import reaches: the longest prefix that is one; None for others' modules."""
    parts = target.split(".")
    if parts[0] != NAME:
        return None
    inner = parts[1:]
    while inner and ".".join(inner) not in modules():
        inner.pop()
    return ".".join(inner)


def internal_imports(module: str) -> list[tuple[str, int]]:
    found = [(internal_module(item.target), item.line) for item in imports_of(module)]
    return [(target, line) for target, line in found if target is not None and target != module]


def external_imports() -> Iterator[tuple[str, str, int]]:
    """(module of ours, imported name, line) for each import from outside the package."""
    for module in modules():
        for item in imports_of(module):
            if item.target.split(".")[0] != NAME:
                yield module, item.target, item.line


def top_of(module: str) -> str:
    return module.split(".")[0]


def level_of(module: str) -> int | None:
    return LEVEL_OF_MODULE.get(module, LEVEL_OF_ROOM.get(top_of(module)))


def fault_of_import(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    own, other = top_of(module), top_of(target)
    if target == "":
        return "the package's public face is for users: import from the module that defines the name"
    if module == "":
        return None
    if own in ROOMS and other in ROOMS and own != other and (own, other) != ("drill", "checkpoint"):
        return "rooms never import each other"  # the drill judges checkpoints from outside, as the command line does
    if own in ("cli", "commands", "__main__"):
        return None if other in CLI_MAY_IMPORT else f"the command line uses {sorted(CLI_MAY_IMPORT)} only"
    if other in NOT_FOR_TRAINING_CODE and own != other:
        return f"{other}/ is never imported by training code"
    level, other_level = level_of(module), level_of(target)
    if level is None or other_level is None:
        return None  # reported by the test of the map
    return "imports go downwards only" if other_level > level else None


def calls_of(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(modules()[module]) if isinstance(node, ast.Call))


def test_package_is_found() -> None:
    assert "errors" in modules(), f"{PACKAGE}/errors.py does not exist: the rules below would check nothing"


def test_every_module_is_on_the_map() -> None:
    strangers = [str(file_of(module).relative_to(ROOT)) for module in modules() if level_of(module) is None]
    assert not strangers, (
        f"{strangers} are in no layer: add them to LEVEL_OF_MODULE here and, with a design note, to the map"
    )


def test_imports_go_downwards_only() -> None:
    faults = [
        f"{where(module, line)}: {module or NAME} imports {target or NAME}: {fault}"
        for module in modules()
        for target, line in internal_imports(module)
        if (fault := fault_of_import(module, target))
    ]
    assert not faults, "\n".join(faults)


def test_imports_form_no_cycle() -> None:
    graph = {module: {target for target, _ in internal_imports(module)} for module in modules() if module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_safetensors_and_accelerate_enter_where_the_map_says() -> None:
    faults = []
    for module, name, line in external_imports():
        library = name.split(".")[0]
        if library == "safetensors" and top_of(module) != "checkpoint":
            faults.append(f"{where(module, line)}: safetensors enters in checkpoint/ only")
        if library == "accelerate" and module not in IMPORTERS_OF_ACCELERATE:
            faults.append(f"{where(module, line)}: accelerate enters in {sorted(IMPORTERS_OF_ACCELERATE)} only")
    assert not faults, "\n".join(faults)


def test_nothing_that_runs_code_on_load_is_imported() -> None:
    names = {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}
    faults = [
        f"{where(module, line)}: {name}"
        for module, name, line in external_imports()
        if name.split(".")[0] in RUNS_CODE_ON_LOAD or name in names
    ]
    assert not faults, "no code runs from a checkpoint (law 7):\n" + "\n".join(faults)


def is_weights_only(call: ast.Call) -> bool:
    return any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in call.keywords
    )


def allows_pickle(call: ast.Call) -> bool:
    return any(
        keyword.arg == "allow_pickle" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
        for keyword in call.keywords
    )


def test_nothing_that_runs_code_on_load_is_called() -> None:
    faults = []
    for module in modules():
        for call in calls_of(module):
            name = dotted(call.func)
            if name.startswith("torch.") and name.endswith((".load", ".save")) and name.count(".") == 1:
                if module in EXCHANGE and (name == "torch.save" or is_weights_only(call)):
                    continue
                faults.append(f"{where(module, call.lineno)}: {name}")
            if name.startswith("torch.serialization.") or allows_pickle(call):
                faults.append(f"{where(module, call.lineno)}: {name or 'allow_pickle'}")
    assert not faults, (
        f"no code runs from a checkpoint (law 7; only {sorted(EXCHANGE)} may torch.save, and torch.load with "
        "weights_only=True):\n" + "\n".join(faults)
    )


def test_only_console_prints() -> None:
    faults = [
        where(module, call.lineno)
        for module in modules()
        if module != "console"
        for call in calls_of(module)
        if dotted(call.func) in ("print", "builtins.print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not faults, f"only console.py prints: {faults}"


HIDE_AND_IMPORT = """
import importlib, sys
target, hidden = sys.argv[1], sys.argv[2].split(",")
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden from this module", name=name)
sys.meta_path.insert(0, Hider())
before = set(sys.modules)
importlib.import_module(target)
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(",".join(sorted(roots - set(sys.stdlib_module_names) - {"dist_train"})))
"""


def third_parties_loaded_by(module: str, hidden: list[str]) -> list[str]:
    """Imports one module in a fresh interpreter, with `hidden` not importable; returns what else it loaded."""
    target = f"{NAME}.{module}" if module else NAME
    command = [sys.executable, "-c", HIDE_AND_IMPORT, target, ",".join(hidden)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"import {target} with {hidden} hidden failed:\n{result.stderr}"
    return [name for name in result.stdout.strip().split(",") if name]


@pytest.mark.parametrize("module", [name for name in STDLIB_ONLY if file_of(name).exists()])
def test_stdlib_only_module_loads_nothing_else(module: str) -> None:
    loaded = third_parties_loaded_by(module, HEAVY)
    assert not loaded, f"{module} is marked [stdlib only] or [pure] and loads {loaded}"


@pytest.mark.parametrize("module", [name for name in WITHOUT_TORCH if file_of(name).exists()], ids=lambda m: m or NAME)
def test_command_line_starts_without_torch(module: str) -> None:
    third_parties_loaded_by(module, HEAVY)


def functions_of(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name, nested ones included."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            name = f"{prefix}{child.name}" if is_function or isinstance(child, ast.ClassDef) else prefix.rstrip(".")
            if is_function:
                yield name, child
            yield from walk(child, f"{name}." if name else "")

    return walk(tree, "")


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring left out: documenting a function must not make it too long."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def test_no_function_is_too_long() -> None:
    offenders = []
    for module, tree in modules().items():
        path = file_of(module).relative_to(PACKAGE).as_posix()
        for name, function in functions_of(tree):
            if lines_of(function) > MAX_FUNCTION_LINES and f"{path}:{name}" not in LONG_FOR_A_REASON:
                offenders.append(f"{path}:{name} has {lines_of(function)} lines")
    assert not offenders, f"at most {MAX_FUNCTION_LINES} lines a function:\n" + "\n".join(offenders)


def test_no_file_is_too_long() -> None:
    offenders = []
    for module in modules():
        path = file_of(module).relative_to(PACKAGE).as_posix()
        count = len(file_of(module).read_text(encoding="utf-8").splitlines())
        if count > MAX_FILE_LINES and path not in LONG_FOR_A_REASON:
            offenders.append(f"{path} has {count} lines")
    assert not offenders, f"at most {MAX_FILE_LINES} lines a file:\n" + "\n".join(offenders)


def test_package_has_no_unfinished_notes() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    offenders = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(files)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if re.search(r"\b(TODO|FIXME)\b", line)
    ]
    assert not offenders, f"finish it or write a design note: {offenders}"


def source_targets(source: str, module: str) -> list[str]:
    return [item.target for item in imports_of(module, ast.parse(source))]


def test_the_checker_sees_every_form_of_import() -> None:
    source = """
def later():
    import pickle as p
    from .store import Store
    from .. import errors
    importlib.import_module("accelerate")
    __import__("dill")
"""
    expected = ["pickle", "dist_train.checkpoint.store.Store", "dist_train.errors", "accelerate", "dill"]
    assert source_targets(source, "checkpoint.writer") == expected


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("errors", "world"),
        ("world", "state"),
        ("checkpoint.store", "checkpoint.writer"),
        ("checkpoint.writer", "run"),
        ("health.watchdog", "checkpoint.store"),
        ("checkpoint.writer", "drill.fault_plan"),
        ("drill.injector", "health.watchdog"),
        ("run", "trainer"),
        ("run", "cluster.slurm"),
        ("trainer", "drill.faults"),
        ("cli", "run"),
        ("run", "cli"),
        ("state", ""),
    ],
)
def test_the_checker_refuses_what_the_map_forbids(module: str, target: str) -> None:
    assert fault_of_import(module, target)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("checkpoint.writer", "checkpoint.store"),
        ("checkpoint.store", "errors"),
        ("health.watchdog", "console"),
        ("checkpoint.checkpointer", "state"),
        ("run", "checkpoint.checkpointer"),
        ("run", "health.watchdog"),
        ("trainer", "run"),
        ("cli", "cluster.launcher"),
        ("drill.scenarios", "run"),
        ("drill.injector", "checkpoint.store"),
        ("", "trainer"),
    ],
)
def test_the_checker_accepts_what_the_map_allows(module: str, target: str) -> None:
    assert fault_of_import(module, target) is None
