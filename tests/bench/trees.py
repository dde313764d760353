"""What the benchmarks of whole commands share: a copy of the working tree, and a warm, fair environment to run in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.checkout import working_tree

__all__ = ["environment", "timed", "working_tree"]


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """The environment of `make`: this interpreter first on PATH, fixed hashes; modules come from `folder`, bytecode from `cache`.

    Compiled modules are kept whatever the caller's PYTHONDONTWRITEBYTECODE says: without them most of what is measured is the
    compiler, on both sides.
    """
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": str(folder), "PYTHONPYCACHEPREFIX": str(cache), "PYTHONHASHSEED": "0"}


def timed(command: Sequence[str], folder: Path, env: Mapping[str, str], expected: int = 0) -> float:
    """Seconds that a command takes; its exit code is held against the expected one.

    Raises:
        RuntimeError: it exits otherwise; with what it said.
    """
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}, not {expected}\n{done.stdout}\n{done.stderr}")
    return seconds
