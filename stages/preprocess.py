"""Clean, deduplicate, redact, decontaminate, split and format the collected rows, and keep every dropped row with its reason.

Reads: data/collect/*.jsonl and manifest.json (a dataset's `use` is there).
Writes: data/preprocess/{train,validation,test,corpus,dropped}.jsonl, and last summary.json (counts per source and reason).
Config: preprocess

Streamed through datatrove tasks in `.dvc/tmp/trunkline/preprocess/`: no file is ever held whole. What grows with the rows in
memory is the n-grams of the evaluation sets (8 bytes each), the groups of test sources, and the members of near-duplicate clusters.
The rows are ordered by (use, source, id) once, and everything after keeps that order, so workers and shards change no byte.
`attack` and `benign` datasets pass by: redteam reads them from data/collect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conf
from conf.errors import DataError
from conf.schema import Preprocess
from stages.files import read_json, remove
from stages.run import WORK, progress

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
    """Normalise, drop what misses fields or quality, redact; writes sorted runs, and the n-grams of benchmark rows."""
    from stages.steps.clean import MissingFields, NormaliseText, PersonalData, Quality, WriteRuns
    from stages.steps.decontaminate import IndexEvaluation
    from stages.steps.executors import execute
    from stages.steps.rows import Dropped
    from stages.steps.sources import ReadSources

    steps = [
        ReadSources(inputs, work / "counts"),
        NormaliseText(settings.normalise),
        MissingFields(settings.missing, Dropped(work / "dropped", "missing", settings.pii)),
        Quality(settings.filters, Dropped(work / "dropped", "filters", settings.pii)),
        PersonalData(settings.pii, Dropped(work / "dropped", "pii", settings.pii), work / "redacted"),
        WriteRuns(work / "runs"),
        IndexEvaluation(work / "evaluation", settings.decontaminate),
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


def deduplicate(settings: Preprocess, work: Path) -> int:
    """Order the cleaned rows, cut them into parts, and list exact and near duplicates; returns the number of parts."""
    from stages.steps.deduplicate import DropListed, Signature, list_exact, list_near, minhash_config, order
    from stages.steps.executors import execute
    from stages.steps.parts import ReadPart
    from stages.steps.rows import Dropped, key, merged

    size = sum(path.stat().st_size for path in (work / "runs").glob("*.jsonl"))
    with Dropped(work / "dropped", "order", settings.pii) as dropped:
        rows = progress(merged(work / "runs", by=key), "ordering rows")
        part_bytes, keep_groups = max(size // settings.shards, 1), settings.split.by == "group"
        parts = order(rows, work / "parts", work / "digests", part_bytes=part_bytes, dropped=dropped, keep_groups=keep_groups)
    if settings.deduplicate.exact:
        list_exact(work / "digests", work / "exact-runs", work / "exact")
    if parts.total and (minhash := settings.deduplicate.minhash):
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster

        config = minhash_config(minhash)
        signatures, pairs, clusters = (str(work / "minhash" / name) for name in ("signatures", "pairs", "clusters"))
        sign = [ReadPart(work / "parts"), DropListed(work / "exact", "duplicate:exact"), Signature(signatures, minhash, parts.first_corpus)]
        execute(sign, parts.total, settings, work / "logs/signatures")
        execute([MinhashDedupBuckets(signatures, pairs, config=config)], minhash.buckets, settings, work / "logs/buckets")
        execute([MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True)], 1, settings, work / "logs/clusters")
        list_near(work / "parts", work / "exact", Path(clusters), work / "near")
    return parts.total


def split(settings: Preprocess, parts: int, work: Path) -> None:
    """Drop duplicates, assign splits, decontaminate what trains, and format conversations."""
    from stages.steps.chat import FormatChat, WriteSplits
    from stages.steps.decontaminate import DropContaminated, IndexEvaluation, join_index
    from stages.steps.deduplicate import DropListed
    from stages.steps.executors import execute
    from stages.steps.parts import ReadPart, WriteParts
    from stages.steps.rows import Dropped
    from stages.steps.split import AssignSplit

    steps = [
        ReadPart(work / "parts"),
        DropListed(work / "exact", "duplicate:exact", Dropped(work / "dropped", "exact", settings.pii)),
        DropListed(work / "near", "duplicate:near", Dropped(work / "dropped", "near", settings.pii)),
        AssignSplit(settings.split),
        IndexEvaluation(work / "evaluation", settings.decontaminate),
        WriteParts(work / "split"),
    ]
    execute(steps, parts, settings, work / "logs/split")
    join_index(work / "evaluation")
    steps = [
        ReadPart(work / "split"),
        DropContaminated(work / "evaluation", settings.decontaminate, Dropped(work / "dropped", "decontaminate", settings.pii)),
        FormatChat(settings.chat, Dropped(work / "dropped", "chat", settings.pii)),
        WriteSplits(work / "splits", work / "kept"),
    ]
    execute(steps, parts, settings, work / "logs/format")


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder to work in. What a run that stopped leaves of it is the logs: its rows hold what nobody has redacted yet."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            if path.name != "logs":
                remove(path)
    remove(folder)


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
    with scratch((WORK / "preprocess").resolve()) as work:  # other machines see it under this path, and fsspec remembers what a relative one once meant
        clean(settings, inputs, work)
        read = read_tally(work / "counts")["read"]
        check_counts(manifest, read)
        split(settings, deduplicate(settings, work), work)
        summary = write_outputs(OUT, inputs, read, work)
    log.info("kept %s", ", ".join(f"{rows} {name}" for name, rows in summary["rows"].items()))


if __name__ == "__main__":
    from stages.run import run

    run(main)
