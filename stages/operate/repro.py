"""`trunkline repro`: `dvc repro`, one at a time in a checkout, after a killed one too.

DVC refuses a second `dvc repro`: while a stage runs it names the process that is in the way, between two stages (hashing, caching) it says
only that there is one. This waits for it instead, and says for whom; puts right what a killed one left (`stages.operate.mend`); and then is `dvc repro`.
Nothing is lost: what was done is in the cache, or is done again. Its stages are forked from a warm parent, `stages.operate.warm`; the bytes are
those of a plain `dvc repro`.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from conf.errors import ConfigError
from stages.files import remove
from stages.intact import cached, md5, read_yaml, recorded
from stages.operate.holders import OURS, holders
from stages.operate.mend import RECORD, mend
from stages.run import WORK


def put_away_parts() -> list[str]:
    """Remove folders of which a `dvc repro --pull --allow-missing` fetched only a part: the next one would take it for the whole.

    Only those whose files are all as dvc.lock names them; the cache keeps these. Returns their paths.
    """
    if not RECORD.exists():
        return []
    lock, found = read_yaml(RECORD), []
    for out in (out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])):
        folder = Path(out["path"])
        if not out.get("md5", "").endswith(".dir") or not folder.is_dir():
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
        DataError: as of `mend`.
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
    for sentence in mend():
        sys.stderr.write(f"{sentence}\n")
    if "--allow-missing" in arguments:
        put_away_parts()
    os.environ["PYTHONHASHSEED"] = "0"  # or each stage would start twice
    if address := warm.start(own):
        os.environ["TRUNKLINE_WARM"] = address
    os.execv(program, [str(program), "repro", *arguments])
