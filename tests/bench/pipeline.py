"""The whole `tiny` pipeline beside a plain script, and a `dvc repro` that has nothing to do beside a bare one: `python -m tests.bench.pipeline`.

Three run in copies of the working tree, in turn, warm: once before anything counts, so that downloads, bytecode and the page cache are
there. `trunkline repro` is what `make` runs: DVC beside a parent that imports the libraries once and forks the stages; a plain `dvc
repro` starts each anew; the script is one process that calls the same stages' `main()` one after another, without DVC. Before every run
its outputs, DVC's cache and the stages' work folders are removed, so that none finds anything done. All must write the same bytes, and
both repros the same dvc.lock, or the measurement is refused.

Where the time goes: a shim in the place of `python` notes when each stage's process begins and ends; the interpreter's own
PYTHONPROFILEIMPORTTIME, in a run of its own, says what of it are imports; what remains is DVC's. Processor time counts every process,
the warm parent too, which works on a core of its own while the first stages run.

The no-op: as many stages with one dependency and one output each, `cp` from one to the next, beside ours after a whole run.

Found by profiling, in seconds of one core:
- imports: 2.5 Great Expectations, 1.1 torch, 2.0 the trainer of transformers, 0.1 to 0.4 each of the others; a forked stage imports for
  0.2, of this repository's modules
- at its end Python takes apart every module that was ever imported. With all libraries loaded that is longer than the gate: a forked
  stage ends as a child of multiprocessing does
- DVC reads params.yaml once for each stage of a no-op and three times for each stage that runs, and dvc.lock before and after. In
  Python that is 0.04 for each params.yaml, 0.14 to read and 0.32 to rewrite 2,574 lines of dvc.lock; with ruamel.yaml.clib
  installed, ruamel reads in C: a no-op of 1.15 takes 0.60
- a no-op of 1.37, the bare one 0.64 (twelve stages, a busy machine). What ours takes longer: 0.37 are thirteen readings of params.yaml,
  one for each stage with parameters and two for templates that dvc.yaml could have; 0.21 two readings of dvc.lock, a third of whose 4,340
  lines are dependencies and over a fourth package's copy of params.yaml; 0.10 looking up 351 dependencies and 18 outputs; 0.04 finding
  the stages' keys in what was read. The rest is making the stages' objects, twice. The readings of YAML alone, 0.58, are more than the
  0.32 that the bar leaves. Without Python's garbage collector, which DVC's settings do not reach, 1.13 and 0.48
- where PYTHONDONTWRITEBYTECODE is set, as in many containers, imports take twice as long (Hydra, 0.25 for 0.12) to six times
  (requests, 0.9 for 0.16): `make` unsets it
- scipy and statsmodels without a champion, 1.7 in the gate; requests without a download, 0.2 in collect and in select

Tried, and not kept (no-ops in seconds of processor time, the least of 9 in turn, where ours takes 1.37 and the bare one 0.64, 2.15 times;
outputs of as many files as ours, of a few bytes each):
- package without all values of params.yaml, a fourth of dvc.lock less: 1.38, no gain beyond the noise. A comment in conf/ must not build
  a Bento
- a folder in the place of its modules where the stage imports them all (stages/sources, steps, serve, serve/guard), 93 dependencies
  fewer: 1.39. `trunkline plan` names the file that changed
- with it, the engine's modules in a folder of their own, 152 dependencies fewer: 1.31
- the stages' values in params.json, params.yaml beside it: 1.19; with the first two, 1.11. Every value would stand in two files
- one params file for each stage and no params.yaml, with the first two: 0.99; with the engine's folder also, everything at once: 0.96, 1.51
  times. `-S tune.learning_rate=…` would need the file's name before it, and the bar would still be missed
- in an earlier pipeline, where ours took 0.68 and the bare one 0.40:
  - every key and text of params.yaml in quotes, which ruamel need not resolve: 0.65, and a file that is harder to read
- params.yaml in flow style, or one line of JSON per stage: 0.032 to 0.035 instead of 0.037 to read
- compiling all of the environment in `make setup` (`uv pip install --compile-bytecode`): 27,000 files, of which a run imports a
  third; Python compiles those as it meets them, once
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from stages.files import remove, sha256
from tests.bench.rows import Row, show
from tests.bench.trees import environment, timed, working_tree
from tests.conftest import ROOT
from tests.test_pipeline import PIPELINE, names

WHOLE, NO_OP = 1.10, 1.5
"""The bars."""
SUBREAPER = 36
"""Linux's PR_SET_CHILD_SUBREAPER."""
REPRO = (sys.executable, "-m", "dvc", "repro")
MAKE = (sys.executable, "-m", "stages.operate.cli", "repro")
"""What `make` runs: `dvc repro` with a warm parent for the stages."""
SCRIPT = """
import importlib, json, os, sys, time
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1", GX_ANALYTICS_ENABLED="false", BENTOML_DO_NOT_TRACK="1",
                  HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
for stage in sys.argv[1:]:
    print(f"Running stage '{stage}'", flush=True)
    started = time.time()
    if stage == "compose":
        from conf.__main__ import write
        write()
    else:
        importlib.import_module(f"stages.{stage}").main()
    with open("times.log", "a") as log:
        print(stage, started, time.time(), file=log)
"""
SHIM = """#!/bin/sh
started=$(date +%s.%N)
"{python}" "$@"
code=$?
case $2 in conf) stage=compose;; *) stage=${{2#stages.}};; esac
echo "$stage $started $(date +%s.%N)" >> times.log
exit $code
"""


@dataclass
class Side:
    """One way to run the pipeline."""

    folder: Path
    env: Mapping[str, str]
    command: tuple[str, ...]
    whole: list[float] = field(default_factory=list)
    """Seconds of each measured run."""
    processor: list[float] = field(default_factory=list)
    """Seconds of all cores together in each measured run: what a busy machine distorts least."""
    stages: dict[str, list[float]] = field(default_factory=dict)
    """Stage -> seconds of its process, or of its `main()` in the script."""
    imports: dict[str, float] = field(default_factory=dict)
    """Stage -> seconds of imports; `dvc` -> DVC's own."""

    def clear(self) -> None:
        """Remove what an earlier run made, downloads excepted."""
        work = self.folder / ".dvc/tmp/trunkline"
        for path in [self.folder / out for out in outputs()] + [self.folder / ".dvc/cache", self.folder / "times.log"]:
            remove(path)
        for path in work.iterdir() if work.exists() else ():
            if path.name != "downloads":
                remove(path)

    def run(self) -> None:
        """One measured run."""
        self.clear()
        ctypes.CDLL(None).prctl(SUBREAPER, 1)  # the warm parent, which nobody waits for, counts too
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.whole.append(timed(self.command, self.folder, self.env))
        with suppress(ChildProcessError):
            while os.wait():
                pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        for line in (self.folder / "times.log").read_text(encoding="utf-8").splitlines():
            stage, started, ended = line.rsplit(" ", 2)
            self.stages.setdefault(stage, []).append(float(ended) - float(started))

    def beside(self) -> float:
        """Seconds of a run in which no stage's process ran."""
        return statistics.median(self.whole) - sum(statistics.median(seconds) for seconds in self.stages.values())

    def profile(self) -> None:
        """A run that is not measured but for its imports."""
        self.clear()
        env = {**self.env, "PYTHONPROFILEIMPORTTIME": "1", "PYTHONUNBUFFERED": "1"}
        text = subprocess.run(self.command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
        stage = "dvc"
        for line in text.splitlines():
            if begun := re.search(r"Running stage '(\w+)'", line):
                stage = begun[1]
            for own in re.findall(r"import time:\s+(\d+) \|", line):
                self.imports[stage] = self.imports.get(stage, 0.0) + int(own) / 1e6


def outputs() -> list[str]:
    """Every output of the pipeline, params.yaml included."""
    return [out for stage in PIPELINE.values() for out in names(stage.get("outs", []) + stage.get("metrics", []))]


def bare(folder: Path, stages: int) -> None:
    """A pipeline that does next to nothing."""
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    (folder / "0").write_text("0\n", encoding="utf-8")
    steps = {f"s{n}": {"cmd": f"cp {n} {n + 1}", "deps": [str(n)], "outs": [str(n + 1)]} for n in range(stages)}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": steps}), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def sides(scratch: Path) -> tuple[Side, Side, Side]:
    """`trunkline repro`, a plain `dvc repro`, and the script, each in a copy of the working tree."""
    found = []
    for name in ("ours", "dvc", "script"):
        folder = scratch / name
        if not folder.exists():
            folder.mkdir(parents=True)
            working_tree(folder, "tiny")
            for command in (("add", "-A"), ("commit", "-qm", "Use tiny")):
                subprocess.run(["git", *command], cwd=folder, check=True)
        found.append((folder, environment(folder, scratch / "bytecode")))
    (ours, our_env), (dvc, dvc_env), (plain, plain_env) = found
    shim = scratch / "bin/python"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(SHIM.format(python=sys.executable), encoding="utf-8")
    shim.chmod(0o755)
    return (
        Side(ours, {**our_env, "PATH": f"{shim.parent}:{our_env['PATH']}"}, (*MAKE, "--force", "--no-run-cache")),
        Side(dvc, {**dvc_env, "PATH": f"{shim.parent}:{dvc_env['PATH']}"}, (*REPRO, "--force", "--no-run-cache")),
        Side(plain, plain_env, (sys.executable, "-c", SCRIPT, *PIPELINE)),
    )


def no_op(scratch: Path, rounds: int = 9) -> tuple[float, float]:
    """Median seconds of a `dvc repro` with nothing to do: ours, which has run, and the bare one."""
    folder = scratch / "bare"
    if not folder.exists():
        folder.mkdir()
        bare(folder, len(PIPELINE))
    trees = (scratch / "ours", folder)
    taken: tuple[list[float], list[float]] = ([], [])
    for tree in trees:
        timed(REPRO, tree, environment(tree, scratch / "bytecode"))
    for _ in range(rounds):
        for tree, seconds in zip(trees, taken, strict=True):
            seconds.append(timed(REPRO, tree, environment(tree, scratch / "bytecode")))
    return statistics.median(taken[0]), statistics.median(taken[1])


def measure(scratch: Path, rounds: int) -> tuple[Side, Side, Side]:
    """Warm all, measure all in turn, and see that all wrote the same.

    Raises:
        RuntimeError: they did not.
    """
    every = sides(scratch)
    for side in every:
        side.clear()
        timed(side.command, side.folder, side.env)
    for _ in range(rounds):
        for side in every:
            side.run()
    for out in outputs():
        if len({sha256(side.folder / out) for side in every}) > 1:
            raise RuntimeError(f"{out} is not the same everywhere: they did not do the same work")
    if (every[0].folder / "dvc.lock").read_bytes() != (every[1].folder / "dvc.lock").read_bytes():
        raise RuntimeError("trunkline repro and dvc repro wrote another dvc.lock")
    return every


def table(ours: Side, dvc: Side, plain: Side) -> Table:
    """Where the time goes."""
    found = Table("stage", "trunkline repro, s", "dvc repro, s", "of it imports", "of it work", "in the script, s", "of it imports", title="tiny, warm")
    for stage in PIPELINE:
        warm, process, inside = (statistics.median(side.stages[stage]) for side in (ours, dvc, plain))
        imports = dvc.imports.get(stage, 0.0)
        figures = (warm, process, imports, process - imports, inside, plain.imports.get(stage, 0.0))
        found.add_row(stage, *(f"{figure:.2f}" for figure in figures))
    found.add_row("DVC: start, hashing, cache, locks", f"{ours.beside():.2f}", f"{dvc.beside():.2f}", f"{dvc.imports.get('dvc', 0.0):.2f}", "", "", "")
    return found


def rows_of(ours: Side, dvc: Side, plain: Side, idle: tuple[float, float]) -> list[Row]:
    """The bars, and what the time of the first went into."""
    mine, cold, theirs = (statistics.median(side.whole) for side in (ours, dvc, plain))
    busy, cold_busy, their_busy = (statistics.median(side.processor) for side in (ours, dvc, plain))
    imports, their_imports = (sum(seconds for stage, seconds in side.imports.items() if stage != "dvc") for side in (dvc, plain))
    return [
        Row(what=f"tiny, all {len(PIPELINE)} stages, warm, `trunkline repro`", ours=f"{mine:.1f} s", theirs=f"{theirs:.1f} s (one script)", ratio=mine / theirs, bar=f"{WHOLE:.2f}", met=mine / theirs <= WHOLE),
        Row(what="… in processor time", ours=f"{busy:.1f} s", theirs=f"{their_busy:.1f} s", ratio=busy / their_busy, bar="", met=True),
        Row(what="… of it DVC's hashing, cache and locks", ours=f"{ours.beside():.1f} s", theirs="", ratio=float("nan"), bar="", met=True),
        Row(what="the same by a plain `dvc repro`", ours=f"{cold:.1f} s", theirs=f"{theirs:.1f} s", ratio=cold / theirs, bar="", met=True),
        Row(what="… in processor time", ours=f"{cold_busy:.1f} s", theirs=f"{their_busy:.1f} s", ratio=cold_busy / their_busy, bar="", met=True),
        Row(what="… of it imports", ours=f"{imports:.1f} s", theirs=f"{their_imports:.1f} s", ratio=imports / their_imports, bar="", met=True),
        Row(what="dvc repro with nothing to do", ours=f"{idle[0]:.2f} s", theirs=f"{idle[1]:.2f} s (bare, {len(PIPELINE)} stages)", ratio=idle[0] / idle[1], bar=f"{NO_OP}", met=idle[0] / idle[1] < NO_OP),
    ]  # fmt: skip


def rows(rounds: int = 2) -> list[Row]:
    """Everything, in a scratch folder."""
    with tempfile.TemporaryDirectory() as scratch:
        ours, dvc, plain = measure(Path(scratch), rounds)
        idle = no_op(Path(scratch))
        for side in (dvc, plain):
            side.profile()
        Console(stderr=True).print(table(ours, dvc, plain))
        return rows_of(ours, dvc, plain, idle)


def main() -> None:
    """Print both tables."""
    show(rows())


if __name__ == "__main__":
    main()
