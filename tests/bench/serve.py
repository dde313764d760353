"""The service against others that serve the same weights on a CPU: tokens a second and time to the first token at 1, 8, 16 and 32 streams.

    python -m tests.bench.serve                     # every side's figures, and the bars, after `dvc repro` or `dvc checkout`
    python -m tests.bench.serve --json out.json     # and every figure into a file

Each of n streams sends a message of the test split, reads the streamed answer of at most TOKENS tokens to its end, and sends the next one. Tokens are those
that the server counts in `usage`, where it says, else its chunks, and none of an answer that the guard refused; time is that of the whole block. The sides
(`tests.bench.serve_sides`) run one after another, in ROUNDS rounds in turn, and the better round counts: what else runs on the machine can only take away.
`transformers serve` as it comes is not asked by 32 streams: it would take minutes.

What was tried, on two cores of a Xeon with AVX-512 and without AMX:
- OpenVINO with bfloat16 in the place of float32 steps in 36 and 52 ms for 8 and 16 answers in the place of 15 and 23; without values in int8 in 27 and 35; with
  a scale for 64 of them and not 32 in 14 and 19; either agrees with the float model at 99.5% of 395 positions. 16 streams, in 2 and 3 rounds in turn, with 32
  and 192 tokens of new prompts in a step: 378 to 409 tokens a second, first 0.38 to 0.45 s; 64 and 192: 424 to 454, 0.34 to 0.38; 64 and 96: 408 to 441, 0.31 to
  0.35; 64 and 512: 396 to 475, 0.32 to 0.44. A first word comes three tokens after the first token: the guard lets whole words go. Threads bound to processors
  change nothing beyond the noise.
- llama.cpp steps in 15 ms for one answer in bfloat16, as its own `llama-batched-bench` does, and took 36 where another thread of the process had called it
  before: OpenMP keeps a team for each, and lets more threads than processors sleep at every wait. So the kept prefix is encoded by a thread that ends.
- ctranslate2 encodes the prompts of a batch together as far as the shortest goes, and the rest of a longer one a token a step, where a step costs 3 ms and 4.9
  for each answer (it copies their keys and values, 138 KB a token) and encoding 0.6 to 1.2 ms a token. Two slots of 4, 8 and 16 answers each give 254, 315 and
  322 tokens a second with messages as they come, and 376, 401 and 430 with equally long ones. `stages.serve.slots` has what that led to.
- For ctranslate2, packed products (CT2_USE_EXPERIMENTAL_PACKED_GEMM) and CT2_FORCE_CPU_ISA=AVX512 change nothing beyond the noise, and oneDNN in the place of
  MKL is slower: 126 to 297 tokens a second of two slots of 1 to 16 answers, against 196 to 324.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from stages.files import read_jsonl
from tests.bench.evaluate import weights
from tests.bench.rows import Row, show
from tests.bench.serve_load import LEVELS, REQUESTS, SYSTEM, TOKENS, Answer, Figure, chosen, figure
from tests.bench.serve_sides import bare, engine, ours, running, servers, told

ROUNDS = 2
PLAIN = "transformers serve"
CONTINUOUS = "transformers serve --continuous-batching"
Figures = dict[str, dict[int, Figure]]
"""Side -> streams -> its better round."""


async def ask(session: aiohttp.ClientSession, url: str, model: str, text: str) -> Answer:
    """One answer, read to its end."""
    body = {"model": model, "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    began, times, counted, refused = time.monotonic(), list[float](), 0, False
    async with session.post(f"{url}/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices") and event["choices"][0]["delta"].get("content"):
                times.append(time.monotonic())
            refused |= bool(event.get("choices")) and event["choices"][0].get("finish_reason") == "content_filter"
            counted = (event.get("usage") or {}).get("completion_tokens") or counted
    times = times or [time.monotonic()]
    return Answer(tokens=0 if refused else counted or len(times), first=times[0] - began, last=times[-1] - began)


async def load(url: str, server: int, model: str, texts: list[str], streams: int, requests: int) -> Figure:
    """Ask by so many streams at a time."""

    async def stream(number: int, session: aiohttp.ClientSession) -> list[Answer]:
        return [await ask(session, url, model, chosen(texts, streams, number, i)) for i in range(requests)]

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        await ask(session, url, model, "hello")
        began, spent = time.monotonic(), cpu(server)
        answers = [one for many in await asyncio.gather(*(stream(i, session) for i in range(streams))) for one in many]
        return figure(answers, time.monotonic() - began, cpu(server) - spent)


def cpu(server: int) -> float:
    """Seconds of processor time of a process so far."""
    times = psutil.Process(server).cpu_times()
    return float(times.user + times.system)


def measure(only: str | None = None, rounds: int = ROUNDS) -> Figures:
    """Every side, in turn."""
    folder, _ = weights()
    texts = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in read_jsonl(Path("data/preprocess/test.jsonl"))]
    found: Figures = {}

    def note(name: str, streams: int, one: Figure) -> None:
        sys.stderr.write(f"{name}, {streams}: {one.tokens:.0f} tokens/s, first {one.first:.2f} s, worst {one.worst:.2f} s, {one.work:.0f} tokens/CPU s\n")
        before = found.setdefault(name, {}).get(streams)
        found[name][streams] = one if before is None or one.tokens > before.tokens else before

    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(rounds):
            for name, command in servers(folder).items():
                if only and only not in name:
                    continue
                model = "ours" if name in ours() else str(folder)
                with running(command, Path(scratch) / "log") as (url, server):
                    for streams in LEVELS if name != PLAIN else LEVELS[:-1]:
                        note(name, streams, asyncio.run(load(url, server, model, texts, streams, REQUESTS[streams] if name != PLAIN else 1)))
            for name, command in bare(folder).items():
                if not only or only in name:
                    for streams, one in told(command, texts).items():
                        note(name, int(streams), Figure(**one))
    return found


def bandwidth(threads: int = 2, size: int = 256 * 1024 * 1024) -> float:
    """Bytes a second that so many threads read from memory, at best."""
    parts = [np.ones(size // 8) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, threads * size / (time.perf_counter() - began))
    return best


def compared(found: Figures, side: str, reads: float) -> list[Row]:
    """The bars of issue 5 for one side of ours; `reads`: seconds that memory takes for all of its weights."""
    mine, table = found[side], list[Row]()

    def row(what: str, one: float, other: float, bar: float, unit: str = "", most: bool = False) -> None:
        ratio = one / other
        table.append(Row(what=f"{side}: {what}", ours=f"{one:.4g}{unit}", theirs=f"{other:.4g}{unit}", ratio=ratio, bar=f"{'at most' if most else 'at least'} {bar:g}",
                         met=ratio <= bar if most else ratio >= bar))  # fmt: skip

    others = [name for name in found if name not in ours() and not name.endswith("bare")]
    for streams in LEVELS:
        for name, bar in ((PLAIN, 8.0 if streams in (8, 16) else 0), (CONTINUOUS, 2.0)):
            if bar and streams in found[name]:
                row(f"tokens a second, {streams} streams, against {name}", mine[streams].tokens, found[name][streams].tokens, bar)
        fastest = max((name for name in others if streams in found[name]), key=lambda name: found[name][streams].tokens)
        row(f"tokens a second, {streams} streams, against the fastest other server, {fastest}", mine[streams].tokens, found[fastest][streams].tokens, 1.0)
    row(f"seconds to the first token, 16 streams, against {CONTINUOUS}", mine[16].first, found[CONTINUOUS][16].first, 0.5, most=True)
    row("one stream's tokens a second, against what memory allows", 1 / mine[1].pace, 1 / reads, 0.5)
    for streams in (1, 16):
        row(
            f"milliseconds a token, {streams} streams, against the bare engine",
            1e3 * mine[streams].pace,
            1e3 * found[f"{side}, bare"][streams].pace,
            1.05,
            most=True,
        )
    return table


def bars(found: Figures) -> list[Row]:
    """Of every side of ours."""
    folder, _ = weights()
    speed = bandwidth()
    sizes = {name: sum(f.stat().st_size for f in engine(name, folder).rglob("model.*") if f.suffix in (".gguf", ".bin")) or INT8_BYTES for name in ours()}
    return [row for name in reversed(ours()) for row in compared(found, name, sizes[name] / speed)]


INT8_BYTES = 137_000_000
"""Of ctranslate2's model.bin of SmolLM2-135M, which `models/export/engine` may hold as a recipe."""


def figures(found: Figures) -> Table:
    """Every side in a line."""
    table = Table("tokens a second (seconds to the first) at", *map(str, LEVELS))
    for name, levels in found.items():
        table.add_row(name, *(f"{levels[n].tokens:.0f} ({levels[n].first:.2f})" if n in levels else "" for n in LEVELS))
    return table


def rows() -> list[Row]:
    """For `tests.bench`: of our fastest engine that is installed."""
    found = measure()
    side = max(ours(), key=lambda name: found[name][16].tokens)
    return [row for row in bars(found) if row.what.startswith(side)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--only", help="measure sides whose name holds this, and print no bars")
    given = parser.parse_args()
    found = measure(given.only, given.rounds)
    if given.json:
        given.json.write_text(json.dumps({name: {n: asdict(f) for n, f in levels.items()} for name, levels in found.items()}, indent=1))
    Console(width=150).print(figures(found))
    if not given.only:
        show(bars(found))


if __name__ == "__main__":
    main()
