"""How a stage runs as a process: fixed hash seed and time zone, one-sentence errors, progress on a terminal, and a cost record.

Exit codes: 0 done, 1 a check held, a source failed or the disk is full, 2 the configuration is wrong, 130 interrupted.
Time and memory vary from run to run, so they go to `.dvc/tmp/trunkline/costs.jsonl`, which no stage depends on. The memory is what the
process had resident at most. Under `trunkline repro` that counts the pages which it shares with its warm parent, also those of libraries
that it never uses: `start_bytes`, what was resident when it began, tells them from the stage's own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from tempfile import NamedTemporaryFile, gettempdir
from typing import TypeVar

from conf.errors import TrunklineError
from stages.files import DISK, WRITING, remove
from stages.intact import check_inputs

WORK = Path(".dvc/tmp/trunkline")
COSTS = WORK / "costs.jsonl"
STAGES_AT_WORK = WORK / "at_work"
"""A file for each stage, locked while it runs; holds the number of the process."""
REFUSALS = [os.strerror(code) for code in sorted(DISK)]
"""What a disk may refuse, and how that reads: libraries often keep only the words."""
FULL = re.compile("database or disk is full|PytorchStreamWriter failed writing|write failed|Failed to write")
"""How libraries say that a file could not be written without saying why."""

ROOM = 16 << 20
"""Bytes: a disk with less is full."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def disk_trouble(error: BaseException | None) -> str | None:
    """The disk's refusal behind an error, with the file or folder; null: the disk is not to blame."""
    words, place = "", ""
    while error is not None:
        place = next((note.removeprefix(WRITING) for note in getattr(error, "__notes__", []) if note.startswith(WRITING)), place)
        if isinstance(error, OSError) and error.errno in {*DISK, errno.EACCES}:
            words, place = os.strerror(error.errno), str(error.filename or place)
        words = words or refusal(str(error))
        error = error.__cause__ or error.__context__
    full = [str(folder) for folder in (Path(), Path("data"), Path("models"), WORK, Path(gettempdir())) if folder.exists() and disk_usage(folder).free < ROOM]
    return f"{words}: {place or ', '.join(full) or 'a disk that it writes to'}" if words else None


def refusal(said: str) -> str:
    """The disk's words in a library's or a program's message; empty: it says nothing of a disk."""
    return next((words for words in REFUSALS if words in said), os.strerror(errno.ENOSPC) if FULL.search(said) else "")


def settle() -> None:
    """Set what the environment fixes for every stage, before a library reads it."""
    os.environ |= {"TZ": "UTC", "LC_ALL": "C.UTF-8"}  # Great Expectations prints times in the local zone; what a stage starts speaks one language
    time.tzset()
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "BENTOML_DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main` as this process, and exit with its code."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    settle()
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False, show_time=False)])
    for name in ("stages", "__main__"):  # a stage's own module is __main__ here
        logging.getLogger(name).setLevel(logging.INFO)
    stage = sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix("stages.") if "-m" in sys.orig_argv else "stage"

    def stop(told: str, code: int) -> None:
        console.print(f"[bold red]{stage} stopped[/] ", end="")
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        sys.exit(code)

    started, start_bytes = time.monotonic(), resident_bytes()
    try:
        with running(stage):
            if "DVC_STAGE" in os.environ:
                check_inputs(stage)
            main()
        record(stage, time.monotonic() - started, start_bytes)
    except TrunklineError as error:
        stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        console.print(f"{stage} interrupted; nothing half-written was kept. `dvc repro` goes on from here.", soft_wrap=True)
        sys.exit(130)
    except Exception as error:  # of any library; the disk's refusal is told, all else keeps its traceback
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        stop(f"{trouble}\n  → free some space or make it writable, then `dvc repro`: nothing half-written was kept", 1)


@contextmanager
def running(stage: str) -> Iterator[None]:
    """While no other process runs this stage here: one whose DVC was killed may still write its outputs.

    The lock is the process's own, which neither a worker that outlives it nor a program that it starts keeps.
    """
    if not Path(".dvc").is_dir():
        yield
        return
    STAGES_AT_WORK.mkdir(parents=True, exist_ok=True)
    held = os.open(STAGES_AT_WORK / stage, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            log.warning("waiting for process %s, which still runs %s", os.read(held, 20).decode() or "(unknown)", stage)
            fcntl.lockf(held, fcntl.LOCK_EX)
        os.ftruncate(held, 0)
        os.pwrite(held, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(held)


def at_work() -> Iterator[int]:
    """Processes that run a stage here; 0: it does not say which."""
    for path in sorted(STAGES_AT_WORK.glob("*")):
        with path.open("r+") as held:
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield int(held.read().strip() or 0)


def resident_bytes() -> int:
    """Memory of this process that is resident now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize() if statm.exists() else 0


def record(stage: str, seconds: float, start_bytes: int) -> None:
    """Add a line to the cost record; on a line of its own, also where the last one was cut short."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cost = {"stage": stage, "seconds": round(seconds, 2), "peak_bytes": 1024 * max(own, children), "start_bytes": start_bytes, "at": int(time.time())}
    WORK.mkdir(parents=True, exist_ok=True)
    whole = not COSTS.exists() or COSTS.read_bytes()[-1:] in (b"", b"\n")
    with COSTS.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(cost) + "\n")


@contextmanager
def scratch(name: str, parent: Path = WORK) -> Iterator[Path]:
    """A new folder `<parent>/<name>-<random>` while a run lasts; those of killed runs are removed first.

    New, so that a worker which outlives its killed stage never writes into the next run's. A lock beside the folder, which the
    system frees with the process, tells the killed from the living.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in sorted({path.with_suffix("") for path in parent.glob(f"{name}-*")}):
        lock = left.with_suffix(".lock")
        with lock.open("a") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            remove(left)
            remove(lock)
    with NamedTemporaryFile(dir=parent, prefix=f"{name}-", suffix=".lock") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        folder = Path(own.name).with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            remove(folder)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar on a terminal, silently elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total=total, console=console, disable=not console.is_terminal)
