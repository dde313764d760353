"""Which files of this repository a module needs: its imports, read from the source without running anything."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path

ROOTS = ("conf", "stages")


def closure(module: str, leave_out: Collection[str] = (), root: Path = Path()) -> list[Path]:
    """Files of a module, of everything of conf/ and stages/ that it imports (inside functions too), and of their packages.

    Args:
        module: dotted name.
        leave_out: modules whose files are left out, with what only they import.
        root: the repository.

    Returns:
        Paths relative to `root`, sorted.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name, root)
        if path is None or name in found or name in leave_out:
            continue
        found[name] = path
        waiting += _imports(root / path)
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append(parent)
    return sorted(found.values())


def _file(name: str, root: Path) -> Path | None:
    """The file of a dotted name, if it is a module of this repository."""
    if name.partition(".")[0] not in ROOTS:
        return None
    base = Path(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if (root / path).is_file()), None)


def _imports(path: Path) -> list[str]:
    """Dotted names that a file imports; `from a import b` gives a and a.b, which may be a module or a name in one."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
