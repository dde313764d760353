"""Preprocess against plain datatrove and against pandas with datasketch: `python -m tests.bench.preprocess [--full] [rows …]`.

How it is measured: one made corpus per size (`preprocess_corpus`), and one process after the other in a folder of its own,
each on one thread: this stage with one worker and with two, `preprocess_datatrove` and `preprocess_pandas`. All normalise
(ftfy, NFC, blanks), drop what has no text or is too long, write over e-mail addresses, telephone numbers, IBANs, cards and IP
addresses with their checksums, drop exact and near duplicates (the same n-grams, buckets and hashes) and what repeats the
evaluation, split by a hash and write JSONL. Only this stage also keeps what it drops with the reason, orders the rows, reports
redactions by kind, redacts `meta` and `group`, and keeps the evaluation's n-grams in an index on disk. A core's speed is documents per
second of processor time of the process and its children, so that a busy machine and a second worker change nothing; memory is the
most that the processes of one run held together. Both are read from the process tree ten times a second. A contender that wants more than
`ROOM` bytes of addresses ends there, and the table says so.
A start costs each of them one or two seconds of imports, which small corpora feel: the goal is for 100,000 rows and more.

Where the time goes, measured on 8,192 rows of the corpus, microseconds a row: sha1 of the n-grams 15, personal data 31 (telephone
numbers 21 of these), ftfy 8 (19 if each text is given to it), words 8, signatures 5, n-grams for decontamination 5, comparing bands 0.7.

What was tried and did not help, or not enough:
- Fewer or more texts per batch of signatures: 20 µs a row at 32, 13 at 64, 6.5 at 256, 5 at 1,024, 8 at 8,192 (out of the cache).
- xxhash in place of sha1 for the n-grams: 4 instead of 15 µs a row, but other signatures, so other near duplicates at the border:
  outputs would change. blake2b and Python's own sha1 take 16.
- Datatrove's own signatures and merge of bands: 111 and 20 µs a row; arrays take 35 and 0.7, words included, for the same clusters.
- Datatrove's filters as the base of ours: 3.5 µs a row and filter for running variances that nobody reads; a bare loop takes 0.05.
- A second worker costs its own start: on 20,000 rows more than it saves.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from stages.files import read_json, write_json
from tests.bench.preprocess_corpus import write_corpus
from tests.bench.rows import Row, show
from tests.conftest import ROOT

SIZES = (20_000, 100_000)
FULL = 1_000_000
BAR = 2.0
GOAL = 100_000
"""From so many rows on."""
FLAT = 1.15
ROOM = 18 << 30
"""Bytes of addresses that a process may take: what a machine of 24 GB can spare."""
OURS = {"preprocess, 1 worker": 1, "preprocess, 2 workers": 2}
THEIRS = {"plain datatrove": "tests.bench.preprocess_datatrove", "pandas + datasketch": "tests.bench.preprocess_pandas"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run took."""

    rows: int
    wall: float
    cpu: float
    peak: int
    kept: int

    @property
    def speed(self) -> float:
        """Documents per second of processor time."""
        return self.rows / self.cpu


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float, int]:
    """Run a command; returns seconds, seconds of processor time of all its processes, and the most bytes they held together.

    Raises:
        CalledProcessError: it failed.
        MemoryError: `ROOM` was not enough.
    """
    started, cpu, peak = time.perf_counter(), dict[int, float](), 0
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (ROOM, ROOM))
    with (folder / "log").open("wb") as log, subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, preexec_fn=limit) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            for each in tree:
                try:
                    times, held = each.cpu_times(), held + each.memory_info().rss
                except psutil.NoSuchProcess:  # ended since it was listed
                    continue
                cpu[each.pid] = times.user + times.system
            peak = max(peak, held)
            time.sleep(0.1)
    if process.returncode:
        said = (folder / "log").read_text(errors="replace")[-2000:]
        raise MemoryError(said) if "MemoryError" in said else subprocess.CalledProcessError(process.returncode, command, said)
    return time.perf_counter() - started, sum(cpu.values()), peak


def kept(folder: Path) -> int:
    """Rows in the outputs."""
    files = [p for name in ("train", "validation", "test") for p in (*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}/*.jsonl"))]
    return sum(path.read_bytes().count(b"\n") for path in files)


def run(name: str, corpus: Path, rows: int) -> Cost:
    """Run one contender on a corpus."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(corpus / "data", folder / "data", copy_function=os.link)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        if name in OURS:
            write_json(folder / "params.yaml", {"preprocess": {"shards": 8, "split": {"test": 0.0}}})
            environment["TRUNKLINE_WORKERS"] = str(OURS[name])
            module, out = "stages.preprocess", folder / "data/preprocess"
        else:
            module, out = THEIRS[name], folder / "out"
        wall, cpu, peak = measure([sys.executable, "-m", module], folder, environment)
        if name in OURS:
            assert read_json(out / "summary.json")["rows"]["train"] > 0
        return Cost(rows=rows, wall=wall, cpu=cpu, peak=peak, kept=kept(out))


def costs(size: int, contenders: list[str]) -> dict[str, Cost]:
    """Run the contenders on one size; one for which `ROOM` is not enough is left out."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        write_corpus(Path(name), size)
        for contender in contenders:
            with suppress(MemoryError):
                found[contender] = run(contender, Path(name), size)
    return found


def text(cost: Cost) -> str:
    """A cost for people."""
    return f"{cost.speed:,.0f}/s, {cost.peak / 1e6:,.0f} MB, {cost.wall:.0f} s, {cost.kept:,} kept"


def rows(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Measure each size; the last row of the table compares the largest with the smallest."""
    measured = {size: costs(size, [*OURS, *THEIRS]) for size in sizes}
    found = []
    for size, seen in measured.items():
        fastest = max(seen.keys() & THEIRS.keys(), key=lambda name: seen[name].speed)
        for name in OURS:
            for other in THEIRS:
                if other not in seen:
                    none = f"does not fit into {ROOM >> 30} GiB"
                    found.append(Row(what=f"{name}, {size:,} rows, against {other}", ours=text(seen[name]), theirs=none, ratio=math.nan, bar="", met=True))
                    continue
                ratio = seen[name].speed / seen[other].speed
                bar = f"at least {BAR:g}" if other == fastest and OURS[name] == 1 and size >= GOAL else ""
                what = f"{name}, {size:,} rows, against {other}"
                found.append(Row(what=what, ours=text(seen[name]), theirs=text(seen[other]), ratio=ratio, bar=bar, met=not bar or ratio >= BAR))
    small, large = min(sizes), max(sizes)
    if small != large:
        for name in measured[large]:
            a, b = measured[small][name], measured[large][name]
            for what, first, last in (("processor time a row", a.cpu / a.rows, b.cpu / b.rows), ("peak memory", a.peak, b.peak)):
                bar = f"at most {FLAT:g}" if name in OURS else ""
                shown = (f"{value * 1e6:.0f} µs" if what.startswith("processor") else f"{value / 1e6:.0f} MB" for value in (last, first))
                ratio = last / first
                found.append(
                    Row(what=f"{name}: {what}, {large:,} / {small:,}", ours=next(shown), theirs=next(shown), ratio=ratio, bar=bar, met=not bar or ratio <= FLAT)
                )
    return found


def main() -> None:
    """Measure and print the table."""
    chosen = [int(size) for size in sys.argv[1:] if size.isdigit()]
    show(rows(tuple(chosen) or (SIZES[-1], FULL) if "--full" in sys.argv else tuple(chosen) or SIZES))


if __name__ == "__main__":
    main()
