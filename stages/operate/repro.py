"""`trunkline repro`: `dvc repro`, one at a time in a checkout, after a killed one too.

DVC refuses a second `dvc repro`: while a stage runs it names the process that is in the way, between two stages (hashing, caching) it says
only that there is one. This waits for it instead, and says for whom. DVC writes dvc.lock and its list of locks in place, and takes what it
was writing of its run-cache for an entry, so that a kill in that moment leaves half of one, which no later `dvc repro` can read: this
removes it. Nothing is lost with it; what was done is in the cache, or is done again. Its stages are forked from a warm parent,
`stages.operate.warm`; the bytes are those of a plain `dvc repro`.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from stages.files import read_json, remove
from stages.intact import cached, md5, read_yaml, recorded
from stages.operate.run_cache import unfinished
from stages.run import WORK

LOCK, LOCKS, OURS = Path(".dvc/tmp/lock"), Path(".dvc/tmp/rwlock"), WORK / "repro.lock"
RECORD = Path("dvc.lock")


def entries() -> list[dict[str, Any]]:
    """Who is in DVC's list of locks: `pid` and `cmd` of each.

    Raises:
        DataError: it is no JSON.
    """
    if not LOCKS.exists():
        return []
    locks = read_json(LOCKS)
    return [*locks.get("write", {}).values(), *(reader for readers in locks.get("read", {}).values() for reader in readers)]


def alive(entry: dict[str, Any]) -> bool:
    """Whether the process still runs, and is not another one that got its number."""
    import psutil

    try:
        return "dvc" in " ".join(psutil.Process(entry["pid"]).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def holders() -> Iterator[int]:
    """The processes that hold DVC's locks, or the one of another `trunkline repro`; 0: it does not say which."""
    for file in (LOCK, OURS):
        if file.exists():
            with file.open() as held:
                try:
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield int(held.read().strip() or 0)
    with suppress(DataError):
        yield from (entry["pid"] for entry in entries() if alive(entry))


def is_whole(lock: Path) -> bool:
    """Whether DVC wrote a dvc.lock to its end. It writes from the first stage to the last, so one cut short is cut in its last entry.

    One cut between two outputs, or between two stages, is whole by this; DVC then finds the rest missing, and makes it.
    """
    try:
        value = read_yaml(lock)
    except DataError:
        return False
    if not isinstance(value, Mapping) or not value.get("stages") or not lock.read_bytes().endswith(b"\n"):
        return False
    last = list(value["stages"].values())[-1]
    if not last or not all(last.values()):
        return False
    for entry in (last[kind][-1] for kind in ("deps", "outs") if kind in last):
        if not entry.get("path") or len(entry) < 2 or ("hash" in entry and not {"md5", "size"} <= entry.keys()):
            return False
        if entry.get("md5", "").endswith(".dir") and "nfiles" not in entry:
            return False
    return all(last["params"].values()) if "params" in last else True


def mend() -> list[str]:
    """Remove what a killed DVC left, locks of the dead and what it wrote half; returns what was half."""
    found = []
    try:
        if (left := entries()) and not any(map(alive, left)):
            remove(LOCKS)
    except DataError:
        found.append(LOCKS)
    if RECORD.exists() and not is_whole(RECORD):
        found.append(RECORD)
    if Path(".dvc/config").exists():
        found += unfinished()
    for path in found:
        remove(path)
    return [str(path) for path in found]


def put_away_parts() -> list[str]:
    """Remove folders of which a `dvc repro --pull --allow-missing` fetched only a part: the next one would take it for the whole.

    Only those whose files are all as dvc.lock names them; the cache keeps these. Returns their paths.
    """
    if not RECORD.exists():
        return []
    lock, found = read_yaml(RECORD), []
    for out in (out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])):
        folder = Path(out["path"])
        if not out["md5"].endswith(".dir") or not folder.is_dir():
            continue
        named = dict(recorded(lock, [out["path"]]))
        here = [path for path in folder.rglob("*") if path.is_file()]
        if len(here) < len(named) and all(path in named and md5(path) == named[path] and cached(named[path]) for path in here):
            remove(folder)
            found.append(str(folder))
    return found


def repro(arguments: list[str]) -> None:
    """Wait, mend, start a warm parent for the stages, and become `dvc repro`.

    Raises:
        ConfigError: DVC is not installed here.
    """
    from stages.operate import warm

    program = Path(sys.executable).with_name("dvc")
    if not program.exists():
        raise ConfigError(f"there is no {program}", "pip install -r requirements.txt")
    said = False
    while (held := next(holders(), None)) is not None:
        if not said:
            sys.stderr.write(f"waiting for process {held or '(unknown)'}, which runs this pipeline\n")
            said = True
        time.sleep(0.5)
    WORK.mkdir(parents=True, exist_ok=True)
    own = os.open(OURS, os.O_RDWR | os.O_CREAT)
    fcntl.flock(own, fcntl.LOCK_EX)
    os.ftruncate(own, 0)
    os.write(own, str(os.getpid()).encode())
    os.set_inheritable(own, True)  # dvc holds it as long as it lives, and its stages do not
    for path in mend():
        sys.stderr.write(f"{path} was half-written when DVC was killed, and is removed: what was done comes from the cache, or is done again\n")
    if "--allow-missing" in arguments:
        put_away_parts()
    os.environ["PYTHONHASHSEED"] = "0"  # or each stage would start twice
    if address := warm.start(own):
        os.environ["TRUNKLINE_WARM"] = address
    os.execv(program, [str(program), "repro", *arguments])
