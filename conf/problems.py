"""What is wrong in conf/, in a user's words: pydantic's findings with the file, the key, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from conf.errors import ConfigError
from conf.schema import Config

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong in conf/."""

    file: str
    """Relative to the repository root."""
    key: str
    """Dotted, from the root of the configuration; empty when the whole file is meant."""
    message: str
    """What is wrong, the value and the remedy."""

    def __str__(self) -> str:
        """`file: key: message`."""
        return f"{self.file}: {self.key}: {self.message}" if self.key else f"{self.file}: {self.message}"


class ConfigErrors(ConfigError):
    """Everything that is wrong, at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        """One line per problem, sorted by file and key."""
        self.problems = sorted(set(problems))
        count = len(self.problems)
        super().__init__("\n".join([f"{count} error{'s'[: count != 1]} in the configuration", *(f"  {p}" for p in self.problems)]))


def dotted(path: Sequence[str | int]) -> str:
    """`('tune', 'lora', 'rank')` -> `tune.lora.rank`."""
    return ".".join(map(str, path))


def explain(
    error: ValidationError, plain: dict[str, Any], origins: dict[str, str], sources: list[tuple[str, str]]
) -> Iterator[tuple[Problem, Literal["value", "missing", "rule"]]]:
    """Turn pydantic's findings into problems: a wrong `value`, a `missing` key, or a broken `rule` between several keys."""
    for item in error.errors():
        path, kind = _locate(item["loc"], plain)
        key = dotted(path)
        match item["type"]:
            case "unexpected_keyword_argument" | "extra_forbidden":
                known = sorted(f.name for f in fields(kind)) if is_dataclass(kind) else []
                near = difflib.get_close_matches(str(path[-1]), known, 1, 0.5)
                message = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known here: {', '.join(known)}"
                yield Problem(file_of(key, origins, sources), key, message), "value"
            case "missing" | "missing_argument" | "missing_keyword_only_argument":
                yield Problem(file_of(key, origins, sources), key, "is mandatory and has no value"), "missing"
            case "value_error":
                for part in str(item["ctx"]["error"]).split("; "):
                    named = [dotted((*path, name)) for name in re.findall(r"[a-z_][\w.]*", part)]
                    file = next((origins[name] for name in named if name in origins), "") or file_of(key if key else named[0], origins, sources)
                    yield Problem(file, key, part), "rule"
            case "union_tag_not_found" | "union_tag_invalid":
                message = f"{item['msg']}" if "tag" not in item.get("ctx", {}) else f"kind={item['ctx']['tag']!r} is none of {item['ctx']['expected_tags']}"
                yield Problem(file_of(f"{key}.kind", origins, sources), f"{key}.kind", message), "value"
            case _:
                value = item.get("input")
                hint = ""
                if isinstance(value, str) and is_dataclass(_hint(path)):
                    hint = f"; {value!r} is a choice, not a value: put `{path[-1]}: {value}` into the defaults list of conf/config.yaml or of an experiment"
                yield Problem(file_of(key, origins, sources), key, f"{item['msg'].lower()}; the value is {json.dumps(value)}{hint}"), "value"


def _hint(path: KeyPath) -> Any:
    """The dataclass of a top-level key, if the path is one."""
    return get_type_hints(Config, include_extras=True).get(str(path[0])) if len(path) == 1 else None


def _locate(loc: tuple[int | str, ...], plain: dict[str, Any]) -> tuple[KeyPath, Any]:
    """A pydantic location without its union tags, and the dataclass that holds its last key."""
    path: list[str | int] = []
    value: Any = plain
    hint: Any = Config
    holder: Any = Config
    for part in loc:
        options = list(_options(hint))
        tagged = next((o for o in options if len(options) > 1 and part in _tags(o)), None)
        if tagged is not None and isinstance(value, dict) and value.get("kind") == part:
            hint = tagged
            continue
        holder = next((o for o in options if is_dataclass(o)), None)
        if holder is not None:
            hint = get_type_hints(holder, include_extras=True).get(str(part))
        elif get_origin(hint) is dict or any(get_origin(o) is dict for o in options):
            hint = get_args(next(o for o in [hint, *options] if get_origin(o) is dict))[1]
        elif any(get_origin(o) is list for o in options):
            hint = get_args(next(o for o in options if get_origin(o) is list))[0]
        if part == "[key]":
            continue
        path.append(part)
        value = value.get(part) if isinstance(value, dict) else value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None
    return tuple(path), holder


def _options(hint: Any) -> Iterator[Any]:
    """The members of a union, without annotations and None."""
    if get_origin(hint) is Annotated:
        yield from _options(get_args(hint)[0])
    elif get_origin(hint) is dict or get_origin(hint) is list or is_dataclass(hint):
        yield hint
    elif get_args(hint):
        for member in get_args(hint):
            yield from _options(member)
    elif hint is not None and hint is not type(None):
        yield hint


def _tags(kind: Any) -> tuple[str, ...]:
    """The values of a dataclass's `kind`."""
    return get_args(get_type_hints(kind).get("kind")) if is_dataclass(kind) else ()


def file_of(key: str, origins: dict[str, str], sources: list[tuple[str, str]]) -> str:
    """The file to look into for a key: that which set it, else one that set a neighbour, else the stage's choice."""
    if key in origins:
        return origins[key]
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        prefix = ".".join(parts[:cut])
        for leaf in reversed(origins):
            if leaf == prefix or leaf.startswith(prefix + ".") or (cut == len(parts) and prefix.startswith(leaf + ".")):
                return origins[leaf]
    return next((f"conf/{file}" for file, package in reversed(sources) if package == parts[0]), "conf/config.yaml")
