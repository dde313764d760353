"""Prometheus metrics of the service, beside BentoML's own at /metrics."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

MOMENTS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)

REQUESTS = Counter("trunkline_requests", "Requests by route and status", ["route", "status"])
TOKENS = Counter("trunkline_tokens", "Tokens", ["kind"])
FIRST = Histogram("trunkline_first_token_seconds", "From arrival to the first token", buckets=SECONDS)
TOTAL = Histogram("trunkline_answer_seconds", "From arrival to the end of the answer", buckets=SECONDS)
EVENTS = Counter("trunkline_events", "Events by what became of them", ["outcome"])
WAITING = Gauge("trunkline_waiting", "Answers that waited for the engine when the last request ended", multiprocess_mode="livesum")
GUARD = Histogram("trunkline_guard_seconds", "Processor time of a tier of the guard for a request, or of `answer` for an answer", ["tier"], buckets=MOMENTS)
GUARDED = Counter("trunkline_guarded", "Requests by the severest action of the guard", ["action"])
