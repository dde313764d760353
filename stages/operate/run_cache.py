"""The entries of DVC's run-cache: what a stage made of which inputs, a file each, `runs/ab/ab…(inputs)/…(entry)`, both named by SHA-256.

DVC writes an entry under another name beside the others, `.….tmp`, and takes the newest file there for the newest entry: one that a kill
cut short too, which it then reads as far as it goes. It makes the folder first, and cannot go on where that is empty.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

from stages.intact import CACHE, shared

ENTRY = re.compile(r"[0-9a-f]{64}")
WRITING = 1.0
"""Seconds: a file under another name that is older belongs to no DVC that still writes it, for it takes milliseconds."""


def is_entry(name: str) -> bool:
    """Whether a file there is an entry, and not what a DVC writes, or wrote when it was killed."""
    return ENTRY.fullmatch(name) is not None


def unfinished() -> Iterator[Path]:
    """What killed DVCs left in the run-cache of this checkout: half entries, and then folders without any, for whoever removes each as it comes.

    Waits for what is as recent as that another one may write it, for the cache may be shared.
    """
    runs = (CACHE if CACHE.is_dir() else shared(Path.cwd())).parent.parent / "runs"
    for path in itertools.chain([path for path in runs.glob("*/*/*") if not is_entry(path.name)], (path for path in runs.glob("*/*") if empty(path))):
        try:
            time.sleep(max(0.0, min(path.stat().st_mtime + WRITING - time.time(), WRITING)))
        except FileNotFoundError:
            continue
        if path.is_file() or empty(path):
            yield path


def empty(path: Path) -> bool:
    """Whether it is a folder with nothing in it."""
    return path.is_dir() and next(path.iterdir(), None) is None
