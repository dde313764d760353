"""What lm-eval found, in a form that can be trusted: a finite number with its error, or null with a reason.

A mean is taken anew from the rows, so that a silent answer scores 0 whatever a metric's clean-up makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from conf.errors import ConfigError
from conf.schema import Task


@dataclass(kw_only=True)
class Sample:
    """One question, its answer and what that scored."""

    doc_id: int
    doc_hash: str
    prompt: str
    target: str
    answer: str
    score: float | None
    """The metric on this row; null where the metric exists only for all rows together."""
    doc: dict[str, Any] = field(repr=False)


@dataclass(kw_only=True)
class Result:
    """What one lm-eval task scored."""

    score: float | None
    stderr: float | None
    n: int
    reason: str
    """Why score or stderr is null; empty otherwise."""
    samples: list[Sample] = field(repr=False)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error (null for a single value)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) if len(values) > 1 else None


def read_result(task: Any, metric: str, found: Mapping[str, Any], logged: Sequence[Mapping[str, Any]], key: str, higher_is_better: bool) -> Result:
    """One lm-eval task's samples and score.

    Args:
        task: lm-eval's task.
        metric: `name`, or `name,filter`.
        found: The task's part of lm-eval's `results`.
        logged: Its part of `samples`.
        key: Dotted key of the configuration, for messages.
        higher_is_better: Direction of the metric.

    Raises:
        ConfigError: the task has no such metric.
    """
    name, _, wanted = metric.partition(",")
    filters = sorted({sample["filter"] for sample in logged if name in sample["metrics"]})
    chosen = wanted or (filters[0] if len(filters) == 1 else "none")
    if chosen not in filters:
        has = sorted({f"{m},{sample['filter']}" for sample in logged for m in sample["metrics"]})
        raise ConfigError(f"{key}: task {found['name']} has no metric {metric!r}", f"it has: {', '.join(has)}")
    rows = [sample for sample in logged if sample["filter"] == chosen]
    averaged = getattr(task.aggregation().get(name), "__name__", "mean") == "mean"
    samples = [_sample(task.OUTPUT_TYPE, row, name, averaged, higher_is_better) for row in sorted(rows, key=lambda r: r["doc_id"])]
    scores = [sample.score for sample in samples if sample.score is not None]
    if averaged and len(scores) == len(samples):
        score, stderr = mean_and_error(scores)
    else:
        stated = found.get(f"{name}_stderr,{chosen}")
        score, stderr = float(found[f"{name},{chosen}"]), float(stated) if isinstance(stated, Real) else None
        if higher_is_better and not any(sample.answer.strip() for sample in samples):
            score = 0.0
    reasons = [f"{what} is {value}" for what, value in (("score", score), ("stderr", stderr)) if value is None or not math.isfinite(value)]
    finite = [value if value is not None and math.isfinite(value) else None for value in (score, stderr)]
    return Result(score=finite[0], stderr=finite[1], n=len(samples), reason="; ".join(reasons), samples=samples)


def _sample(kind: str, row: Mapping[str, Any], metric: str, averaged: bool, higher_is_better: bool) -> Sample:
    arguments, target = row["arguments"], row["target"]
    if kind == "multiple_choice":
        choices = [a[1].strip() for a in arguments]
        likely = [ll for ll, _ in row["filtered_resps"]][: len(choices)]
        answer = choices[max(range(len(likely)), key=likely.__getitem__)]
        target = choices[target] if isinstance(target, int) and target < len(choices) else target
    else:
        answer = str(row["resps"][0][0])
    value = row.get(metric)
    score = float(value) if averaged and isinstance(value, Real) else None
    if kind == "generate_until" and averaged and higher_is_better and not answer.strip() and str(target).strip():
        score = 0.0  # silence is never a right answer, whatever a metric's clean-up makes of it
    if kind in ("multiple_choice", "loglikelihood") and averaged and any(math.isnan(ll) for ll, _ in row["filtered_resps"]):
        score = math.nan  # the most likely of broken numbers would be the first choice
    return Sample(doc_id=row["doc_id"], doc_hash=row["doc_hash"], prompt=arguments[0][0], target=str(target), answer=answer, score=score, doc=row["doc"])


def value_of(doc: Mapping[str, Any], field: str, key: str) -> str:
    """The value of a field of a row (`label`, `meta.channel`); empty where it is.

    Args:
        doc: the row.
        field: dotted.
        key: of the configuration that names the field, for messages.

    Raises:
        ConfigError: the row has no such field.
    """
    value: Any = doc
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"{key}={field}: a row has no such field", f"it has: {', '.join(sorted(doc))}")
        value = value[part]
    return "" if value is None else str(value)


def average(results: Mapping[str, Result]) -> dict[str, Any]:
    """Score of a task over its phrasings: their mean, and the error of each row's mean, since phrasings share their rows."""
    scores = [result.score for result in results.values()]
    reasons = [f"{name}: {result.reason}" for name, result in sorted(results.items()) if result.reason]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return {"score": None, "stderr": None, "n": 0, "spread": None, "reason": "; ".join(reasons)}
    rows: dict[tuple[int, str], list[float]] = {}
    for result in results.values():
        for sample in result.samples:
            if sample.score is not None:
                rows.setdefault((sample.doc_id, sample.doc_hash), []).append(sample.score)
    whole = rows and all(len(row) == len(scores) for row in rows.values())
    stderr = mean_and_error([math.fsum(row) / len(row) for row in rows.values()])[1] if whole else next(iter(results.values())).stderr
    summary = {"score": math.fsum(known) / len(known), "stderr": stderr, "n": max(result.n for result in results.values()), "spread": max(known) - min(known)}
    return {**summary, "reason": "; ".join(reasons)} if reasons else summary


def slice_scores(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Slice -> score over its rows and phrasings, and the number of its rows."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        grouped.setdefault(sample["slice"], []).append(sample)
    return {
        name: {
            "score": None if any(s["score"] is None for s in rows) else math.fsum(s["score"] for s in rows) / len(rows),
            "n": len({(s["doc_id"], s["doc_hash"]) for s in rows}),
        }
        for name, rows in sorted(grouped.items())
    }


def sample_rows(results: Mapping[str, Result], task: Task, key: str) -> list[dict[str, Any]]:
    """One row per phrasing and question, sorted, to be joined with another model's by `doc_hash`."""
    rows = [
        {
            "doc_hash": s.doc_hash,
            "doc_id": s.doc_id,
            "phrasing": name,
            "score": s.score if s.score is not None and math.isfinite(s.score) else None,
            "prompt": s.prompt,
            "target": s.target,
            "answer": s.answer,
            "slice": (value_of(s.doc, task.slice_by, f"{key}.slice_by") or "(none)") if task.slice_by else "",
            "group": value_of(s.doc, task.group_by, f"{key}.group_by") if task.group_by else "",
        }
        for name, result in results.items()
        for s in result.samples
    ]
    return sorted(rows, key=lambda row: (row["doc_hash"], row["phrasing"], row["doc_id"]))
