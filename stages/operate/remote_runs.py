"""The run-cache on the remote: what other machines ran, and from what. `dvc repro --pull` brings it here; a plan only reads it."""

from __future__ import annotations

import logging
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

from conf.errors import DataError
from stages.operate.run_cache import is_entry

if TYPE_CHECKING:
    from dvc.repo import Repo

PATIENCE = 10.0
"""Seconds: a remote that does not answer must not keep a plan waiting."""

Runs = dict[str, list[str]]
"""Digest of a stage's inputs -> the texts of its runs."""


def remote_runs(repo: Repo, here: Path) -> Runs:
    """The runs that the default remote has and this machine has not.

    Args:
        repo: with a remote.
        here: folder of this machine's run-cache.

    Raises:
        DataError: the remote cannot be asked: no credentials, no network, or no answer.
    """
    answers: Queue[Runs | Exception] = Queue()

    def ask() -> None:
        try:
            answers.put(_read(repo, here))
        except Exception as error:  # each kind of store has errors of its own, and none of them keeps a plan from being made
            answers.put(error)

    Thread(target=ask, daemon=True).start()  # a pool's thread would be waited for at the end of the process
    try:
        found = answers.get(timeout=PATIENCE)
    except Empty:
        raise DataError(f"the remote did not answer within {PATIENCE:g} s", "") from None
    if isinstance(found, Exception):
        raise DataError(f"the remote cannot be asked: {' '.join(str(found).split()) or type(found).__name__}", "") from found
    return found


def _read(repo: Repo, here: Path) -> Runs:
    logging.getLogger("dvc").setLevel(logging.ERROR)
    store = repo.cloud.get_remote_odb(None, "plan", hash_name="md5-dos2unix")
    runs = store.fs.join(store.path, "runs")
    if not store.fs.exists(runs):
        return {}
    paths = [path for path in store.fs.find(runs) if is_entry(store.fs.name(path)) and not here.joinpath(*store.fs.parts(path)[-3:]).exists()]
    found: Runs = {}
    for path, text in zip(paths, store.fs.cat_ranges(paths, None, None) if paths else (), strict=True):
        found.setdefault(store.fs.name(store.fs.parent(path)), []).append(bytes(text).decode())
    return found
