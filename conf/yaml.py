"""The one YAML dialect of params.yaml: DVC's own (ruamel, YAML 1.2), where `1e-5` is a number and `on` a word."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from conf.errors import ConfigError


def read(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        ConfigError: it is not YAML; names file, line and problem.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
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
