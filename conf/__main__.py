"""`python -m conf`: compose conf/ into params.yaml, the first stage of the pipeline.

Reads:  conf/
Writes: params.yaml (line 1 says so and carries the digest of conf/), sorted and canonical
Config: all of it

When params.yaml was composed from the present conf/, it is kept as it is: what differs are overrides (`dvc exp run -S`), and
they are named. `--check` accepts no override; `--schema` writes the JSON Schemas for editors.
Exit codes: 0 done, 1 `--check` found params.yaml or a schema stale, 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf import PARAMS
from conf.errors import ConfigError

NOTICE = "# Written by `python -m conf` from conf/ (sha256 {digest}). Do not edit: change conf/ and run `dvc repro`.\n"


def text(values: dict[str, Any], digest: str) -> str:
    """The bytes of params.yaml."""
    from conf.yaml import dump

    return NOTICE.format(digest=digest) + dump(values)


def overrides(params: Path, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (composed value, value in params.yaml) where the two differ.

    Raises:
        ConfigErrors: a value in params.yaml breaks the schema.
    """
    import json

    from pydantic import TypeAdapter, ValidationError

    from conf.compose import leaves
    from conf.problems import ConfigErrors, dotted, explain
    from conf.schema import Config
    from conf.yaml import read

    present = read(params)
    try:
        TypeAdapter(Config).validate_json(json.dumps(present, default=str))
    except ValidationError as error:
        from dataclasses import replace

        raise ConfigErrors([replace(p, file=str(params)) for p, _ in explain(error, present, {}, [])]) from None
    ours = {dotted(path): value for path, value in leaves(values)}
    theirs = {dotted(path): value for path, value in leaves(present)}
    absent = "(absent)"
    keys = sorted(ours.keys() | theirs.keys())
    return {k: (ours.get(k, absent), theirs.get(k, absent)) for k in keys if ours.get(k, absent) != theirs.get(k, absent)}


def write() -> str:
    """Compose, or keep a params.yaml that was composed from the same conf/; returns what was done, in a sentence."""
    from conf.compose import compose, digest
    from conf.yaml import read

    composed, now = compose(), digest()
    wanted, done = text(composed.values, now), f"{PARAMS} composed from conf/"
    if PARAMS.exists():
        present = PARAMS.read_text(encoding="utf-8")
        if present == wanted:
            return f"{PARAMS} is up to date"
        if present.startswith(NOTICE.format(digest=now).rstrip("\n")):
            if not present.endswith("\n") or not has_end(read(PARAMS), composed.values):
                done = f"{PARAMS} was cut short, and is composed anew from conf/"
            elif different := overrides(PARAMS, composed.values):
                named = ", ".join(f"{key}={theirs!r} (conf/ says {ours!r})" for key, (ours, theirs) in different.items())
                return f"{PARAMS} keeps {len(different)} override{'s'[: len(different) != 1]}: {named}"
    temporary = PARAMS.with_name(f".{PARAMS.name}.partial")
    temporary.write_text(wanted, encoding="utf-8")
    temporary.replace(PARAMS)
    return done


def has_end(present: object, values: object) -> bool:
    """Whether the last key of what conf/ says is there: `dvc exp run -S` writes params.yaml in place, and a kill leaves its beginning.

    An override with `-S` may have put something else in the place of a branch, or less into it.
    """
    while isinstance(values, Mapping) and isinstance(present, Mapping) and values:
        last = max(values)
        if last not in present:
            return False
        present, values = present[last], values[last]
    return present is not None or values is None


def check() -> list[str]:
    """What is stale or wrong: params.yaml, the JSON Schemas, and every choice and experiment, selected or not."""
    from conf.compose import choices, compose, digest
    from conf.json_schema import stale
    from conf.problems import ConfigErrors

    complaints: list[str] = []
    composed = compose()
    if not PARAMS.exists() or PARAMS.read_text(encoding="utf-8") != text(composed.values, digest()):
        complaints.append(f"{PARAMS} is not what conf/ composes to: run `python -m conf`, or put the override into conf/experiment/")
    complaints += [f"{file} is not what conf/schema.py says: run `python -m conf --schema`" for file in stale()]
    problems = []
    for name in choices()["experiment"]:
        try:
            compose([f"experiment={name}"])
        except ConfigErrors as error:
            problems += error.problems
    if problems:
        raise ConfigErrors(problems)
    return complaints


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    gc.disable()  # a short life, most of it imports: nothing worth collecting
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads the metadata of every package
    parser = argparse.ArgumentParser(prog="python -m conf", description="Compose conf/ into params.yaml.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when params.yaml or a schema is stale, or any experiment is wrong")
    parser.add_argument("--schema", action="store_true", help="write the JSON Schemas that editors use")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            complaints = check()
            sys.stderr.write("".join(f"{line}\n" for line in complaints))
            return 1 if complaints else 0
        if options.schema:
            from conf.json_schema import write as write_schemas

            sys.stderr.write("".join(f"{file}\n" for file in write_schemas()))
            return 0
        sys.stderr.write(f"{write()}\n")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
