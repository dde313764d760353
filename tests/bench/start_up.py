"""How soon the commands that do no work answer: `python -m tests.bench.start_up`.

Each runs in a copy of the working tree, in turn with the others and with its floor, so that a busy machine disturbs all alike;
the medians count. The floor is a process that imports what the command cannot do without (Hydra and pydantic to compose, typer for
the command line) and exits. One round before the first warms the page cache and the bytecode.

Cut, in seconds of `python -m conf` (0.83 without compiled modules and 0.55 with them at first, 0.49 and 0.25 now):
- one walk of the defaults list instead of two, over files read once by libyaml: 0.20
- params.yaml written and compared by libyaml, byte for byte what ruamel writes: 0.11
- `defer_build` in the schema, and no docstrings read by pydantic: 0.07
- no garbage collection, no search for pydantic's plugins: 0.05

Tried, and not kept:
- merging plain dictionaries instead of OmegaConf's: 0.01, and its rules for `???` to be written again
- importing Hydra's loader without the rest of it: `hydra/__init__` imports all in any case
- stdlib dataclasses under one pydantic adapter: 0.03, and the schema's classes would no longer check what tests build
- keeping the last composition's digest to skip a composition that changes nothing: `dvc repro` does not even start compose then
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rows import Row, show
from tests.bench.trees import environment, timed, working_tree
from tests.test_pipeline import STAGES

BAR = 0.5
"""Seconds."""
ROUNDS = 7
COMPOSE = ("-c", "import hydra, omegaconf, pydantic, yaml; from pydantic import TypeAdapter; from pydantic.dataclasses import dataclass")
TYPER = ("-c", "import typer")
STAGE = ("-c", "import pydantic; from pydantic import TypeAdapter; from pydantic.dataclasses import dataclass")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command and what it is held against."""

    arguments: Sequence[str]
    floor: Sequence[str]
    exit_code: int = 0
    without_params: bool = False
    """Whether params.yaml is removed before it runs."""
    broken: bool = False
    """Whether a file of conf/ holds mistakes while it runs."""


COMMANDS = {
    "trunkline --help": Command(arguments=("-m", "stages.operate.cli", "--help"), floor=TYPER),
    "trunkline use": Command(arguments=("-m", "stages.operate.cli", "use", "tiny"), floor=TYPER),
    "trunkline config": Command(arguments=("-m", "stages.operate.cli", "config"), floor=COMPOSE),
    "compose anew": Command(arguments=("-m", "conf"), floor=COMPOSE, without_params=True),
    "compose, nothing changed": Command(arguments=("-m", "conf"), floor=COMPOSE),
    "compose, three mistakes": Command(arguments=("-m", "conf"), floor=COMPOSE, exit_code=2, broken=True),
    **{f"{stage} without params.yaml": Command(arguments=("-m", f"stages.{stage}"), floor=STAGE, exit_code=2, without_params=True) for stage in STAGES},
}


def measure(rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
    """Command -> median seconds of it and of its floor."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    floors: dict[Sequence[str], list[float]] = {command.floor: [] for command in COMMANDS.values()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tree"
        folder.mkdir()
        working_tree(folder, "tiny")
        env = environment(folder, Path(scratch) / "bytecode")
        params, broken = folder / "params.yaml", folder / "conf/tune/sft.yaml"
        good = broken.read_text(encoding="utf-8")
        for number in range(rounds + 1):
            for name, command in COMMANDS.items():
                timed([sys.executable, "-m", "conf"], folder, env)
                if command.without_params:
                    params.unlink()
                if command.broken:
                    broken.write_text(f"{good}\nlearning_rat: 1\nbatch: many\nwarmup: 2.0\n", encoding="utf-8")
                taken = timed([sys.executable, *command.arguments], folder, env, command.exit_code)
                broken.write_text(good, encoding="utf-8")
                if number:
                    seconds[name].append(taken)
            for floor, taken_by in floors.items():
                taken = timed([sys.executable, *floor], folder, env)
                if number:
                    taken_by.append(taken)
    return {name: (statistics.median(seconds[name]), statistics.median(floors[command.floor])) for name, command in COMMANDS.items()}


def rows() -> list[Row]:
    """One row per command; of the stages that stop, the slowest."""
    found = measure()
    stopped = {name: taken for name, taken in found.items() if name.endswith(" without params.yaml")}
    slowest = max(stopped, key=lambda name: stopped[name][0])
    shown = {name: taken for name, taken in found.items() if name not in stopped} | {f"slowest of {len(stopped)} stages to stop: {slowest}": stopped[slowest]}
    return [
        Row(what=name, ours=f"{ours:.2f} s", theirs=f"{floor:.2f} s (its imports)", ratio=ours / floor, bar=f"{BAR} s", met=ours < BAR)
        for name, (ours, floor) in shown.items()
    ]


def main() -> None:
    """Print the table."""
    show(rows())


if __name__ == "__main__":
    main()
