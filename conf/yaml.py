"""The one YAML dialect of params.yaml: DVC's own (ruamel, YAML 1.2), where `1e-5` is a number and `on` a word.

Read and written by libyaml where that comes to the same: the text that `dump` gives for a value means that value to every
reader, YAML 1.1 or 1.2, so a file of exactly such text needs no ruamel, which takes a quarter of a second for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError

CORE_NUMBER = re.compile(r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?0o[0-7_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+|[-+]_[0-9_]*")
"""What YAML 1.2, or ruamel's reading of it, takes for a number beyond YAML 1.1."""

MOST = 200_000
"""Most values of a file: a hundred times what params.yaml has."""
DEEPEST = 100
"""Mappings and lists within each other; a recursive reader manages some hundreds."""


class _Dumper(yaml.CSafeDumper):
    """Quotes what either version of YAML would read as something else than text, and keeps a text on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{CORE_NUMBER.pattern})$"), list("-+.0123456789"))
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None))


def read(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        ConfigError: it is not YAML, or unfolds without end; names file, line and problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from error
    try:
        value = parse(text, yaml.CSafeLoader)
        if dump(value) == re.sub(r"\A(#.*\n)*", "", text):
            return value
    except yaml.YAMLError:
        pass  # ruamel decides, and says what is wrong
    except ValueError as error:
        raise _unreadable(path, error) from error
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
        refuse_bomb(value)
        return value
    except (YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def parse(text: str, loader: type[yaml.CSafeLoader]) -> Any:
    """Parse YAML that can exhaust neither memory nor stack: libyaml composes by recursion in C, which would take the process with it.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it is nested or unfolded without end, or holds a number or a date that Python has not.
    """
    if sum(map(text.count, "[{-?:")) > 1000:  # each level takes one of them
        depth = 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
    value = yaml.load(text, Loader=loader)
    refuse_bomb(value)
    return value


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


def _unreadable(path: Path, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return ConfigError(f"{where}: unreadable YAML: {getattr(error, 'problem', None) or error}", "mend the file at that line")


def dump(value: object) -> str:
    """Canonical text: keys sorted, block style, one dialect for every reader."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, width=4096)
    return text
