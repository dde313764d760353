"""Every benchmark with a bar, in one table: `python -m tests.bench [--markdown] [name …]`, or `make bench`.

Each benchmark is a module of this folder whose `rows()` measures both sides in one run, and runs in a process of its own, so
that none inherits another's imports, threads or memory. A bar that is missed, and a benchmark that fails, is shown as such.
Exit codes: 0 every bar is met, 1 one is missed or a benchmark failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from tests.bench.rows import Row, markdown, show

NAMES = ("evaluate", "tune", "preprocess", "pipeline", "start_up", "storage")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what has a bar, beside what it is compared with.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"only these of: {', '.join(NAMES)}")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, for the README")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    found = measure_all(options.names or NAMES)
    if options.markdown:
        sys.stdout.write(markdown(found))
    else:
        show(found)
    return 0 if all(row.met for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
