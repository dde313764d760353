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

CORE_NUMBER = re.compile(r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?0o[0-7_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+")
"""What YAML 1.2, or ruamel's reading of it, takes for a number beyond YAML 1.1."""


class _Dumper(yaml.CSafeDumper):
    """Quotes what either version of YAML would read as something else than text, and keeps a text on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{CORE_NUMBER.pattern})$"), list("-+.0123456789"))
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None))


def read(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        ConfigError: it is not YAML; names file, line and problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from error
    try:
        value = yaml.load(text, Loader=yaml.CSafeLoader)
        if dump(value) == re.sub(r"\A(#.*\n)*", "", text):
            return value
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        pass  # ruamel decides, and says what is wrong
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return ConfigError(f"{where}: unreadable YAML: {getattr(error, 'problem', None) or error}", "mend the file at that line")


def dump(value: object) -> str:
    """Canonical text: keys sorted, block style, one dialect for every reader."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, width=4096)
    return text
