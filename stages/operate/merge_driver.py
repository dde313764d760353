"""`trunkline merge-driver`: how git merges the files that the pipeline writes: dvc.lock, params.yaml and the results in models/.

git calls it as `trunkline merge-driver %O %A %B %P` with the three versions in files, and takes what it leaves in %A; `trunkline setup`
tells git so, and .gitattributes names the files. It sees one file at a time and not the merged tree, so what follows from the others is
left to `dvc repro`, which composes, restores or runs it:
- dvc.lock is merged stage by stage (merge_lock.py); what both sides changed is left out, with what depends on it, and named.
- params.yaml is merged key by key. Line 1 keeps a digest of conf/ only where the merged conf/ is the one that it names; elsewhere it says
  that it is not composed yet, and the next run composes it anew. One key in two ways is a conflict; it is named in the file and by git.
- A result (scores, verdict) is one run's: ours stays as it is, never a mixture, until the run that dvc.lock then lacks writes it anew.

`dvc git-hook merge-driver` is for .dvc files: on a dvc.lock it ends in NotImplementedError (`Lockfile.merge`).

Exit codes: 0 merged, 1 a conflict that git reports, 2 wrong usage.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from stages.files import publish
from stages.intact import read_yaml
from stages.operate.git import DRIVER, git
from stages.operate.merge_lock import Entries, merge, order

NOT_COMPOSED = "# Merged by git, and not composed from conf/ yet - run `dvc repro`.\n"
ABSENT = object()


def setup() -> str:
    """Tell git in this clone to merge with this program; returns what was done, in a sentence.

    Raises:
        ConfigError: no git repository.
    """
    program = Path(sys.executable).with_name("trunkline")
    if git("rev-parse", "--git-dir").returncode:
        raise ConfigError(f"{Path.cwd()} is no git repository", "run it in a clone")
    for key, value in {"name": "Trunkline: by stage, by key, or ours", "driver": f"{shlex.quote(str(program))} merge-driver %O %A %B %P"}.items():
        done = git("config", "--local", f"merge.{DRIVER}.{key}", value)
        if done.returncode:
            raise ConfigError(f"git does not take merge.{DRIVER}.{key}: {done.stderr.strip()}", "is .git/config writable?")
    return f"git merges what .gitattributes names with {program}"


def drive(base: Path, ours: Path, theirs: Path, name: str) -> str:
    """Merge one file; the result is in `ours`. Returns what is to be said.

    Args:
        base: the common ancestor's version; an empty file where there is none.
        name: the file's path in the repository.

    Raises:
        DataError: a conflict, or a version that cannot be read; `ours` is then still a file that can be read.
    """
    match Path(name).name:
        case "dvc.lock":
            return merge_locks(base, ours, theirs)
        case "params.yaml":
            return merge_params(base, ours, theirs)
    if name.endswith(".json"):
        return f"{name}: both sides have results; ours stay until the next `trunkline repro` writes those of the merged tree"
    raise DataError(f"{name} is not a file that the pipeline writes", "merge it by hand, or take `merge=binary` from it in .gitattributes")


def merge_locks(base: Path, ours: Path, theirs: Path) -> str:
    """Merge dvc.lock into `ours`."""
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    merged = merge(*(_entries(path) for path in (base, ours, theirs)))
    texts = {"ours": ours.read_text(encoding="utf-8"), "theirs": theirs.read_text(encoding="utf-8")}
    whole = {side: parse_yaml_for_update(text, str(ours)) for side, text in texts.items()}  # as DVC reads and writes it: no byte changes else
    lock = {**whole["ours"]} or {"schema": "2.0"}
    lock["stages"] = {name: whole[side]["stages"][name] for name, side in merged.kept.items()}
    with publish(ours) as temporary:
        temporary.write_text(dumps_yaml(lock), encoding="utf-8")
    if not merged.again:
        return "dvc.lock: merged stage by stage; nothing is to run that was run"
    reasons = "".join(f"\n  {name}: {why}" for name, why in merged.again.items())
    return f"dvc.lock: merged stage by stage; {len(merged.again)} of {len(merged.sides)} stages are to run or be restored:{reasons}\n  → `trunkline repro`"


def _entries(lock: Path) -> Entries:
    """The stages of a dvc.lock; none in an empty file.

    Raises:
        DataError: it is no dvc.lock.
    """
    value = read_yaml(lock) or {}
    stages = value.get("stages", {}) if isinstance(value, Mapping) else None
    if not isinstance(stages, Mapping) or not all(isinstance(entry, Mapping) and "cmd" in entry for entry in stages.values()):
        raise DataError("one side's dvc.lock is none", "`git log dvc.lock` names the commit; take the other side's, then `trunkline repro`")
    return stages


def merge_params(base: Path, ours: Path, theirs: Path) -> str:
    """Merge params.yaml into `ours`.

    Raises:
        DataError: both sides changed one key, differently: ours stays, and is named.
    """
    from conf.__main__ import NOTICE
    from conf.yaml import dump, read

    conflicts: list[tuple[str, Any, Any]] = []
    values = merge_values(read(base) or {}, read(ours) or {}, read(theirs) or {}, conflicts)
    lines = [_first_line(path) for path in (base, ours, theirs)]
    if not any(line.startswith(NOTICE.partition("{")[0]) for line in lines):
        first = ""
    elif lines[1] == lines[2] or lines[0] == lines[2]:  # conf/ is the same on both sides, or only ours changed it
        first = lines[1]
    else:
        first = lines[2] if lines[0] == lines[1] else NOT_COMPOSED
    words = [f"both sides changed {key}: {_word(one)} (ours), {_word(other)} (theirs)" for key, one, other in conflicts]
    with publish(ours) as temporary:
        temporary.write_text((NOT_COMPOSED if words and first else first) + "".join(f"# {line}\n" for line in words) + dump(values), encoding="utf-8")
    if words:
        raise DataError("params.yaml: " + "; ".join(words), "decide in conf/, then `python -m conf` (or `trunkline repro`) and `git add params.yaml`")
    rest = "; line 1 says that it is to be composed from the merged conf/: `trunkline repro`" if first == NOT_COMPOSED else ""
    return f"params.yaml: merged key by key{rest}"


def merge_values(base: Any, ours: Any, theirs: Any, conflicts: list[tuple[str, Any, Any]], path: str = "") -> dict[str, Any]:
    """Three-way merge of mappings, a list as one value; what both changed differently is added to `conflicts`, and ours stays."""
    merged: dict[str, Any] = {}
    for name in order(ours, theirs):
        old: Any
        one: Any
        other: Any
        old, one, other = (side.get(name, ABSENT) if isinstance(side, Mapping) else ABSENT for side in (base, ours, theirs))
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            merged[name] = merge_values(old, one, other, conflicts, f"{path}{name}.")
            continue
        if one not in (other, old) and other != old:
            conflicts.append((f"{path}{name}", one, other))
        if (value := other if one == old else one) is not ABSENT:
            merged[name] = value
    return merged


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline()


def _word(value: Any) -> str:
    from conf.yaml import dump

    return "(absent)" if value is ABSENT else " ".join(dump(value).removesuffix("...\n").split())
