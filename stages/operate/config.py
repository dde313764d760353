"""`trunkline config`: every resolved value with the file it came from."""

from __future__ import annotations

import json
import sys

from conf.errors import ConfigError


def show(key: str = "", as_json: bool = False) -> None:
    """Print dotted key, value and file, for all keys or those at and below `key`.

    Raises:
        ConfigError: conf/ is wrong, or there is no such key.
    """
    from conf import PARAMS
    from conf.__main__ import NOTICE, overrides
    from conf.compose import compose, digest, leaves
    from conf.problems import dotted

    composed = compose()
    current = PARAMS.exists() and PARAMS.read_text(encoding="utf-8").startswith(NOTICE.format(digest=digest()).rstrip("\n"))
    changed = overrides(PARAMS, composed.values) if current else {}
    rows = [(dotted(path), value, composed.origin(dotted(path))) for path, value in leaves(composed.values)]
    rows = [(name, changed[name][1], f"{PARAMS} (override)") if name in changed else (name, value, file) for name, value, file in rows]
    rows = [row for row in rows if not key or row[0] == key or row[0].startswith(f"{key}.")]
    if not rows:
        raise ConfigError(f"there is no key {key!r}", "`trunkline config` without a key shows all")
    if as_json:
        sys.stdout.write(json.dumps({name: {"value": value, "file": file} for name, value, file in rows}, indent=2, ensure_ascii=False) + "\n")
        return
    if not sys.stdout.isatty():
        sys.stdout.write("".join(f"{name}\t{json.dumps(value, ensure_ascii=False)}\t{file}\n" for name, value, file in rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "value", "file", box=None, header_style="bold")
    for name, value, file in rows:
        table.add_row(name, json.dumps(value, ensure_ascii=False), file, style="dim" if file.endswith("schema.py") else "")
    Console().print(table)
