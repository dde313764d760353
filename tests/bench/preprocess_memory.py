"""Peak memory of preprocess on a made corpus that grows: `python -m tests.bench.preprocess_memory [rows …]`.

Each size runs as the stage does, in a process of its own, in an empty folder. The rows are training pairs of about 60 words;
a tenth are exact or near repeats, a tenth hold an e-mail address, and one in fifty is evaluation.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stages.files import read_json, write_json, write_jsonl

ROOT = Path(__file__).parent.parent.parent
SIZES = (5_000, 20_000, 100_000)


def made_rows(count: int, source: str) -> Iterator[dict[str, Any]]:
    """Rows of the stated kind, always the same."""
    draw = random.Random(source)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    text = ""
    for number in range(count):
        kind = draw.random()
        if kind > 0.05 or not text:
            text = " ".join(draw.choices(vocabulary, k=draw.randint(40, 80)))
        if 0.05 < kind < 0.10:
            text += " indeed"
        mail = f" write to {draw.choice(vocabulary)}@example.com" if kind > 0.9 else ""
        yield {
            "id": f"{number:09d}", "source": source, "licence": "Apache-2.0", "classification": "public", "text": text + mail, "completion": "Yes.",
            "label": "yes", "group": "", "messages": [], "meta": {},
        }  # fmt: skip


def measure(rows: int, workers: int, shards: int) -> dict[str, Any]:
    """Run the stage on so many rows; returns seconds, peak bytes, input bytes and the summary."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"tickets": ("train", rows - rows // 50), "official": ("test", rows // 50)}
        for source, (_, count) in sizes.items():
            write_jsonl(folder / f"data/collect/{source}.jsonl", made_rows(count, source))
        write_json(folder / "data/collect/manifest.json", {source: {"use": use, "rows": count} for source, (use, count) in sizes.items()})
        write_json(folder / "params.yaml", {"preprocess": {"workers": workers, "shards": shards, "split": {"test": 0.0}}})
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "stages.preprocess"], cwd=folder, env=environment, check=True)
        cost = json.loads((folder / ".dvc/tmp/trunkline/costs.jsonl").read_text().splitlines()[-1])
        size = sum(path.stat().st_size for path in folder.glob("data/collect/*.jsonl"))
        return {**cost, "input": size, **read_json(folder / "data/preprocess/summary.json")}


def main() -> None:
    """Measure each size and print the table."""
    table = Table("rows", "input MB", "seconds", "rows/s", "peak MB", "dropped", title="preprocess, 1 worker, 8 shards")
    for rows in [int(size) for size in sys.argv[1:]] or SIZES:
        seen = measure(rows, workers=1, shards=8)
        cells = (rows, seen["input"] // 10**6, round(seen["seconds"]), round(rows / seen["seconds"]), seen["peak_bytes"] // 10**6, seen["rows"]["dropped"])
        table.add_row(*(f"{cell:,}" for cell in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
