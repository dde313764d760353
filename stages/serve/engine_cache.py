"""The folders that ctranslate2 opens, made once per machine of what is stored of them.

The cache is keyed by digest ($TRUNKLINE_ENGINES, else .dvc/tmp/trunkline/engines in a repository, else ~/.cache/trunkline/engines), and a digest is
checked at every opening, so what is evaluated, attacked and served are the same bytes.

SmolLM2-135M, one thread, processor time (the machine was shared) and peak of the resident memory of a process that opens the engine,
ctranslate2's own loading included: 1.2 s and 324 MiB at the first start, most of it the base's mapped file; 0.4 s and 202 MiB at
later ones; 0.3 s and 201 MiB for an engine that is stored whole. The Bento holds 281 MB of model, and 140 MB with the whole engine.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.errors import ModelError
from stages.files import publish, remove, sha256
from stages.serve.materialise import RECIPE, Recipe, materialise, read_recipe

KEPT = 4
"""Engines that are kept: those used last."""
UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}

log = logging.getLogger(__name__)


def cache() -> Path:
    """Where materialised engines are kept."""
    if named := os.environ.get("TRUNKLINE_ENGINES"):
        return Path(named)
    if Path(".dvc").is_dir():
        return Path(".dvc/tmp/trunkline/engines")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trunkline" / "engines"


@contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """Give the folder that ctranslate2 opens; until the end of the block no other process makes or removes one.

    A folder without a recipe is given as it is.

    Raises:
        ModelError: the engine cannot be made, or the cache cannot be written.
    """
    if not (folder / RECIPE).is_file():
        yield folder
        return
    recipe, kept = read_recipe(folder / RECIPE), cache()
    with locked(kept):
        with writable(kept):
            engine = take(folder, recipe, kept)
        yield engine


@contextmanager
def locked(kept: Path) -> Iterator[None]:
    """Hold the cache; the lock ends with the process, however that ends."""
    with writable(kept):
        kept.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(kept / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writable(kept: Path) -> Iterator[None]:
    """Tell in a sentence when the cache cannot be written.

    Raises:
        ModelError: the disk is full or read-only, or the folder is another user's.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ModelError(f"{kept}: {error.strerror}", "free some space, or name a folder that can be written in TRUNKLINE_ENGINES") from error


def take(folder: Path, recipe: Recipe, kept: Path) -> Path:
    """The engine in the cache, made if it is not there or not what it should be; older ones and what a killed process left go."""
    engine = kept / recipe.engine
    if engine.is_dir() and sha256(engine) != recipe.engine:
        log.warning("%s is damaged, and made again", engine)
        remove(engine)
    if not engine.is_dir():
        with publish(engine) as out:
            materialise(folder, recipe, out)
    os.utime(engine)
    found = sorted((path for path in kept.iterdir() if path.is_dir()), key=lambda path: (path != engine, path.name.startswith("."), -path.stat().st_mtime_ns))
    for path in [*found[KEPT:], *(path for path in found[:KEPT] if path.name.startswith("."))]:
        remove(path)
    return engine
