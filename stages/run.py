"""How a stage runs as a process: fixed hash seed and time zone, one-sentence errors, progress on a terminal, and a cost record.

Exit codes: 0 done, 1 a check held or a source failed, 2 the configuration is wrong, 130 interrupted.
Time and memory vary from run to run, so they go to `.dvc/tmp/trunkline/costs.jsonl`, which no stage depends on.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from conf.errors import TrunklineError

WORK = Path(".dvc/tmp/trunkline")
COSTS = WORK / "costs.jsonl"

T = TypeVar("T")
log = logging.getLogger(__name__)


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main` as this process, and exit with its code."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
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
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False, show_time=False)])
    for name in ("stages", "__main__"):  # a stage's own module is __main__ here
        logging.getLogger(name).setLevel(logging.INFO)
    stage = sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix("stages.") if "-m" in sys.orig_argv else "stage"
    started = time.monotonic()
    try:
        main()
    except TrunklineError as error:
        console.print(f"[bold red]{stage} stopped[/] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print(f"{stage} interrupted; nothing half-written was kept. `dvc repro` goes on from here.")
        sys.exit(130)
    except OSError as error:
        if error.errno not in (28, 30, 122):  # no space, read-only, quota
            raise
        console.print(f"[bold red]{stage} stopped[/] {error.strerror}: {error.filename or 'the disk'}. Free some space or make it writable, then `dvc repro`.")
        sys.exit(1)
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cost = {"stage": stage, "seconds": round(time.monotonic() - started, 2), "peak_bytes": 1024 * max(own, children), "at": int(time.time())}
    WORK.mkdir(parents=True, exist_ok=True)
    with COSTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cost) + "\n")


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items under a progress bar on a terminal, silently elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total=total, console=console, disable=not console.is_terminal)
