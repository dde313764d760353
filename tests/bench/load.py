"""The service under ten times the load that it can hold: what it admits is answered within the SLO, and the rest is shed.

    python -m tests.bench.load                      # the table, after `dvc repro` or `dvc checkout`
    python -m tests.bench.load --model small        # one of the two models only
    python -m tests.bench.load --json out.json      # and every figure

The service runs in a process of its own, as in `tests.bench.serve_ours`: guard, events and all. Requests arrive at random times at a given rate, whether or not
earlier ones have been answered, as those of many users do, and each is streamed to its end. What it can hold is the highest of some rates at which nothing is shed
or fails and the 99th percentile of the time to the first token is within the SLO (`serve.limits.first_token_seconds`). A failure is anything but a whole answer,
and a 429 with Retry-After. The generator shares the machine with the service.

Memory grows at first, and then stays: it is the keys and values of the answers at work, 46 KB a token for the default model, of which the process keeps as many
pages as it ever used at a time; `serve.engine.context` bounds them, 378 MB for its 8,192 tokens. The default's process had 774 MB after the first rates, and
between 867 and 916 MB while it held what it can and ten times that. `tests/test_soak.py` looks for what a request leaves behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil
import uvloop

import conf
from conf.schema import Serve, ServeLimits
from stages.files import read_jsonl
from tests.bench.rows import Row, show
from tests.bench.serve import cpu
from tests.bench.serve_sides import ENGINE, running

MODELS = ("small", "default")
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Of the answers a second that it gives to STREAMS streams, the rates that are tried, until it holds one."""
STREAMS = 16
TOKENS = {"small": 128, "default": 32}
"""Longest answer."""
SECONDS = {"small": 20.0, "default": 40.0}
"""For which a rate is tried; ten times the load comes for twice as long."""
TIMES = 10
KEEPS = 0.8
"""Least share of the answers a second that it still gives then."""
GROWTH = 1.1
"""Most growth of its memory in the last two thirds of that time."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A running service, and what it is asked."""

    url: str
    server: int
    """Process id."""
    texts: Sequence[str]
    tokens: int
    """Longest answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What became of one request."""

    status: int
    """0: no whole answer."""
    first: float = 0.0
    total: float = 0.0
    tokens: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The service under one rate of requests."""

    rate: float
    """Requests a second that came."""
    answered: float
    """Requests a second that were answered whole, from the first arrival to the last answer."""
    tokens: float
    """A second."""
    shed: float
    """Share of the requests that got a 429."""
    failures: int
    problems: list[str]
    """The first of them."""
    first: list[float]
    """Seconds to the first token of those answered: median, 99th percentile."""
    total: list[float]
    """Seconds to the end: median, 99th percentile."""
    refusal: list[float]
    """Seconds to a 429: median, 99th percentile."""
    work: float
    """Answers for each second of processor time of the service, which other processes of the machine disturb less."""
    memory: list[int]
    """Bytes of the service in memory: before, after a third of the time, after."""


async def ask(session: aiohttp.ClientSession, side: Side, text: str) -> Reply:
    """Stream one answer."""
    body = {
        "model": "ours",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": side.tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, counted, done = time.monotonic(), 0.0, 0, False
    try:
        async with session.post(f"{side.url}/v1/chat/completions", json=body) as reply:
            if reply.status == 429:
                await reply.read()
                again = reply.headers.get("retry-after", "")
                return Reply(status=429, total=time.monotonic() - began, problem="" if again.isdigit() and int(again) >= 1 else f"Retry-After: {again!r}")
            if reply.status != 200:
                return Reply(status=0, problem=f"{reply.status}: {(await reply.text())[:200]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    done |= line.startswith(b"data: [DONE]")
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Reply(status=0, problem=str(event["error"]))
                if event.get("choices") and (event["choices"][0]["delta"].get("content") or event["choices"][0]["finish_reason"]):
                    first = first or time.monotonic() - began
                counted = (event.get("usage") or {}).get("completion_tokens") or counted
    except (aiohttp.ClientError, TimeoutError) as error:
        return Reply(status=0, problem=repr(error))
    return Reply(status=200, first=first, total=time.monotonic() - began, tokens=counted) if done else Reply(status=0, problem="it ended early")


async def arrivals(side: Side, rate: float, seconds: float) -> Figure:
    """Ask at a rate for so many seconds, and wait for the last answer."""
    rng, tasks, server = random.Random(7), [], psutil.Process(side.server)
    memory, spent = [server.memory_info().rss], cpu(side.server)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0)) as session:
        began = due = time.monotonic()
        while due < began + seconds:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            tasks.append(asyncio.create_task(ask(session, side, rng.choice(side.texts))))
            due += rng.expovariate(rate)
            if len(memory) == 1 and due > began + seconds / 3:
                memory.append(server.memory_info().rss)
        replies = list(await asyncio.gather(*tasks))
        took, spent = time.monotonic() - began, cpu(side.server) - spent
        return summarised(replies, took, spent, rate, [*memory, server.memory_info().rss])


async def streams(side: Side, seconds: float) -> float:
    """Answers a second that STREAMS clients get who ask again as soon as they are answered."""

    async def stream(number: int, session: aiohttp.ClientSession) -> int:
        rng, count = random.Random(number), 0
        while time.monotonic() < end:
            count += (await ask(session, side, rng.choice(side.texts))).status == 200
        return count

    end = (began := time.monotonic()) + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        count = sum(await asyncio.gather(*(stream(number, session) for number in range(STREAMS))))
    return count / (time.monotonic() - began)


def summarised(replies: Sequence[Reply], seconds: float, spent: float, rate: float, memory: list[int]) -> Figure:
    """The figure of one rate."""
    good, shed = [r for r in replies if r.status == 200], [r for r in replies if r.status == 429]
    problems = [r.problem for r in replies if r.problem]
    return Figure(
        rate=rate, answered=len(good) / seconds, tokens=sum(r.tokens for r in good) / seconds, shed=len(shed) / len(replies), failures=len(problems),
        problems=problems[:5], first=centiles([r.first for r in good]), total=centiles([r.total for r in good]), refusal=centiles([r.total for r in shed]), work=len(good) / spent, memory=memory,
    )  # fmt: skip


def centiles(values: Sequence[float]) -> list[float]:
    """Median and 99th percentile; nothing of nothing."""
    return [statistics.median(values), sorted(values)[int(len(values) * 0.99)]] if values else []


def measure(model: str) -> tuple[float, Figure, Figure]:
    """Answers a second of STREAMS streams, what the service holds, and what it does at TIMES that."""
    slo, seconds = limits().first_token_seconds, SECONDS[model]
    texts = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in read_jsonl(Path("data/preprocess/test.jsonl"))]
    with tempfile.TemporaryDirectory() as scratch:
        engine = ENGINE if model == "default" else small(Path(scratch))
        with running([sys.executable, "-m", "tests.bench.serve_ours", "openvino", "int8", str(engine), "{port}"], Path(scratch) / "log") as (url, server):
            side = Side(url=url, server=server, texts=texts, tokens=TOKENS[model])
            most = uvloop.run(streams(side, seconds))
            sys.stderr.write(f"{model}: {STREAMS} streams get {most:.1f} answers a second\n")
            for share in SHARES:
                held = uvloop.run(arrivals(side, most * share, seconds))
                sys.stderr.write(f"{model}: {held}\n")
                if not held.shed and not held.failures and held.first[1] <= slo:
                    break
            over = uvloop.run(arrivals(side, held.rate * TIMES, 2 * seconds))
            sys.stderr.write(f"{model}: {over}\n")
    return most, held, over


def limits() -> ServeLimits:
    """Of the service."""
    settings: Serve = conf.load("serve")
    return settings.limits


def small(folder: Path) -> Path:
    """An engine of random weights that takes next to no time: what is measured is the service."""
    from tests.served import model

    return model(folder)


def compared(model: str, most: float, held: Figure, over: Figure) -> list[Row]:
    """The bars: what is admitted keeps the SLO, what is answered does not grow less, nothing fails, and the memory stays."""
    slo, name = limits().first_token_seconds, f"load, {model} model"
    shed = f"{over.shed:.1%} of {over.rate:.3g} requests a second are shed, each within {over.refusal[1]:.2f} s (99th percentile)"
    third, end = over.memory[1:]

    def row(what: str, ours: str, theirs: str, ratio: float, bar: str, met: bool) -> Row:
        return Row(what=f"{name}: {what}", ours=ours, theirs=theirs, ratio=ratio, bar=bar, met=met)

    return [
        row(f"requests a second that it holds, against what {STREAMS} streams get", f"{held.rate:.3g}", f"{most:.3g}", held.rate / most, "", True),
        row("first token, 99th percentile, at what it holds, against the SLO", f"{held.first[1]:.2f} s", f"{slo:g} s", held.first[1] / slo, "at most 1",
            held.first[1] <= slo),
        row(f"first token, 99th percentile, at {TIMES} times that", f"{over.first[1]:.2f} s", f"{slo:g} s", over.first[1] / slo, "at most 1", over.first[1] <= slo),
        row(f"whole answer, 99th percentile, at {TIMES} times that, against once", f"{over.total[1]:.2f} s", f"{held.total[1]:.2f} s",
            over.total[1] / held.total[1], "", True),
        row(f"answers a second at {TIMES} times that, against once ({shed})", f"{over.answered:.3g}", f"{held.answered:.3g}", over.answered / held.answered,
            f"at least {KEEPS}", over.answered / held.answered >= KEEPS),
        row("failures other than 429", str(held.failures + over.failures), "", float("nan"), "0", not held.failures + over.failures),
        row("memory at the end of it, against after a third", f"{end / 2**20:.0f} MiB", f"{third / 2**20:.0f} MiB", end / third, f"at most {GROWTH}", end / third <= GROWTH),
    ]  # fmt: skip


def rows() -> list[Row]:
    """For `tests.bench`."""
    return [row for model in MODELS for row in compared(model, *measure(model))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one")
    parser.add_argument("--json", type=Path, help="write every figure there")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))  # a connection for each request that waits
    found = {model: measure(model) for model in given.model or MODELS}
    if given.json:
        given.json.write_text(
            json.dumps({model: {"most": most, "held": asdict(held), "over": asdict(over)} for model, (most, held, over) in found.items()}, indent=1)
        )
    show(row for model, figures in found.items() for row in compared(model, *figures))


if __name__ == "__main__":
    main()
