"""`trunkline repro`: `dvc repro`, one at a time in a checkout, after a killed one too.

DVC refuses a second `dvc repro`: while a stage runs it names the process that is in the way, between two stages (hashing, caching)
it says only that there is one. This waits for it instead, and says for whom. DVC writes dvc.lock and its list of locks in place, so
that a kill in that moment leaves half of one, which no later `dvc repro` can read: this removes it. Nothing is lost with it; what was
done is in the cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conf.errors import ConfigError
from stages.files import remove
from stages.intact import read_yaml
from stages.run import WORK

LOCK, LOCKS, OURS = Path(".dvc/tmp/lock"), Path(".dvc/tmp/rwlock"), WORK / "repro.lock"
RECORD = Path("dvc.lock")


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def holders() -> Iterator[int]:
    """The processes that DVC's locks, or another `trunkline repro`, wait for."""
    for file in (LOCK, OURS):
        if file.exists():
            with file.open() as held:
                try:
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield int(held.read().strip() or 0)
    try:
        locks = json.loads(LOCKS.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    entries = [*locks.get("write", {}).values(), *(entry for entries in locks.get("read", {}).values() for entry in entries)]
    yield from sorted({entry["pid"] for entry in entries if alive(entry["pid"])})


def mend() -> list[str]:
    """Remove what a killed DVC wrote half; returns what."""
    from yaml import YAMLError

    found = []
    if LOCKS.exists():
        try:
            json.loads(LOCKS.read_text(encoding="utf-8"))
        except ValueError:
            found.append(LOCKS)
    if RECORD.exists():
        try:
            whole = "stages" in (read_yaml(RECORD) or {})
        except YAMLError:
            whole = False
        if not whole:
            found.append(RECORD)
    for path in found:
        remove(path)
    return [str(path) for path in found]


def repro(arguments: list[str]) -> None:
    """Wait, mend, and become `dvc repro`.

    Raises:
        ConfigError: DVC is not installed here.
    """
    said = False
    while held := next(holders(), None):
        if not said:
            sys.stderr.write(f"waiting for process {held}, which runs this pipeline\n")
            said = True
        time.sleep(0.5)
    WORK.mkdir(parents=True, exist_ok=True)
    own = os.open(OURS, os.O_RDWR | os.O_CREAT)
    fcntl.flock(own, fcntl.LOCK_EX)
    os.ftruncate(own, 0)
    os.write(own, str(os.getpid()).encode())
    os.set_inheritable(own, True)  # dvc holds it as long as it lives, and its stages do not
    for path in mend():
        sys.stderr.write(f"{path} was half-written when DVC was killed, and is removed: what was done comes from the cache\n")
    program = Path(sys.executable).with_name("dvc")
    if not program.exists():
        raise ConfigError(f"there is no {program}", "pip install -r requirements.txt")
    os.execv(program, [str(program), "repro", *arguments])
