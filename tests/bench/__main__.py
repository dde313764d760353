"""Every benchmark with a bar, in one table: `python -m tests.bench [--markdown] [name …]`, or `make bench`.

Each benchmark is a module of this folder whose `rows()` measures both sides in one run, and runs in a process of its own, so
that none inherits another's imports, threads or memory. A bar that is missed, and a benchmark that fails, is shown as such.
Exit codes: 0 every bar is met, 1 one is missed or a benchmark failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.bench.rows import markdown, show
from tests.bench.together import NAMES, measure_all


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
