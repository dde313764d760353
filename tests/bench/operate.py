"""`trunkline plan` and `trunkline rollback` beside what one would do by hand: `python -m tests.bench.operate`.

plan       against `dvc repro --dry`, for a changed learning rate. The dry run knows neither what conf/ composes to nor what a stage's new
           output will change: it names the stages whose files differ now. How many of those that run each names, is in the row.
rollback   against `git revert HEAD` and `dvc checkout`, of a commit with another model. By hand, nothing is proven before the commit.

On `tiny` cut down to a minute, in turns; medians count.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.rows import Row, show
from tests.bench.trees import environment, timed
from tests.checkout import change, commit, cut_down_tiny, ran, sh, working_tree

PLAN_BAR, ROLLBACK_BAR = 2.0, 5.0
"""Seconds."""
ROUNDS = 5
TRUNKLINE = (sys.executable, "-m", "stages.operate.cli")
BY_HAND = ("sh", "-c", "git revert --no-edit HEAD && dvc checkout --quiet")


def prepare(folder: Path) -> None:
    """Two commits with a model each; the second one differs by its learning rate."""
    working_tree(folder, "tiny")
    cut_down_tiny(folder)
    commit(folder, "Use tiny")
    sh(folder, "dvc", "repro")
    commit(folder, "Run tiny")
    change(folder / "conf/experiment/tiny.yaml", "learning_rate: 0.004", "learning_rate: 0.003")
    sh(folder, "dvc", "repro")
    commit(folder, "Lower the learning rate")


def dry(folder: Path) -> list[str]:
    """The stages that `dvc repro --dry` says would run."""
    return re.findall(r"Running stage '(\w+)'", subprocess.run(["dvc", "repro", "--dry"], cwd=folder, capture_output=True, text=True, check=True).stdout)


def rows() -> list[Row]:
    """Plan and rollback."""
    planned, by_dry, rolled, by_hand = ([] for _ in range(4))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tree"
        folder.mkdir()
        prepare(folder)
        env = environment(folder, Path(scratch) / "bytecode")
        head = sh(folder, "git", "rev-parse", "HEAD").stdout.strip()
        for number in range(ROUNDS + 1):
            for command, taken in ((("rollback",), rolled), (None, by_hand)):
                seconds = timed([*TRUNKLINE, *command] if command else BY_HAND, folder, env)
                taken += [seconds] if number else []
                sh(folder, "git", "reset", "-q", "--hard", head)
                sh(folder, "dvc", "checkout", "--quiet", "--force")
        change(folder / "conf/experiment/tiny.yaml", "learning_rate: 0.003", "learning_rate: 0.002")
        for number in range(ROUNDS + 1):
            for command, taken in (([*TRUNKLINE, "plan", "--json"], planned), (["dvc", "repro", "--dry"], by_dry)):
                seconds = timed(command, folder, env)
                taken += [seconds] if number else []
        stages = json.loads(sh(folder, *TRUNKLINE, "plan", "--json").stdout)["stages"]
        named = {stage["stage"] for stage in stages if stage["outcome"] in ("runs", "may run")}
        said = dry(folder)
        truth = ran(sh(folder, "dvc", "repro"))
    ours, theirs, back, hand = map(statistics.median, (planned, by_dry, rolled, by_hand))
    what = (
        f"plan of a learning rate, against `dvc repro --dry`: names {len(named & {*truth})} and {len({*said} & {*truth})} of the {len(truth)} stages that run"
    )
    return [
        Row(what=what, ours=f"{ours:.2f} s", theirs=f"{theirs:.2f} s", ratio=ours / theirs, bar=f"under {PLAN_BAR:g} s", met=ours < PLAN_BAR and named == {*truth}),
        Row(
            what="rollback of another model, proven before the commit, against `git revert` and `dvc checkout`",
            ours=f"{back:.2f} s", theirs=f"{hand:.2f} s", ratio=back / hand, bar=f"under {ROLLBACK_BAR:g} s", met=back < ROLLBACK_BAR,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    show(rows())
