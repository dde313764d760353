"""Who works in this checkout: the processes that hold DVC's locks, that of another `trunkline repro`, or that of a stage."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.errors import DataError
from stages.files import read_json
from stages.run import WORK, at_work

LOCK, LOCKS, OURS = Path(".dvc/tmp/lock"), Path(".dvc/tmp/rwlock"), WORK / "repro.lock"


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
        process = psutil.Process(entry["pid"])
        since = LOCKS.stat().st_mtime if LOCKS.exists() else process.create_time()
        return process.create_time() <= since + 1 and any(Path(word).name == "dvc" for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def holders() -> Iterator[int]:
    """The processes that work here; 0: it does not say which."""
    for file in (LOCK, OURS):
        if file.exists():
            with file.open() as held:
                try:
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield int(held.read().strip() or 0)
    with suppress(DataError):
        yield from (entry["pid"] for entry in entries() if alive(entry))
    yield from at_work()  # one whose DVC was killed lives on
