"""What every stage knows of the configuration: its own key of `params.yaml`, as a dataclass.

`python -m conf` composes `conf/` into `params.yaml`; `load("tune")` reads that file back. A stage sees only keys that DVC
tracks for it (`params:` in dvc.yaml), so a value can never reach a stage behind DVC's back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

PARAMS = Path("params.yaml")


def load(key: str, path: Path = PARAMS) -> Any:
    """The dataclass at a dotted key (`tune`, `serve.engine`) of params.yaml.

    Raises:
        ConfigError: the file is missing or unreadable, or the value breaks the schema.
    """
    from pydantic import TypeAdapter, ValidationError

    from conf import schema
    from conf.errors import ConfigError
    from conf.yaml import read

    if not path.exists():
        raise ConfigError(f"{path} is missing", "run `dvc repro`, whose first stage composes it")
    value: Any = read(path)
    kind: Any = schema.Config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"{path} has no key {key}", "run `python -m conf` to compose it anew")
        value, kind = value[part], get_type_hints(kind, include_extras=True)[part]
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        value = f"{json.dumps(first['input'], default=str):.200}"
        raise ConfigError(f"{path}: {where}: {first['msg']}; the value is {value}", "run `python -m conf`, which names every error") from error
