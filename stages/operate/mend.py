"""What a kill or an interruption of DVC leaves, put right before the next run.

DVC writes dvc.lock, params.yaml (`dvc exp run -S`) and its list of locks in place, and takes what it was writing of its run-cache for an entry, so that a
kill in that moment leaves half of one, which no later `dvc repro` can read, or reads as far as it goes. What it copies out of the cache has another name
meanwhile, which stays. And what an interrupted run had let git ignore, it takes back, of stages that are done too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from conf.errors import DataError
from stages.files import publish, remove
from stages.intact import read_yaml
from stages.operate.git import file_at, git
from stages.operate.holders import LOCKS, alive, entries
from stages.operate.objects import outputs
from stages.operate.run_cache import unfinished
from stages.run import WORK

RECORD, PARAMS, PIPELINE = Path("dvc.lock"), Path("params.yaml"), Path("dvc.yaml")
KEPT, KEPT_FOR = WORK / "dvc.lock", WORK / "dvc.lock.head"
"""dvc.lock as it was when `trunkline repro` last began, and git's name of the one that was committed then."""
COPYING = re.compile(r"\.[\w-]{22}\.tmp")
"""What DVC calls a file that it copies out of its cache."""
CONFLICT = re.compile(rb"^(<{7}|={7}|>{7})", re.MULTILINE)


def mend() -> list[str]:
    """Put all of it right; returns what was found, a sentence each. Only while nobody else works here."""
    said = []
    try:
        if (left := entries()) and not any(map(alive, left)):
            remove(LOCKS)
    except DataError:
        remove(LOCKS)
        said.append(f"{LOCKS} was half-written when DVC was killed, and is removed")
    if RECORD.exists():
        said += _mend_record()
    if PARAMS.exists():
        try:
            read_yaml(PARAMS)
        except DataError:
            remove(PARAMS)
            said.append(f"{PARAMS} was half-written when DVC was killed, and is removed: it is composed anew")
    for path in unfinished() if Path(".dvc/config").exists() else ():
        remove(path)
        said.append(f"{path} was half-written when DVC was killed, and is removed")
    for path in [path for folder in ("data", "models") for path in Path(folder).rglob(".*.tmp") if COPYING.fullmatch(path.name)]:
        remove(path)
    if RECORD.exists() and PIPELINE.exists():
        ignore_again()
    return said


def _mend_record() -> Iterator[str]:
    """Put back the dvc.lock of before if this one is half; keep a whole one for the next time.

    Raises:
        DataError: a merge left its marks in it.
    """
    text = RECORD.read_bytes()
    if CONFLICT.search(text):
        raise DataError(f"{RECORD} has git's marks of a conflict", "`trunkline setup`, and merge again; or `git checkout --ours dvc.lock`, and this again")
    committed = git("rev-parse", "--verify", "--quiet", f"HEAD:{RECORD}").stdout
    if is_whole(RECORD):
        for path, content in ((KEPT, text), (KEPT_FOR, committed.encode())):
            with publish(path) as temporary:
                temporary.write_bytes(content)
        return
    known = KEPT.exists() and KEPT_FOR.exists() and KEPT_FOR.read_text(encoding="utf-8") == committed  # else the commit knows more
    before = KEPT.read_bytes() if known else (file_at("HEAD", str(RECORD)) or "").encode()
    if before:
        with publish(RECORD) as temporary:
            temporary.write_bytes(before)
        yield f"{RECORD} was half-written when DVC was killed, and is again what it was: what was done since comes from the cache, or is done again"
    else:
        remove(RECORD)
        yield f"{RECORD} was half-written when DVC was killed, and is removed: what was done comes from the cache, or is done again"


def is_whole(lock: Path) -> bool:
    """Whether DVC wrote a dvc.lock to its end. It writes from the first stage to the last, so one cut short is cut in its last entry.

    One cut between two outputs, or between two stages, is whole by this; DVC then finds the rest missing, and makes it.
    """
    try:
        value = read_yaml(lock)  # what is cut off behind a colon is an empty text, which DVC never writes
    except DataError:
        return False
    if not isinstance(value, Mapping) or value.get("stages", "") == "" or not lock.read_bytes().endswith(b"\n"):
        return False
    if not value["stages"]:
        return True
    last = list(value["stages"].values())[-1]
    if not isinstance(last, Mapping) or "cmd" not in last or "" in last.values() or "" in last.get("params", {}).values():
        return False
    return all(_is_whole_entry(last[kind][-1]) for kind in ("deps", "outs") if last.get(kind))


def _is_whole_entry(entry: object) -> bool:
    """Of a file or folder."""
    if not isinstance(entry, Mapping) or "" in entry.values() or entry.keys() == {"path", "hash"}:
        return False  # one with a path alone was not written by its stage
    return "md5" not in entry or ("size" in entry and ("nfiles" in entry or not entry["md5"].endswith(".dir")))


def ignore_again() -> None:
    """Let git ignore what DVC keeps."""
    names = [item.path for item in outputs(RECORD.read_text(encoding="utf-8"), PIPELINE.read_text(encoding="utf-8"))]
    asked = subprocess.run(["git", "check-ignore", "--no-index", "--stdin"], input="\n".join(names), capture_output=True, text=True, check=False)
    if asked.returncode not in (0, 1):  # no repository
        return
    for path in map(Path, sorted({*names} - {*asked.stdout.splitlines()})):
        if path.parent.is_dir():
            ignored = path.parent / ".gitignore"
            before = ignored.read_text(encoding="utf-8") if ignored.exists() else ""
            with publish(ignored) as temporary:
                temporary.write_text(f"{before}{'' if before.endswith(chr(10)) or not before else chr(10)}/{path.name}\n", encoding="utf-8")
