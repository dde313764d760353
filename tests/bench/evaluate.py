"""The evaluate stage against `lm_eval --model hf`, on the same tasks, rows and weights: `python -m tests.bench.evaluate [--rows N] [--rounds N]`.

Theirs is the command that a user types, `python -m lm_eval run --model hf --model_args pretrained=…,dtype=float32`, as it comes (batch size 1)
and with `--batch_size 8`, on as many threads as torch takes. Chat template, system prompt and limit hold for a whole command, so each
combination of them is a command of its own. Ours is `python -m stages.evaluate` on the exported engine, in float32 (for the equality) and
in int8 (what is served). Whole processes are timed, imports and loading included. The commands of both sides run in turn, so that a noisy
machine disturbs both alike; a side's seconds are the sum of its commands, the median over the rounds.

Tasks, phrasings, system prompts and threads are those of params.yaml, the rows the first of data/. The weights are
those of models/tune, merged, where a model has been tuned, else SmolLM2-135M-Instruct as it is published. Answers are joined on phrasing
and `doc_hash`, and prompts are compared too. To make the hashes agree, theirs reads rows without the fields that ours leaves out, and
`meta` goes where its keys vary from row to row (`datasets` would fill the gaps). `evaluate.max_tokens`, which would cut ours short, is
lifted. What differs: ours breaks control tokens in a customer's text (the prompts would differ, and none does), takes the mean anew,
and writes slices, answers and the model's digest.

The int8 difference is on more rows, which only ours is asked: McNemar's exact test, two-sided, for each phrasing.

What was profiled and tried on ctranslate2 (SmolLM2-135M, int8, 64 prompts of the desk with 37 to 89 tokens, 12 tokens of answer each, two cores that others
used too):

* Helped: a batch for each thread rather than all threads in one batch, 2.8 to 4.8 s against 4.5 to 6.2 s, in three rounds in turn. Two threads in
  one matrix were slower than a single one (3.3 s): each waits for the slower one.
* Helped, kept from before: the common prefix encoded once, 2.8 s against 3.7 s.
* Smaller batches: of 16, 3.1 s, and of 8, 4.0 s, against 2.8 s for 32.
* Cutting a small set into a batch for each thread: 12 of 24 answers in int8 became others, so what is in a batch stays as it is.
* ctranslate2's other kernels on an AMD EPYC, for 32 of the prompts on one thread, in CPU seconds: oneDNN, its own choice, 1.5; packed
  (`CT2_USE_EXPERIMENTAL_PACKED_GEMM=1`) 1.5; MKL (`CT2_USE_MKL=1`) 11.
* Imports: 2.5 s of the stage are `lm_eval.evaluator` (`datasets` 1.3 s, of which pandas 0.8 s; `requests` 0.8 s, all of it chardet's tables), and
  lm-eval cannot be had without them. torch and transformers, which theirs loads, are not among them, nor is lm-eval's index of its own tasks.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import conf
from conf.compose import compose
from conf.schema import EngineSettings, Evaluate, Task
from conf.yaml import dump
from stages import merge, select
from stages.convert import to_ctranslate2
from stages.files import publish, read_jsonl, remove, sha256, write_jsonl
from stages.run import WORK
from stages.statistics import compare
from stages.tasks import DERIVED, TASKS
from tests.bench.rows import Row, show
from tests.conftest import ROOT

Kind = Literal["float32", "int8"]

ROWS = 24
"""Rows of each task that both sides are timed on."""
PAIRED = 48
"""Rows of each task on which int8 is compared with float32."""
FASTER, EQUAL = 4.0, 0.99
"""The bars of issue 3: times as fast as the command as it comes, and share of the answers that are equal in float32."""
SIZES = (1, 8)
"""Batch sizes of theirs; the first one is how it comes."""
TYPES: tuple[Kind, Kind] = ("float32", "int8")
"""Types of ours: for the equality, and what is served."""
BASE = "smollm2_135m"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to one question."""

    prompt: str
    answer: str
    score: float


Answers = dict[tuple[str, str], Answer]
"""(phrasing, doc_hash) -> answer."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one command of theirs can say only once, and the phrasings that are asked so."""

    task: Task
    phrasings: tuple[str, ...]


def weights() -> tuple[Path, str]:
    """Folder of the safetensors, and what they are."""
    if (merge.TUNED / "summary.json").is_file():
        folder = WORK / "bench" / f"tuned-{sha256(merge.TUNED)[:16]}"
        if not folder.exists():
            with publish(folder) as out:
                merge.merge(merge.BASE, merge.TUNED, out)
        return folder.resolve(), "the model of models/tune"
    folder = WORK / "bench" / BASE
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WORK) as scratch:
            select.prepare(compose(["experiment=default"]).config.select, BASE, Path(scratch) / "base")
            (Path(scratch) / "base").replace(folder)
    return folder.resolve(), f"{BASE}, not tuned"


def engine(safetensors: Path, quantization: Kind) -> Path:
    """The weights as the CPU engines run them; converted once."""
    folder = (WORK / "bench" / "engine" / sha256(safetensors)[:16] / quantization).resolve()
    if not folder.exists():
        to_ctranslate2(safetensors, folder, quantization)
    return folder


def write_questions(folder: Path, count: int, derived: bool) -> None:
    """The tasks and the first rows of the data (0: all), with or without the fields that are no part of a question."""
    shutil.copytree(TASKS, folder / TASKS)
    for path in (*Path("data/collect").glob("*.jsonl"), Path("data/preprocess/test.jsonl"), Path("data/preprocess/validation.jsonl")):
        rows = [row for _, row in zip(range(count or sys.maxsize), read_jsonl(path), strict=False)]
        same = len({tuple(row["meta"]) for row in rows}) == 1
        left_out = ({"meta"} if not same else set()) | (set() if derived else set(DERIVED))
        write_jsonl(folder / path, ({name: value for name, value in row.items() if name not in left_out} for row in rows))


def limited(settings: Evaluate, count: int) -> dict[str, Task]:
    """The tasks, without a limit that so many rows (0: all) do not reach."""
    return {name: replace(t, limit=None) if count and t.limit and t.limit >= count else t for name, t in sorted(settings.tasks.items())}


def commands(tasks: Mapping[str, Task]) -> list[Command]:
    """How theirs must be called for all phrasings."""
    found: dict[tuple[str | None, bool, int, int | None], tuple[Task, list[str]]] = {}
    for task in tasks.values():
        found.setdefault((task.system, task.chat, task.fewshot, task.limit), (task, []))[1].extend(task.phrasings)
    return [Command(task=task, phrasings=tuple(phrasings)) for task, phrasings in found.values()]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What processes took."""

    seconds: float
    cpu: float
    """Seconds of all threads; other work on the machine changes it less."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(seconds=self.seconds + other.seconds, cpu=self.cpu + other.cpu)

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s ({self.cpu:.1f} s of CPU)"


def timed(folder: Path, *command: str, **environment: str) -> Cost:
    """Run a Python module as a process."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env={**os.environ, "PYTHONHASHSEED": "0", **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds=time.perf_counter() - started, cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def theirs(folder: Path, model: Path, command: Command, size: int) -> Cost:
    """Ask one command of theirs."""
    task = command.task
    chat = ["--apply_chat_template", *(["--system_instruction", task.system] if task.system else [])] if task.chat else []
    shots = ["--num_fewshot", str(task.fewshot)] if task.fewshot else []
    limit = ["--limit", str(task.limit)] if task.limit else []
    batch = ["--batch_size", str(size)] if size != 1 else []
    return timed(
        folder, "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", *batch, *chat, *shots, *limit,
        "--include_path", str(TASKS), "--tasks", ",".join(command.phrasings), "--log_samples", "--output_path", f"out-{size}",
        HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "datasets"),
    )  # fmt: skip


def ours(folder: Path, model: Path, tasks: Mapping[str, Task], settings: EngineSettings) -> Cost:
    """Ask one engine of ours, by the stage."""
    longest = 1024  # more than any task asks for
    asked = asdict(Evaluate(tasks=dict(tasks), base=False, max_tokens=longest, answers=1))
    (folder / "params.yaml").write_text(dump({"evaluate": asked, "serve": {"engine": asdict(settings)}}), encoding="utf-8")
    exported = folder / Path("models/export") / "engine"
    exported.parent.mkdir(parents=True, exist_ok=True)
    exported.unlink(missing_ok=True)
    exported.symlink_to(model)
    cost = timed(folder, "stages.evaluate", PYTHONPATH=str(ROOT))
    (folder / "models/evaluate").replace(folder / f"out-{settings.quantization}")
    return cost


def read_ours(folder: Path) -> Answers:
    """What the stage wrote."""
    rows = [row for path in sorted((folder / "samples").glob("*.jsonl")) for row in read_jsonl(path)]
    return {(row["phrasing"], row["doc_hash"]): Answer(prompt=row["prompt"], answer=row["answer"], score=row["score"]) for row in rows}


def read_theirs(folder: Path, tasks: Mapping[str, Task]) -> Answers:
    """What lm-eval logged."""
    found = {}
    for task in tasks.values():
        for phrasing in task.phrasings:
            (path,) = folder.rglob(f"samples_{phrasing}_[0-9]*.jsonl")
            for row in read_jsonl(path):
                asked = [arguments["arg_1"] for arguments in row["arguments"].values()]
                if isinstance(asked[0], str):  # multiple choice
                    likely = [float(response[0]) for response in row["filtered_resps"]]
                    answer = asked[likely.index(max(likely))].strip()
                else:
                    answer = row["resps"][0][0]
                score = float(row[task.metric.partition(",")[0]])
                found[phrasing, row["doc_hash"]] = Answer(prompt=row["arguments"]["gen_args_0"]["arg_0"], answer=answer, score=score)
    return found


def equal(first: Answers, second: Answers) -> int:
    """How many answers are the same.

    Raises:
        RuntimeError: the questions are not the same.
    """
    if first.keys() != second.keys() or any(first[key].prompt != second[key].prompt for key in first):
        raise RuntimeError(f"{len(first)} and {len(second)} questions, of which {len(first.keys() & second.keys())} are asked of both: nothing to compare")
    return sum(first[key].answer == second[key].answer for key in first)


def paired(name: str, exact: Answers, served: Answers) -> Row:
    """One phrasing in int8 beside float32: the scores, and McNemar's test."""
    keys = sorted(key for key in exact if key[0] == name)
    before, after = ([answers[key].score for key in keys] for answers in (exact, served))
    found = compare(before, after, 0.0, "exact")
    p = min(1.0, 2 * min(found.p_worse, found.p_not_worse))
    same = sum(exact[key].answer == served[key].answer for key in keys) / len(keys)
    return Row(
        what=f"{name}: int8 against float32, {len(keys)} rows",
        ours=f"{statistics.fmean(after):.3f}; {found.better} better, {found.worse} worse, p = {p:.3f}",
        theirs=f"{statistics.fmean(before):.3f}; {same:.0%} of the answers equal",
        ratio=math.nan,
        bar="reported",
        met=True,
    )


def median(costs: Sequence[Cost]) -> Cost:
    """The median of seconds and of CPU seconds."""
    return Cost(seconds=statistics.median(cost.seconds for cost in costs), cpu=statistics.median(cost.cpu for cost in costs))


def rows(count: int = ROWS, rounds: int = 1, more: int = PAIRED) -> list[Row]:
    """Measure both sides.

    Args:
        count: Rows of each task that both are timed on; 0: all.
        rounds: How often.
        more: Rows of each task for the int8 difference.
    """
    if not Path("data/preprocess/test.jsonl").exists():
        subprocess.run([sys.executable, "-m", "dvc", "repro", "preprocess"], check=True)
    settings: Evaluate = conf.load("evaluate")
    threads: EngineSettings = conf.load("serve.engine")
    model, which = weights()
    engines: dict[Kind, Path] = {kind: engine(model, kind) for kind in TYPES}
    here = (WORK / "bench" / "evaluate").resolve()
    remove(here)
    write_questions(here / "theirs", count, derived=False)
    write_questions(here / "ours", count, derived=True)
    write_questions(here / "paired", more, derived=True)
    tasks = limited(settings, count)
    spent_ours: dict[Kind, list[Cost]] = {kind: [] for kind in TYPES}
    spent_theirs: dict[int, list[Cost]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size, kind in zip(SIZES, TYPES, strict=True):
            remove(here / "theirs" / f"out-{size}")
            remove(here / "ours" / f"out-{kind}")
            first, *others = commands(tasks)
            spent = theirs(here / "theirs", model, first, size)
            spent_ours[kind].append(ours(here / "ours", engines[kind], tasks, replace(threads, quantization=kind)))
            spent_theirs[size].append(sum((theirs(here / "theirs", model, command, size) for command in others), spent))
    for kind in TYPES:
        ours(here / "paired", engines[kind], limited(settings, more), replace(threads, quantization=kind))
    exact = read_ours(here / "ours" / "out-float32")
    found = []
    for size in SIZES:
        for kind in TYPES:
            mine, other = median(spent_ours[kind]), median(spent_theirs[size])
            found.append(
                Row(
                    what=f"evaluate, {kind}, against lm_eval --model hf {'as it comes' if size == 1 else f'--batch_size {size}'}: {len(exact)} questions, {which}",
                    ours=str(mine),
                    theirs=str(other),
                    ratio=other.seconds / mine.seconds,
                    bar=f"at least {FASTER:.0f}" if size == 1 else "reported",
                    met=size != 1 or other.seconds >= FASTER * mine.seconds,
                )
            )
    for size in SIZES:
        same = equal(exact, read_theirs(here / "theirs" / f"out-{size}", tasks))
        share = same / len(exact)
        found.append(
            Row(
                what=f"answers equal in float32, batch size {size}",
                ours=f"{same} of {len(exact)}",
                theirs="",
                ratio=share,
                bar=f"at least {EQUAL:.0%}" if size == 1 else "reported",
                met=size != 1 or share >= EQUAL,
            )
        )
    answers = [read_ours(here / "paired" / f"out-{kind}") for kind in TYPES]
    return found + [paired(phrasing, *answers) for phrasing in dict.fromkeys(name for name, _ in answers[0])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evaluate")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each task that both sides are timed on; 0: all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--paired", type=int, default=PAIRED, help="rows of each task for the int8 difference; 0: all")
    options = parser.parse_args(arguments)
    show(rows(options.rows, options.rounds, options.paired))


if __name__ == "__main__":
    main()
