"""JSON Schemas for editors, generated from the dataclasses: completion, checking and the docstrings as descriptions.

A YAML file of conf/ is sparse and may interpolate, so nothing is required and `${…}` may stand for any value.
`.vscode/settings.json` binds them to conf/; any editor with yaml-language-server can do the same.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from conf.schema import Config

FOLDER = Path(__file__).parent / "json_schema"
INTERPOLATION = {"type": "string", "pattern": r"^\$\{.+\}$"}


def schemas() -> dict[str, str]:
    """File name -> text: one per stage, and `experiment.json` for the whole."""
    kinds = {f.name: get_type_hints(Config)[f.name] for f in fields(Config)} | {"experiment": Config}
    found = {}
    for name, kind in kinds.items():
        schema = _sparse(TypeAdapter(kind).json_schema())
        schema.setdefault("properties", {})["defaults"] = {"type": "array", "description": "Hydra's defaults list."}
        found[f"{name}.json"] = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1, sort_keys=True) + "\n"
    return found


def stale() -> list[Path]:
    """The files that are missing or differ."""
    return [FOLDER / name for name, text in schemas().items() if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != text]


def write() -> list[Path]:
    """Write all; returns their paths."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return [FOLDER / name for name in schemas()]


def _sparse(node: Any) -> Any:
    """Drop `required` and `title`, and let an interpolation stand for any leaf."""
    if isinstance(node, list):
        return [_sparse(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        if key == "properties":
            result[key] = {name: _or_interpolation(_sparse(inner)) for name, inner in value.items()}
        elif key == "$defs":
            result[key] = {name: _sparse(inner) for name, inner in value.items()}
        elif key not in {"required", "title", "discriminator"}:
            result[key] = _sparse(value)
    if "oneOf" in result:
        result["anyOf"] = result.pop("oneOf")
    return result


def _or_interpolation(node: dict[str, Any]) -> dict[str, Any]:
    """The node, or `${…}`; its description and default stay outside."""
    outside: dict[str, Any] = {key: node[key] for key in ("description", "default") if key in node}
    inside = {key: value for key, value in node.items() if key not in outside}
    return {**outside, "anyOf": [inside, INTERPOLATION]}
