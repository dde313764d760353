"""How soon the commands that do no work answer: `python -m tests.bench.start_up`.

Each runs in a copy of the working tree, in turn with the others and with its floor, so that a busy machine disturbs all alike;
the medians count. The floor is a process that imports what the command cannot do without (Hydra and pydantic to compose, typer for
the command line) and exits. One round before the first warms the page cache and the bytecode.

Cut from `python -m conf`, in seconds of processor time: 0.85 -> 0.53 without compiled modules, 0.64 -> 0.28 with them, each pair
measured within a minute. By profile, of the 0.97 that it took under cProfile:
- the second walk of the defaults list, and YAML parsed in Python: 0.35
- params.yaml written by libyaml, byte for byte what ruamel writes: 0.11 with the import of ruamel
- `defer_build` in the schema, and no docstrings read by pydantic, whose search took 0.075 of the 0.17 of importing it
- no garbage collection while importing: 0.03; no search for pydantic's plugins: 0.01

Tried, and not kept:
- merging plain dictionaries instead of OmegaConf's: 0.014 less, and its rules for `???` to be written again
- importing Hydra's loader without the rest of it: `hydra/__init__` imports all in any case
- skipping a composition that changes nothing by a digest: `dvc repro` does not even start compose then
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
