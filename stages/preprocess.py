"""Clean, deduplicate, redact, decontaminate, split and format the collected rows, and keep every dropped row with its reason.

Reads: data/collect/*.jsonl and manifest.json (a dataset's `use` is there).
Writes: data/preprocess/{train,validation,test,corpus,dropped}.jsonl, and last summary.json (counts per source and reason).
Config: preprocess

Streamed through datatrove steps in a scratch folder of `.dvc/tmp/trunkline/`: no file is ever held whole. What grows with the rows in
memory is their places (8 bytes each), the n-grams of the evaluation sets (8 bytes each), the groups of test sources, and the pairs of
near duplicates. The rows are ordered by (use, source, id) once, and everything after keeps that order, so workers and shards change no byte.
TRUNKLINE_WORKERS in the environment says how many processes this machine has for it. tests/bench/preprocess.py measures it.
`attack` and `benign` datasets pass by: redteam reads them from data/collect.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import conf
from conf.errors import DataError
from conf.schema import Preprocess
from stages.files import read_json
from stages.run import progress, scratch

if TYPE_CHECKING:
    from stages.steps.order import Parts

COLLECTED = Path("data/collect")
OUT = Path("data/preprocess")
USES = ("train", "test", "corpus", "benchmark")
log = logging.getLogger(__name__)


def sources(manifest: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The datasets that this stage reads: name -> (path, use).

    Raises:
        DataError: the manifest is none.
    """
    for name, entry in manifest.items() if isinstance(manifest, dict) else [("it", manifest)]:
        if not isinstance(entry, dict) or not isinstance(entry.get("use"), str) or not isinstance(entry.get("rows"), int):
            raise DataError(f"{COLLECTED / 'manifest.json'}: {name} is {str(entry)[:200]}, not {{use, rows, …}}", "remove data/collect and run `dvc repro`")
    return {name: (str(COLLECTED / f"{name}.jsonl"), entry["use"]) for name, entry in manifest.items() if entry["use"] in USES}


def clean(settings: Preprocess, inputs: dict[str, tuple[str, str]], work: Path) -> None:
    """Normalise, drop what misses fields or quality, redact, assign splits; writes sorted runs, and the n-grams of benchmark rows."""
    from stages.steps.clean import MissingFields, NormaliseText, PersonalData, Quality, WriteRuns
    from stages.steps.decontaminate import IndexBenchmarks
    from stages.steps.executors import execute
    from stages.steps.rows import Dropped
    from stages.steps.sources import ReadSources
    from stages.steps.split import AssignSplit

    steps = [
        ReadSources(inputs, work / "counts"),
        NormaliseText(settings.normalise),
        MissingFields(settings.missing, Dropped(work / "dropped", "missing", settings.pii)),
        Quality(settings.filters, Dropped(work / "dropped", "filters", settings.pii)),
        PersonalData(settings.pii, Dropped(work / "dropped", "pii", settings.pii), work / "redacted"),
        AssignSplit(settings.split),
        WriteRuns(work / "runs", keep_groups=settings.split.by == "group"),
        IndexBenchmarks(work / "evaluation", settings.decontaminate),
    ]
    execute(steps, settings.shards, settings, work / "logs/clean")


def check_counts(manifest: dict[str, Any], counts: dict[str, int]) -> None:
    """Stop when a source has not as many rows as collect wrote.

    Raises:
        DataError: a source is truncated or has grown.
    """
    for source, read in sorted(counts.items()):
        if read != manifest[source]["rows"]:
            what = f"{COLLECTED / source}.jsonl is truncated or altered: {read} rows, and {manifest[source]['rows']} in manifest.json"
            raise DataError(what, "remove data/collect and run `dvc repro`")


def deduplicate(settings: Preprocess, work: Path) -> Parts:
    """Order the cleaned rows, cut them into parts, list exact and near duplicates, and index what is evaluated on."""
    from stages.steps.decontaminate import join_index
    from stages.steps.deduplicate import Sketch, join_lists, list_exact, list_near
    from stages.steps.executors import execute
    from stages.steps.order import PART_BYTES, Table, order, place
    from stages.steps.parts import ReadPart
    from stages.steps.rows import Dropped, merged

    size = sum(path.stat().st_size for path in (work / "runs").glob("*.jsonl"))
    table = Table(work / "table")
    with Dropped(work / "dropped", "order", settings.pii) as dropped:
        lines = progress(merged(work / "runs", by=place), "ordering rows")
        parts = order(lines, work / "parts", table, part_bytes=min(size // settings.shards + 1, PART_BYTES), dropped=dropped)
    if not parts.total:
        return parts
    exact, near, repeats = work / "exact", work / "near", work / "repeats"
    exact.touch()
    near.touch()
    if settings.deduplicate.exact:
        list_exact(table, parts, exact)
    minhash = settings.deduplicate.minhash
    execute([ReadPart(work / "parts"), Sketch(work / "sketches", parts, exact, minhash, settings.decontaminate)], parts.total, settings, work / "logs/sketch")
    if minhash:
        list_near(work / "sketches", table, parts, minhash, near)
    join_lists([exact, near], repeats)
    if settings.decontaminate:
        join_index(work / "evaluation", work / "sketches", table, parts, repeats)
    return parts


def write(settings: Preprocess, parts: Parts, work: Path) -> None:
    """Drop duplicates, decontaminate what trains, format conversations, and write each split."""
    from stages.steps.chat import FormatChat, WriteSplits
    from stages.steps.decontaminate import DropContaminated
    from stages.steps.deduplicate import DropRepeats
    from stages.steps.executors import execute
    from stages.steps.order import Table
    from stages.steps.parts import ReadPart
    from stages.steps.rows import Dropped

    steps = [
        ReadPart(work / "parts"),
        DropRepeats(work / "repeats", parts, Table(work / "table"), Dropped(work / "dropped", "repeats", settings.pii)),
        DropContaminated(work / "evaluation", work / "sketches", settings.decontaminate, Dropped(work / "dropped", "decontaminate", settings.pii)),
        FormatChat(settings.chat, Dropped(work / "dropped", "chat", settings.pii)),
        WriteSplits(work / "splits", work / "kept"),
    ]
    execute(steps, parts.total, settings, work / "logs/write")


def main() -> None:
    """Run the stage."""
    settings: Preprocess = conf.load("preprocess")
    os.environ["TQDM_DISABLE"] = "1"  # before datatrove is imported: its bars would run through ours
    from stages.steps.chat import compile_template
    from stages.steps.outputs import write_outputs
    from stages.steps.tally import read_tally

    for key in ("prompt", "completion"):
        compile_template(getattr(settings.chat, key), key)
    manifest = read_json(COLLECTED / "manifest.json")
    inputs = sources(manifest)
    with scratch("preprocess") as folder:
        work = folder.resolve()  # other machines see it under this path, and fsspec remembers what a relative one once meant
        clean(settings, inputs, work)
        read = read_tally(work / "counts")["read"]
        check_counts(manifest, read)
        write(settings, deduplicate(settings, work), work)
        summary = write_outputs(OUT, inputs, read, work)
    log.info("kept %s", ", ".join(f"{rows} {name}" for name, rows in summary["rows"].items()))


if __name__ == "__main__":
    from stages.run import run

    run(main)
