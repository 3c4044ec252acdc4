"""Whether a script uses dist_train at all, found out without running it, and the lines that it lacks. [stdlib only]"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

LINES_TO_ADD: Final = """\
    import dist_train as dt

    loader = dt.data_loader(dataset, global_batch_size=64, seed=0)
    with dt.Run("runs/mine", model=model, optimizer=optimizer, loader=loader) as run:
        for epoch in run.epochs(20):
            for batch in run.batches(loader):
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)
"""


def mentions_dist_train(script: Path) -> bool:
    """Whether the script, or a module beside it that it imports, imports dist_train. What cannot be read might."""
    seen: set[Path] = set()
    todo = [script]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        try:
            names = _imported(ast.parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, SyntaxError):
            return True  # running it says why
        if any(name.partition(".")[0] == "dist_train" for name in names):
            return True
        todo += [found for name in names for found in _beside(name, script.parent)]
    return False


def _imported(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names += [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return [name for name in names if name]


def _beside(name: str, folder: Path) -> list[Path]:
    base = folder.joinpath(*name.split("."))
    return [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
