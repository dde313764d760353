"""The one YAML dialect of params.yaml: DVC's own (ruamel, YAML 1.2), where `1e-5` is a number and `on` a word."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from conf.errors import ConfigError

MOST = 200_000
"""Most values of a file: a hundred times what params.yaml has."""
DEEPEST = 100
"""Mappings and lists within each other; a recursive reader manages some hundreds."""


def refuse_bomb(value: object) -> None:
    """Stop at aliases that unfold a small file into millions of values, or that hold themselves ("billion laughs").

    Raises:
        ValueError: there are more than `MOST` values, or they are nested more than `DEEPEST` deep.
    """
    seen, todo = 0, [(0, value)]
    while todo:
        seen += 1
        depth, held = todo.pop()
        if seen > MOST or depth > DEEPEST:
            what = f"nested more than {DEEPEST} deep" if depth > DEEPEST else f"more than {MOST} values"
            raise ValueError(f"{what}; aliases (`*name`) unfold into what they stand for: write it out, or take them away")
        if isinstance(held, dict):
            todo += ((depth + 1, item) for item in held.values())
        elif isinstance(held, list | tuple | set):
            todo += ((depth + 1, item) for item in held)


def read(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        ConfigError: it is not YAML, or unfolds without end; names file, line and problem.
    """
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        refuse_bomb(value)
        return value
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number or date that Python has not
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: unreadable YAML: {problem}", "mend the file at that line") from error


def dump(value: object) -> str:
    """Canonical text: keys sorted, block style, one dialect for every reader."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
