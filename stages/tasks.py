"""lm-eval tasks by name: the repository's own YAML files, which hold data and templates but no code, or standard ones.

A task of `conf/evaluate/tasks/` reads rows of `data/` that DVC pins, straight from the JSONL file: no cache of the
`datasets` library stands in between, so an old one cannot be measured by mistake. Whoever may open a pull request may
write such a file: `!function`, classes, metrics from the hub and unpinned data are refused, and templates run sandboxed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, DataError, SourceError
from conf.yaml import refuse_bomb
from stages.files import read_jsonl

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

TASKS = Path("conf/evaluate/tasks")
CODE = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code", "use_prompt")
DERIVED = ("messages", "licence", "classification")
REMEDY = "a task file holds templates and names of metrics; prepare rows in collect or preprocess"


class Rows(list[dict[str, Any]]):
    """The rows of one split, in the form in which lm-eval reads a dataset. `messages` is left out, so that a new system prompt keeps the `doc_hash`."""

    @property
    def features(self) -> dict[str, None]:
        """The fields that a template may name."""
        return dict.fromkeys(name for row in self for name in row)


def load_tasks(names: list[str], key: str, fewshot: int = 0, seed: int = 0) -> dict[str, ConfigurableTask]:
    """Name -> task, ready to be asked.

    Args:
        names: Tasks of `conf/evaluate/tasks/`, or of lm-eval itself (whose index takes 9 s to build).
        key: Dotted key of the configuration that names them, for messages.
        fewshot: Examples before each question; they replace what the task's own file says.
        seed: Of the choice of the examples.

    Raises:
        ConfigError: no such task, or its file holds code, breaks the form or names an unknown metric.
        DataError: its data file is missing or has no row.
        SourceError: the data of a standard task cannot be had.
    """
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    _sandbox()
    known = dict(_own())
    missing = [name for name in names if name not in known]
    manager = TaskManager(include_path=str(TASKS), include_defaults=bool(missing))
    tasks = {}
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_subtasks, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"own tasks: {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(f"{key}: no lm-eval task is called {name!r}", f"{hint} Own tasks live in {TASKS}/, `lm-eval ls tasks` lists the standard ones")
        if name in missing and name not in manager.all_subtasks:
            raise ConfigError(f"{key}: {name!r} is a group of lm-eval tasks", "name its tasks one by one, so that each has a score of its own")
        try:
            spec: Any = name if name in missing else {**_data_only(known[name]), "custom_dataset": _reader(name, known[name])}
            task = manager.load([spec])["tasks"][name]
        except TemplateError as error:
            raise ConfigError(f"{known.get(name, name)}: template: {error}", "a template may use the fields of its row and nothing else") from error
        except OSError as error:
            raise SourceError(f"{key}: the data of {name} cannot be had: {error}", "give it a network, or take its rows as a dataset of collect") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{known.get(name, name)}: lm-eval refuses it: {type(error).__name__}: {error}", "see lm-eval's guide to task files") from error
        if fewshot and not (task.config.fewshot_split or task.config.training_split):
            raise ConfigError(f"{key}: {name} has no fewshot_split, and fewshot={fewshot}", f"name one in {TASKS}/: the tested rows must not be the examples")
        task.set_config(key="num_fewshot", value=fewshot)
        task.set_fewshot_seed(seed=seed)
        tasks[name] = task
    return tasks


def _own() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> merged content of each task file, each checked for code."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(TASKS.rglob("*.yaml")):
        try:
            tags = [token for token in yaml.scan(path.read_text(encoding="utf-8")) if isinstance(token, yaml.TagToken)]
            if tags:
                raise ConfigError(f"{path}:{tags[0].start_mark.line + 1}: the tag {''.join(filter(None, tags[0].value))} runs code", REMEDY)
            whole = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            refuse_bomb(whole)
            if not isinstance(whole, dict):
                raise ConfigError(f"{path}: holds a {type(whole).__name__}, not a mapping of keys", "see lm-eval's guide to task files")
            included = whole.get("include") or []
            for name in [included] if isinstance(included, str) else included:
                if not (path.parent / name).resolve().is_relative_to(TASKS.resolve()):
                    raise ConfigError(f"{path}: include: {name} lies outside of {TASKS}/", "copy what is needed: what is checked here is all that runs")
            content = load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, FileNotFoundError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: unreadable task file: {error}", "mend it") from error
        if isinstance(content.get("task"), str):
            yield content["task"], {**content, "path": path}


def _data_only(own: dict[str, Any]) -> dict[str, Any]:
    """The task's content, if it holds only data, templates and registered metrics."""
    from lm_eval.api.registry import get_metric, metric_registry

    path, content = own["path"], {name: value for name, value in own.items() if name != "path"}
    for name in CODE:
        if content.get(name):
            raise ConfigError(f"{path}: {name} runs code", REMEDY)
    if content.get("dataset_path") != "json" or set(content.get("dataset_kwargs") or {}) != {"data_files"}:
        raise ConfigError(
            f"{path}: its rows must be `dataset_path: json` with `dataset_kwargs: {{data_files: …}}` and nothing else",
            "name a file of data/: collect fetches and pins it",
        )
    get_metric("acc")  # fills the registry
    metrics = content.get("metric_list") or []
    if not isinstance(metrics, list) or not all(isinstance(entry, dict) for entry in metrics):
        raise ConfigError(f"{path}: metric_list is {metrics!r}, not a list of {{metric: …}}", "see lm-eval's guide to task files")
    for entry in metrics:
        if entry.get("hf_evaluate") or entry.get("metric") not in metric_registry:
            raise ConfigError(
                f"{path}: metric {entry.get('metric')!r} would be fetched from the hub and run",
                f"lm-eval's own: {', '.join(sorted(str(m) for m in metric_registry))}",
            )
    return content


def _reader(name: str, own: dict[str, Any]) -> Callable[..., dict[str, Rows]]:
    """What gives the rows of each split to lm-eval."""
    path, files = own["path"], own["dataset_kwargs"]["data_files"]
    splits: dict[str, Any] = files if isinstance(files, dict) else {"train": files}
    tested = own.get("test_split") or own.get("validation_split")
    for split in filter(None, (tested, own.get("fewshot_split"), own.get("training_split"))):
        if split not in splits:
            raise ConfigError(f"{path}: split {split!r} is not in data_files (those are: {', '.join(sorted(splits))})", "name one of them")
    if not tested:
        raise ConfigError(f"{path}: neither test_split nor validation_split", "say which split is measured")
    read = {}
    for split, listed in splits.items():
        rows = Rows()
        paths = [listed] if isinstance(listed, str) else listed
        if not isinstance(paths, list) or not paths or not all(isinstance(file, str) and file for file in paths):
            raise ConfigError(f"{path}: data_files: {listed!r} is neither a path nor a list of some", "name a file of data/: collect fetches and pins it")
        for file in map(Path, paths):
            if file.is_absolute() or ".." in file.parts or "://" in str(file) or file.parts[0] != "data":
                raise ConfigError(f"{path}: data_files: {file} is not under data/", "collect fetches and pins rows; name what it wrote")
            rows += [{field: value for field, value in row.items() if field not in DERIVED} for row in read_jsonl(file)]
        if not rows:
            raise DataError(f"{path}: {listed} has no row: task {name} would measure nothing", "look at data/preprocess/dropped.jsonl for what became of them")
        read[split] = rows
    return lambda **_: read


def _sandbox() -> None:
    """Make lm-eval's templates run in jinja2's sandbox, and silence its progress bars."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils
    from lm_eval.api import task

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = utils.regex_replace
    utils.env = environment
    task.tqdm = lambda items, **_: items
