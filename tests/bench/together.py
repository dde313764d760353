"""Run benchmarks one after another, each in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.bench.rows import Row

NAMES = ("evaluate", "tune", "preprocess", "pipeline", "start_up", "storage", "operate", "serve", "load", "events", "guard", "guard_runtime", "pii")


def measure(name: str) -> list[Row]:
    """The rows of one benchmark, measured in this process."""
    found: list[Row] = importlib.import_module(f"tests.bench.{name}").rows()
    return found


def measure_all(names: Sequence[str]) -> list[Row]:
    """The rows of all, one benchmark after another; one that fails is a row that is not met, and its traceback goes to stderr."""
    found: list[Row] = []
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in names:
            sys.stderr.write(f"{name} …\n")
            result = pool.submit(measure, name)
            if (error := result.exception()) is None:
                found += result.result()
            else:
                traceback.print_exception(error)
                found.append(Row(what=name, ours=f"failed: {error!r}", theirs="", ratio=float("nan"), bar="", met=False))
    return found
