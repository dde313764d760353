"""The pipeline: one module per batch stage, run as `python -m stages.<name>`; `serve/` the service, `operate/` the verbs."""

from __future__ import annotations

import sys
from types import TracebackType


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell an interruption in a sentence, and all else with its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted before it began; `dvc repro` goes on from here.\n")
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # a stage as a process: Ctrl-C while it still imports, which `stages.run` cannot see
    sys.excepthook = tell
