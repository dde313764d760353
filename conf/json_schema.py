"""JSON Schemas for editors, generated from the dataclasses: completion, checking and the docstrings as descriptions.

A YAML file of conf/ is sparse and may interpolate, so nothing is required and `${…}` may stand for any value.
`.vscode/settings.json` binds them to conf/; any editor with yaml-language-server can do the same.
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from conf import schema as reference
from conf.schema import Config

FOLDER = Path(__file__).parent / "json_schema"
INTERPOLATION = {"type": "string", "pattern": r"^\$\{.+\}$"}


def schemas() -> dict[str, str]:
    """File name -> text: one per stage, and `experiment.json` for the whole."""
    kinds = {f.name: get_type_hints(Config)[f.name] for f in fields(Config)} | {"experiment": Config}
    documented = docstrings()
    found = {}
    for name, kind in kinds.items():
        schema = TypeAdapter(kind).json_schema()
        for title, node in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
            for field, text in documented.get(title, {}).items():
                node["properties"][field].setdefault("description", text)
        schema = _sparse(schema)
        schema.setdefault("properties", {})["defaults"] = {"type": "array", "description": "Hydra's defaults list."}
        found[f"{name}.json"] = json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1, sort_keys=True) + "\n"
    return found


def docstrings() -> dict[str, dict[str, str]]:
    """Dataclass -> field -> the docstring under it.

    pydantic's `use_attribute_docstrings` reads them too, whenever conf/schema.py is imported: a twentieth of a second of every
    process, and only the JSON Schemas show them.
    """
    found: dict[str, dict[str, str]] = {}
    for kind in ast.parse(inspect.getsource(reference)).body:
        if isinstance(kind, ast.ClassDef):
            found[kind.name] = {
                field.target.id: inspect.cleandoc(text.value.value)
                for field, text in pairwise(kind.body)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
            }
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
