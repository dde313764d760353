"""`trunkline champion`: pin the model that is in production as the one that the gate compares with, by one line of conf/gate/."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from conf.errors import ConfigError, DataError
from stages.files import publish
from stages.operate.git import commit, git
from stages.operate.review.snapshot import Snapshot

LINE = re.compile(r"^champion:[^\n]*$", re.M)


def pin(revision: str, when_other: bool = False) -> str:
    """Rewrite or add the line `champion: …` of the chosen file in conf/gate/; returns what changed, in a sentence.

    Args:
        revision: that is in production.
        when_other: pin only a champion that this tree's model, as last measured, can be compared with: one that serves another model.

    Raises:
        ConfigError: there is no such revision, or conf/ is wrong, or it takes the champion from another file.
        DataError: the revision serves no model.
    """
    from conf.compose import compose

    wanted = Snapshot(commit(revision))
    if when_other and wanted.served in (None, Snapshot(None).measured):
        return f"{revision} serves {'no model yet' if wanted.served is None else 'the model of this tree'}: there is nothing to compare"
    if wanted.served is None:
        raise DataError(f"{revision} serves no model: its dvc.lock has no package", "name the revision that is in production")
    if wanted.measured != wanted.served:
        what = f"{revision} serves the engine {str(wanted.served)[:12]} and measured {str(wanted.measured)[:12]}, which its gate held"
        raise DataError(what, "name the revision of which the served engine is, or `trunkline rollback` to it")
    origins = compose(conf=Path("conf").resolve()).origins
    file = Path(origins.get("gate.champion") or next((path for key, path in origins.items() if key.startswith("gate.absolute.")), ""))
    if file.parent != Path("conf/gate"):
        raise ConfigError(f"{file} sets the gate, not a file of conf/gate/", "set gate.champion there by hand")
    text = file.read_text(encoding="utf-8")
    present = (yaml.safe_load(text) or {}).get("champion")
    if present and (kept := git("rev-parse", "--verify", "--quiet", f"{present}^{{commit}}").stdout.strip()) and Snapshot(kept).served == wanted.served:
        return f"{file} already pins what {revision} serves ({present[:12]})"
    line = f"champion: {wanted.revision}"
    new = LINE.sub(line, text, count=1) if LINE.search(text) else f"{text.rstrip()}\n{line}\n"
    with publish(file) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return f"{file}: champion: {present or 'none'} → {wanted.revision}. Next: trunkline repro"
