"""`trunkline use`: select an experiment by a one-line change of conf/config.yaml."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from conf.errors import ConfigError

LINE = re.compile(r"^(?P<key>\s*-\s*experiment:\s*)(?P<name>[^\s#]+)(?P<rest>.*)$", re.M)


def use(experiment: str, conf: Path = Path("conf")) -> str:
    """Rewrite the line `- experiment: …`; returns what changed, in a sentence.

    Raises:
        ConfigError: there is no such experiment, or config.yaml has no such line.
    """
    names = sorted(p.stem for p in (conf / "experiment").glob("*.yaml"))
    if experiment not in names:
        near = difflib.get_close_matches(experiment, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no experiment {experiment!r}", f"{hint}conf/experiment/ has: {', '.join(names)}")
    file = conf / "config.yaml"
    text = file.read_text(encoding="utf-8")
    found = LINE.search(text)
    if found is None:
        raise ConfigError(f"{file} has no line `- experiment: <name>` in its defaults", "add `  - experiment: default` before `_self_`")
    if found["name"] == experiment:
        return f"{file} already selects {experiment}"
    padding = max(2, len(found["rest"]) - len(found["rest"].lstrip()) + len(found["name"]) - len(experiment))
    rest = " " * padding + found["rest"].lstrip() if found["rest"].strip() else ""
    temporary = file.with_name(".config.yaml.partial")
    temporary.write_text(f"{text[: found.start()]}{found['key']}{experiment}{rest}{text[found.end() :]}", encoding="utf-8")
    temporary.replace(file)
    return f"{file}: experiment: {found['name']} → {experiment}. Next: make (or dvc repro)"
