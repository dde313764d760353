"""Measure the exported model with lm-eval, on the engine that will serve it, beside the untuned base.

Reads:  models/export/engine, models/select/base, data/preprocess/*.jsonl, data/collect, conf/evaluate/tasks
Writes: models/evaluate/scores.json, models/evaluate/samples/<task>.jsonl, models/evaluate/answers.json
Config: evaluate, serve.engine
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import conf
from conf.errors import DataError
from conf.schema import EngineSettings, Evaluate, Task
from stages import platform
from stages.files import is_sealed, publish, remove, seal, sha256, write_json, write_jsonl
from stages.records import Record, read_records
from stages.results import Result, average, sample_rows, slice_scores
from stages.run import WORK

if TYPE_CHECKING:
    from stages.harness import EngineLM
    from stages.serve.engine import Engine

EXPORTED = Path("models/export/engine")
BASE = Path("models/select/base")
TEST = Path("data/preprocess/test.jsonl")
OUT = Path("models/evaluate")

log = logging.getLogger(__name__)


def measure(model: EngineLM, name: str, task: Task, settings: Evaluate, phrasings: int | None = None) -> dict[str, Result]:
    """Phrasing -> result, of the first so many phrasings."""
    from stages.harness import run_tasks

    return run_tasks(
        model,
        task.phrasings[:phrasings],
        task.metric,
        f"evaluate.tasks.{name}.phrasings",
        system=task.system,
        chat=task.chat,
        fewshot=task.fewshot,
        limit=task.limit,
        seed=settings.seed,
        bootstrap=settings.bootstrap,
        higher_is_better=task.higher_is_better,
    )


def answers(engine: Engine, count: int, max_tokens: int) -> list[dict[str, str]]:
    """Prompt, answer and target of a few test rows, of different labels as far as there are any; chosen by the hash of their id.

    Raises:
        DataError: there is no test row.
    """
    from stages.serve.engine import Sampling

    records = sorted(read_records(TEST), key=lambda r: hashlib.sha256(r.id.encode()).digest())
    if not records:
        raise DataError(f"{TEST} has no row", "raise preprocess.split.test, or add a source with use: test")
    labels: dict[str, Record] = {}
    for record in records:
        labels.setdefault(record.label, record)
    first = list(labels.values())
    chosen = (first + [r for r in records if r not in first])[:count]
    prompts = [engine.chat.prompt([m for m in r.messages if m["role"] != "assistant"]) for r in chosen]
    found = engine.generate(prompts, Sampling(max_tokens=max_tokens)) if prompts else []
    return [{"prompt": r.text, "answer": c.text, "target": r.completion} for r, c in zip(chosen, found, strict=True)]


def base_engine(settings: EngineSettings) -> Path:
    """The untuned base in the form that the engine runs: converted once per base and type, kept as scratch."""
    from stages.converters import CONVERT

    if (convert := CONVERT.get(settings.kind)) is None:
        return BASE
    code = [sha256(path) for path in sorted(Path(__file__).parent.glob("convert*.py"))]
    made_by = [f"{name} {version(name)}" for name in ("ctranslate2", "gguf") if find_spec(name)]
    digest = hashlib.sha256(f"{sha256(BASE)} {convert.__name__} {settings.quantization} {code} {made_by}".encode()).hexdigest()[:16]
    kept = WORK / "evaluate"
    if not is_sealed(kept / digest):
        remove(kept)  # one base at a time
        convert(BASE, kept / digest, settings.quantization)
        seal(kept / digest)
    return kept / digest


def measure_all(
    folder: Path, engine_settings: EngineSettings, settings: Evaluate, phrasings: int | None = None
) -> tuple[dict[str, dict[str, Result]], list[dict[str, str]]]:
    """Task -> phrasing -> result of one model, and its answers to a few rows."""
    from stages.harness import EngineLM
    from stages.serve.engine import open_engine

    engine = open_engine(folder, engine_settings, batches=True)
    model, measured = EngineLM(engine, settings.max_tokens), {}
    for name, task in sorted(settings.tasks.items()):
        started = time.monotonic()
        measured[name] = measure(model, name, task, settings, phrasings)
        shown = average(measured[name])
        score = "no score: " + shown["reason"] if shown["score"] is None else f"{task.metric} {shown['score']:.3f}"
        log.info("%s: %s: %s, %d rows, phrasings: %d, %.1f s", folder, name, score, shown["n"], len(measured[name]), time.monotonic() - started)
    return measured, answers(engine, settings.answers, settings.max_tokens)


def against(tuned: Mapping[str, Result], base: Mapping[str, Result]) -> dict[str, Any]:
    """The base's score, and how much the tuned model gains on the phrasings that both were asked."""
    scores = [average({name: results[name] for name in base})["score"] for results in (tuned, base)]
    return {"base": average(base) | {"phrasings": sorted(base)}, "gain": None if None in scores else scores[0] - scores[1]}


def main() -> None:
    """Measure tuned and base, and write scores last."""
    settings: Evaluate = conf.load("evaluate")
    engine_settings: EngineSettings = conf.load("serve.engine")
    if not EXPORTED.is_dir():
        raise DataError(f"{EXPORTED} is missing", "run `dvc repro export`, or `dvc pull`")
    tuned, said = measure_all(EXPORTED, engine_settings, settings)
    base, base_said = measure_all(base_engine(engine_settings), engine_settings, settings, 1) if settings.base else ({}, [{} for _ in said])
    made_on = platform.record("evaluate", ("select", "export"), *platform.ENGINES[engine_settings.kind])
    with publish(OUT) as folder:
        (folder / "samples").mkdir(parents=True)
        scores = {}
        for name, task in sorted(settings.tasks.items()):
            rows = sample_rows(tuned[name], task, f"evaluate.tasks.{name}")
            write_jsonl(folder / "samples" / f"{name}.jsonl", rows)
            entry = average(tuned[name]) | {
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "general": task.general,
                "slices": slice_scores(rows) if task.slice_by else {},
                "phrasings": {p: {"score": r.score, "stderr": r.stderr, "n": r.n} for p, r in sorted(tuned[name].items())},
            }
            if base:
                entry |= against(tuned[name], base[name])
            scores[name] = entry
        write_json(
            folder / "answers.json",
            [{"prompt": t["prompt"], "base": b.get("answer"), "tuned": t["answer"], "target": t["target"]} for t, b in zip(said, base_said, strict=True)],
        )
        write_json(folder / "scores.json", {"tasks": scores, "digest": sha256(EXPORTED), "platform": made_on})


if __name__ == "__main__":
    from stages.run import run

    run(main)
