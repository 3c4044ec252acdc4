"""The docstrings under a dataclass's fields, shown by `help()`.

Invariant: importing reads no source; it is read once, when somebody asks. Without the source there is nothing to show.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any, TypeVar

T = TypeVar("T")


def tell_fields(cls: type[T]) -> type[T]:
    """Decorates a slotted dataclass: `help()` takes the texts of slots from a mapping in `__slots__`."""
    setattr(cls, "__slots__", _FieldDocs(cls))  # noqa: B010
    return cls


class _FieldDocs(dict[str, str]):
    def __init__(self, cls: Any) -> None:
        super().__init__(dict.fromkeys(cls.__slots__, ""))
        self._cls = cls
        self._is_read = False

    def __getitem__(self, name: str) -> str:
        if not self._is_read:
            self._is_read = True
            self.update(_docs_of(self._cls))
        return super().__getitem__(name)


def _docs_of(cls: Any) -> dict[str, str]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, SyntaxError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(str(ast.literal_eval(text.value)))
    return docs
