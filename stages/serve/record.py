"""What is told of a request when it is over: an event, metrics, and a span of OpenTelemetry by the GenAI semantic conventions.

The span goes to whatever tracer the process has set up (BentoML's `tracing` configuration, or opentelemetry-instrument); without one it costs nothing. It
holds no text of user or model.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from opentelemetry import propagate, trace

from conf.schema import PiiKind, Serve
from stages.serve import metrics
from stages.serve.answers import Answers
from stages.serve.assistant import Assistant, texts
from stages.serve.keys import Key
from stages.serve.wire import ChatRequest

COMMIT = "TRUNKLINE_COMMIT"
"""Variable with the commit that was deployed: a Bento does not know its own."""


@dataclass(kw_only=True)
class Note:
    """What becomes known of one request on its way."""

    route: str
    key: Key | None = None
    answers: Answers | None = None
    status: int = 0
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)


def event(note: Note, assistant: Assistant) -> dict[str, object]:
    """The row of the table `events`."""
    answers, seconds = note.answers, time.monotonic() - note.began
    jobs = answers.jobs if answers else []
    usage = answers.usage() if answers else None
    queued, prefill, first = next(
        ((j.started - j.arrived, j.first - j.started, j.first - j.arrived) for j in jobs if j.started is not None and j.first is not None), (None, None, None)
    )
    question, answer = _kept(answers, assistant.settings)
    return {
        "id": answers.form.id if answers else f"request-{uuid.uuid4().hex}", "at": note.at, "digest": assistant.digest, "commit": os.environ.get(COMMIT),
        "key": note.key.id if note.key else None, "user": answers.request.user if answers else None, "route": note.route,
        "streamed": bool(answers and answers.request.stream), "status": note.status, "finish_reason": _reasons(answers),
        "prompt_tokens": usage.prompt_tokens if usage else 0, "completion_tokens": usage.completion_tokens if usage else 0,
        "queue": queued, "prefill": prefill, "first": first, "total": seconds,
        "verdict": _verdict(answers), "question": question, "answer": answer,
    }  # fmt: skip


def _verdict(answers: Answers | None) -> dict[str, object] | None:
    """The guard's on request and answers, and what left for an upstream model; null: it did not look."""
    found = answers.verdict() if answers else None
    return found | answers.leaving if answers and found else None


def _reasons(answers: Answers | None) -> str | None:
    """How the answers ended; null: there were none."""
    if answers is None:
        return None
    if answers.guarded:
        return "content_filter"
    refused = [shown.watch.refused for shown in answers.shown]
    reasons = {
        "content_filter" if stopped else job.reason or "cancelled" for job, stopped in zip(answers.jobs, refused, strict=False)
    }  # no jobs: the queue was full
    told = ",".join(sorted(reasons))
    return (told if len(told) <= 16 else told[:16].rpartition(",")[0]) or None


def _kept(answers: Answers | None, settings: Serve) -> tuple[str | None, str | None]:
    """The masked texts of the share of requests that the policy allows to keep."""
    if answers is None or random.random() >= settings.events.text_share:
        return None, None
    from stages.pii import redact

    kinds, regions = get_args(PiiKind), settings.events.phone_regions
    refusal, streamed = settings.guard.refusal, answers.request.stream  # whole, a refused answer is the refusal; of a stream its beginning was seen
    given = [refusal] if answers.guarded else [shown.text if streamed or not shown.watch.refused else refusal for shown in answers.shown]
    asked = answers.screened.texts if answers.screened is not None else texts(answers.request)
    return redact("\n".join(asked), kinds, regions), redact("\n".join(given), kinds, regions)


def measure(row: Mapping[str, object], waiting: int) -> None:
    """Count the request in Prometheus; `waiting`: answers in the queue now."""
    metrics.WAITING.set(waiting)
    metrics.REQUESTS.labels(row["route"], row["status"]).inc()
    for kind in ("prompt", "completion"):
        metrics.TOKENS.labels(kind).inc(float(str(row[f"{kind}_tokens"])))
    if isinstance(verdict := row["verdict"], dict):
        metrics.GUARDED.labels(verdict["action"]).inc()
        for one in (verdict["in"], *verdict["out"]):
            for tier, milliseconds in one["ms"].items():
                metrics.GUARD.labels(tier).observe(milliseconds / 1e3)
    if row["first"] is not None:
        metrics.FIRST.observe(float(str(row["first"])))
        metrics.TOTAL.observe(float(str(row["total"])))


def trace_answer(note: Note, assistant: Assistant, row: Mapping[str, object], headers: Mapping[str, str]) -> None:
    """Write the span of a request that reached the model, as a child of the caller's."""
    answers = note.answers
    if answers is None:
        return
    request = answers.request
    operation = "chat" if isinstance(request, ChatRequest) else "text_completion"
    wanted = {
        "gen_ai.operation.name": operation, "gen_ai.provider.name": "trunkline", "gen_ai.request.model": request.model, "gen_ai.response.model": assistant.name,
        "gen_ai.response.id": answers.form.id, "gen_ai.request.max_tokens": request.max_tokens, "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p, "gen_ai.request.seed": request.seed, "gen_ai.request.choice.count": request.n,
        "gen_ai.usage.input_tokens": row["prompt_tokens"], "gen_ai.usage.output_tokens": row["completion_tokens"],
        "gen_ai.response.time_to_first_chunk": row["first"], "gen_ai.response.finish_reasons": str(row["finish_reason"]).split(","),
        "trunkline.digest": assistant.digest,
    }  # fmt: skip
    span = trace.get_tracer("trunkline").start_span(
        f"{operation} {assistant.name}", context=propagate.extract(dict(headers)), kind=trace.SpanKind.SERVER, start_time=int(note.at * 1e9),
        attributes={name: value for name, value in wanted.items() if value is not None},  # type: ignore[misc]
    )  # fmt: skip
    if note.status >= 500:
        span.set_attribute("error.type", str(note.status))
        span.set_status(trace.StatusCode.ERROR)
    span.end()
