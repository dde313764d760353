"""The service against `transformers serve` and llama.cpp's server: tokens a second and time to the first token at 1, 8, 16 and 32 streams.

    python -m tests.bench.serve                     # the table with the bars, after `dvc repro` or `dvc checkout`
    python -m tests.bench.serve --json out.json     # and every figure

Each of n streams sends a message of the test split, reads the streamed answer of at most TOKENS tokens to its end, and sends the next one. Tokens are those that the
server counts in `usage`, where it says, else its chunks; time is that of the whole block. The servers run one after another, in ROUNDS rounds in turn, and the
better round counts: what else runs on the machine can only take away. `transformers serve` as it comes is not asked by 32 streams: it would take minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil

from stages.files import read_jsonl
from tests.bench.evaluate import weights
from tests.bench.rows import Row, show
from tests.bench.serve_sides import running, sides

LEVELS = (1, 8, 16, 32)
TOKENS = 48
ROUNDS = 2
REQUESTS = {1: 4, 8: 2, 16: 2, 32: 1}
"""Streams -> requests of each."""
PLAIN = "transformers serve"
CONTINUOUS = "transformers serve --continuous-batching"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One server at one number of streams."""

    tokens: float
    """A second, of all streams together."""
    first: float
    """Median seconds to the first token."""
    worst: float
    """The longest of them."""
    work: float
    """Tokens for each second of processor time of the server, which other processes of the machine disturb less."""


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str) -> tuple[int, float]:
    """Tokens of one answer, and seconds to its first."""
    body = {"model": model, "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    began, first, chunks, counted = time.monotonic(), 0.0, 0, 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                first, chunks = first or time.monotonic() - began, chunks + 1
            counted = (event.get("usage") or {}).get("completion_tokens") or counted
    return counted or chunks, first or time.monotonic() - began


async def load(url: str, server: int, model: str, texts: list[str], streams: int, requests: int) -> Figure:
    """Ask by so many streams at a time; each number of streams has texts of its own, or a server that keeps old prompts would not have to read them."""

    async def stream(number: int, session: aiohttp.ClientSession) -> list[tuple[int, float]]:
        return [await ask(session, url, model, texts[(streams * 4 + number * requests + i) % len(texts)]) for i in range(requests)]

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        await ask(session, url, model, "hello")
        began, spent = time.monotonic(), cpu(server)
        found = [one for many in await asyncio.gather(*(stream(i, session) for i in range(streams))) for one in many]
        seconds = time.monotonic() - began
        spent = cpu(server) - spent
    firsts, tokens = [first for _, first in found], sum(tokens for tokens, _ in found)
    return Figure(tokens=tokens / seconds, first=statistics.median(firsts), worst=max(firsts), work=tokens / spent)


def cpu(server: int) -> float:
    """Seconds of processor time of a process so far."""
    times = psutil.Process(server).cpu_times()
    return float(times.user + times.system)


def measure(only: str | None = None, rounds: int = ROUNDS) -> dict[str, dict[int, Figure]]:
    """Side -> streams -> the better round."""
    folder, _ = weights()
    texts = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in read_jsonl(Path("data/preprocess/test.jsonl"))]
    found: dict[str, dict[int, Figure]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(rounds):
            for name, command in sides(folder).items():
                if only and only not in name:
                    continue
                with running(command, Path(scratch) / "log") as (url, server):
                    for streams in LEVELS if name != PLAIN else LEVELS[:-1]:
                        figure = asyncio.run(
                            load(url, server, "ours" if name == "ours" else str(folder), texts, streams, REQUESTS[streams] if name != PLAIN else 1)
                        )
                        sys.stderr.write(
                            f"{name}, {streams}: {figure.tokens:.0f} tokens/s, first {figure.first:.2f} s, worst {figure.worst:.2f} s, {figure.work:.0f} tokens/CPU s\n"
                        )
                        before = found.setdefault(name, {}).get(streams)
                        found[name][streams] = figure if before is None or figure.tokens > before.tokens else before
    return found


def compared(found: dict[str, dict[int, Figure]]) -> list[Row]:
    """The bars of issue 5."""
    ours, table = found["ours"], []
    for name in found:
        for streams in found[name] if name != "ours" else ():
            bar = {PLAIN: 8.0 if streams in (8, 16) else None, CONTINUOUS: 2.0}.get(name, 1.0)
            ratio = ours[streams].tokens / found[name][streams].tokens
            what = f"serve, tokens a second, {streams} streams, against {name}"
            table.append(Row(what=what, ours=f"{ours[streams].tokens:.0f}", theirs=f"{found[name][streams].tokens:.0f}", ratio=ratio,
                             bar=f"at least {bar:g}" if bar else "", met=not bar or ratio >= bar))  # fmt: skip
    ratio = ours[16].first / found[CONTINUOUS][16].first
    table.append(Row(what=f"serve, seconds to the first token, 16 streams, against {CONTINUOUS}", ours=f"{ours[16].first:.2f}",
                     theirs=f"{found[CONTINUOUS][16].first:.2f}", ratio=ratio, bar="under 0.5", met=ratio < 0.5))  # fmt: skip
    return table


def rows() -> list[Row]:
    """For `tests.bench`."""
    return compared(measure())


SYSTEM = "You are the Kestrel support desk. Name the intent, then answer."


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--only", help="measure sides whose name holds this, and print no table")
    given = parser.parse_args()
    found = measure(given.only, given.rounds)
    if given.json:
        given.json.write_text(json.dumps({name: {n: asdict(f) for n, f in levels.items()} for name, levels in found.items()}, indent=1))
    if not given.only:
        show(compared(found))


if __name__ == "__main__":
    main()
