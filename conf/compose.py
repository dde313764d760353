"""Compose `conf/` with Hydra into plain, checked values, each with the file it came from.

Hydra picks and merges the files; the schema says what is right. Every error is found before any is reported: a file that
cannot be read or a choice that does not exist is set aside, and the rest is checked without it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from conf.problems import ConfigErrors, KeyPath, Problem, dotted, explain
from conf.schema import Config
from conf.yaml import DEEPEST, refuse_bomb

CONF = Path(__file__).parent
NOT_HYDRA = ("evaluate/tasks/",)
SCHEMA = "conf/schema.py"


@dataclass(frozen=True)
class Composed:
    """The whole configuration."""

    config: Config
    """As dataclasses."""
    values: dict[str, Any]
    """As plain objects, with every default, keys sorted."""
    origins: dict[str, str]
    """Dotted key of a leaf that a YAML file sets -> that file; all others come from the schema."""

    def origin(self, key: str) -> str:
        """The file that a dotted leaf came from."""
        return self.origins.get(key, SCHEMA)


class _Loader(yaml.CSafeLoader):
    """YAML as OmegaConf reads it as far as keys go: a key twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"a {key.id} is no key", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def digest(conf: Path = CONF) -> str:
    """sha256 over the paths and bytes of every file of conf/ that can change the outcome."""
    files = sorted(p for p in conf.rglob("*") if p.is_file() and p.suffix in {".yaml", ".py"})
    listing = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(conf).as_posix()}\n" for p in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def compose(overrides: Sequence[str] = (), conf: Path = CONF) -> Composed:
    """Compose and check. `overrides` are Hydra's (`experiment=tiny`, `tune.seed=3`).

    Raises:
        ConfigErrors: everything that is wrong, each with file and key.
    """
    contents, problems, broken = _scan(conf)
    with tempfile.TemporaryDirectory() as scratch:
        root = conf
        bad_choices = list(_bad_choices(contents, conf, overrides))
        problems += [problem for problem, *_ in bad_choices]
        if broken or bad_choices:
            root = Path(scratch) / "conf"
            shutil.copytree(conf, root, ignore=shutil.ignore_patterns("__pycache__"))
            for file in broken:
                (root / file).write_text("{}\n", encoding="utf-8")
            for _, _, group, choice in bad_choices:
                (root / group).mkdir(parents=True, exist_ok=True)
                (root / group / f"{choice}.yaml").write_text("{}\n", encoding="utf-8")
        try:
            raw, sources = _hydra(root, overrides)
        except ConfigErrors as error:
            raise ConfigErrors(problems if bad_choices else [*problems, *error.problems]) from None  # Hydra stumbles over a bad choice once more
    origins = _origins(contents, sources)
    affected = {Path(file).parts[0] for file in broken} | {group.split("/")[0] for _, _, group, _ in bad_choices}
    everything = "experiment" in affected or "config.yaml" in affected
    plain, unresolved = _resolve(raw, origins)
    problems += [p for p in unresolved if (not everything and p.key.split(".")[0] not in affected) or "interpolation" in p.message]
    skip = {p.key for p in problems}
    try:
        config = TypeAdapter(Config).validate_json(json.dumps(plain))
    except ValidationError as error:
        for problem, kind in explain(error, plain, origins, sources):
            hidden = everything or problem.key.split(".")[0] in affected
            if problem.key in skip or (kind == "missing" and hidden) or (kind == "rule" and (hidden or any(key.startswith(f"{problem.key}.") for key in skip))):
                continue
            problems.append(problem)
        raise ConfigErrors(problems or [Problem("conf", "", str(error))]) from None
    if problems:
        raise ConfigErrors(problems)
    values = _sorted(json.loads(TypeAdapter(Config).dump_json(config)))
    return Composed(config, values, origins)


def choices(conf: Path = CONF) -> dict[str, list[str]]:
    """Group -> the choices in its folder."""
    found: dict[str, list[str]] = {}
    for file in _files(conf):
        if file.parent != conf:
            found.setdefault(file.parent.relative_to(conf).as_posix(), []).append(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def leaves(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every (path, value) that is no non-empty mapping; a list is one value."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from leaves(value[key], (*path, str(key)))
    else:
        yield path, value


def _files(conf: Path) -> list[Path]:
    return sorted(p for p in conf.rglob("*.yaml") if not p.relative_to(conf).as_posix().startswith(NOT_HYDRA))


def _scan(conf: Path) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """Read every file: contents by relative path, problems, and the paths that cannot be used."""
    contents: dict[str, Any] = {}
    problems: list[Problem] = []
    broken: list[str] = []
    for path in _files(conf):
        name = path.relative_to(conf).as_posix()
        try:
            content = _load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a number that Python has not
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problems.append(Problem(f"conf/{name}", "", f"unreadable YAML{line}: {getattr(error, 'problem', None) or error}"))
            broken.append(name)
            continue
        if not isinstance(content, dict | None):
            problems.append(Problem(f"conf/{name}", "", f"holds a {type(content).__name__}, not a mapping of keys"))
            broken.append(name)
            continue
        content = content or {}
        if not isinstance(content.get("defaults", []), list):
            problems.append(Problem(f"conf/{name}", "defaults", f"must be a list of choices, as `- tune: lora`; the value is {content['defaults']!r}"))
            broken.append(name)
            continue
        contents[name] = content
        prefix = () if path.parent == conf or name.startswith("experiment/") else path.parent.relative_to(conf).parts
        for keys, value in _all(contents[name], prefix):
            if keys[-1] == "_target_":
                problems.append(Problem(f"conf/{name}", dotted(keys), "_target_ would let a configuration call any function; remove it"))
            for leaf in value if isinstance(value, list) else [value]:
                if isinstance(leaf, str) and "${oc.env" in leaf.replace(" ", ""):
                    problems.append(
                        Problem(f"conf/{name}", dotted(keys), f"{leaf} would publish the environment in params.yaml; stages read secrets where they use them")
                    )
    return contents, problems, broken


def _load(text: str) -> Any:
    """Parse YAML that can exhaust neither memory nor stack: libyaml composes by recursion in C, which would take the process with it.

    Raises:
        yaml.YAMLError, ValueError: it is no YAML, or nested or unfolded without end.
    """
    if sum(map(text.count, "[{-?:")) > 1000:  # each level takes one of them
        depth = 0
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
    content = yaml.load(text, Loader=_Loader)
    refuse_bomb(content)
    return content


def _all(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key with its value, mappings included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from _all(inner, (*path, key))


def _bad_choices(contents: dict[str, Any], conf: Path, overrides: Sequence[str]) -> Iterator[tuple[Problem, str, str, str]]:
    """Yield (problem, file, group, choice) for each choice in the selected defaults lists that has no file."""
    chosen = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o and "." not in o.split("=", 1)[0])
    available = choices(conf)
    todo = [("config.yaml", "")]
    while todo:
        file, prefix = todo.pop()
        for entry in contents.get(file, {}).get("defaults", []):
            pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
            for left, choice in pairs:
                if choice in (None, "_self_"):
                    continue
                name = str(left).removeprefix("override ").strip()
                group = name.lstrip("/") if name.startswith("/") else "/".join(part for part in (prefix, name) if part)
                choice = chosen.get(group, choice) if file == "config.yaml" else choice
                for single in choice if isinstance(choice, list) else [choice]:
                    if single in available.get(group, []) or (not group and f"{single}.yaml" in contents):
                        todo.append((f"{group}/{single}.yaml" if group else f"{single}.yaml", group))
                    elif f"{group}/{single}.yaml" not in contents and not (conf / group / f"{single}.yaml").exists():
                        near = difflib.get_close_matches(str(single), available.get(group, []), 1)
                        hint = f"did you mean {near[0]}? " if near else ""
                        message = f"there is no choice {single!r}; {hint}conf/{group}/ has: {', '.join(available.get(group, [])) or 'nothing'}"
                        yield Problem(f"conf/{file}", group, message), file, group, str(single)


def _hydra(conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, list[tuple[str, str]]]:
    """Compose with Hydra: the merged configuration, and its files with their packages in merge order."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode

    try:
        with initialize_config_dir(version_base=None, config_dir=str(conf.resolve())):
            loader = GlobalHydra.instance().config_loader()
            merged = loader.load_configuration("config", list(overrides), run_mode=RunMode.RUN)
            used = loader.compute_defaults_list("config", list(overrides), run_mode=RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigErrors([Problem("conf", "", str(error).strip().split("\n")[0])]) from None
    from omegaconf import open_dict

    with open_dict(merged):
        merged.pop("hydra", None)
    sources = [(f"{d.config_path}.yaml", d.package or "") for d in used if d.config_path and not d.config_path.startswith("hydra")]
    return merged, [(file, "" if package == "_global_" else package) for file, package in sources]


def _origins(contents: dict[str, Any], sources: list[tuple[str, str]]) -> dict[str, str]:
    """Dotted leaf -> the last file that set it."""
    origins: dict[str, str] = {}
    for file, package in sources:
        content = {k: v for k, v in contents.get(file, {}).items() if k != "defaults"}
        for path, _ in leaves(content, tuple(package.split(".")) if package else ()):
            origins[dotted(path)] = f"conf/{file}"
    return origins


def _resolve(merged: DictConfig, origins: dict[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Resolve every interpolation on its own; what cannot be resolved is left out and reported."""
    problems: list[Problem] = []

    def walk(node: Any, path: KeyPath) -> Any:
        if isinstance(node, DictConfig):
            return {str(k): v for k in node for v in [child(node, k, (*path, str(k)))] if v is not _LEFT_OUT}
        if isinstance(node, ListConfig):
            return [v for i in range(len(node)) for v in [child(node, i, (*path, i))] if v is not _LEFT_OUT]
        return node

    def child(node: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        name = dotted(path)
        where = origins.get(name) or next((f for k, f in reversed(origins.items()) if name.startswith(f"{k}.")), "conf/config.yaml")
        if OmegaConf.is_missing(node, key):
            problems.append(Problem(where, name, "is mandatory (`???`) and has no value; set it here or in the experiment"))
            return _LEFT_OUT
        try:
            return walk(node[key], path)
        except RecursionError:
            problems.append(Problem(where, name, "interpolation: goes round in a circle"))
        except OmegaConfBaseException as error:
            problems.append(Problem(where, name, f"interpolation: {str(error).strip().splitlines()[0]}"))
        return _LEFT_OUT

    return walk(merged, ()), problems


_LEFT_OUT = object()


def _sorted(value: Any) -> Any:
    """Mappings with sorted keys, all the way down."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
