"""How long composing takes, beside the bare import of Hydra and a bare interpreter: `python -m tests.bench.compose_time`.

Each command runs ten times in turn, so that a noisy machine disturbs all three alike; the medians and their ratios count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from tests.conftest import ROOT

COMMANDS = {
    "python -m conf": ["-m", "conf"],
    "python -m conf --check": ["-m", "conf", "--check"],
    "trunkline --help": ["-m", "stages.operate.cli", "--help"],
    "import hydra": ["-c", "import hydra"],
    "bare interpreter": ["-c", ""],
}


def main(rounds: int = 10) -> None:
    """Print the table."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["import hydra"])
    table = Table("command", "median, s", "times `import hydra`")
    for name, found in seconds.items():
        table.add_row(name, f"{statistics.median(found):.2f}", f"{statistics.median(found) / base:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
