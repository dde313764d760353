"""Fetch every source, hold it against its digest and the access policy, and write its rows as records.

Reads:  the addresses of `collect.datasets`; `data/raw/` for those of kind `files`; the mirror that `TRUNKLINE_MIRROR` names, first.
Writes: data/collect/<dataset>.jsonl, one record per row, in the order of the source; data/collect/manifest.json, last.
Config: collect
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import conf
from conf.errors import DataError
from conf.schema import Collect, Dataset
from stages.files import publish, write_json, write_jsonl
from stages.records import Record
from stages.sources.fetch import address, fetch, file_name, pinned
from stages.sources.files import listing
from stages.sources.policy import check_datasets
from stages.sources.read import Row, read
from stages.sources.text import File

OUT = Path("data/collect")

log = logging.getLogger(__name__)


def records(name: str, dataset: Dataset, rows: Iterable[Row]) -> Iterator[Record]:
    """Rows as records. A row without an id gets the digest of its content; equal rows then get -2, -3, … behind it.

    Raises:
        DataError: two rows have the same id of their own; names it and both places.
    """
    places: dict[str, str] = {}
    derived: Counter[bytes] = Counter()
    for row in rows:
        own = row.fields.get("id", "").strip()
        if own in places:
            raise DataError(
                f"{name}: {row.where}: id {own!r} was given before, to {places[own]}",
                "ids must be unique in a source: mend it, or map `fields.id` to another column",
            )
        if own:
            places[own] = row.where
        else:
            key = bytes.fromhex(row.digest[:32])
            derived[key] += 1
            own = row.digest[:32] + (f"-{derived[key]}" if derived[key] > 1 else "")
        yield Record(
            id=own,
            source=name,
            licence=dataset.origin.licence,
            classification=dataset.origin.classification,
            meta=row.meta,
            text=row.fields.get("text", ""),
            completion=row.fields.get("completion", ""),
            label=row.fields.get("label", ""),
            group=row.fields.get("group", ""),
        )


def collect_one(name: str, dataset: Dataset, settings: Collect, folder: Path) -> dict[str, object]:
    """Fetch, read and write one dataset; returns its entry in the manifest.

    Raises:
        DataError: it has no rows, or a damaged one.
    """
    origin = dataset.origin
    paths = fetch(name, origin, retries=settings.retries, timeout=settings.timeout, max_bytes=settings.max_source_bytes)
    files = [
        File(path=path, name=file_name(origin, path), dataset=dataset, max_row_bytes=settings.max_row_bytes, max_bytes=settings.max_source_bytes)
        for path in paths
    ]
    rows = write_jsonl(folder / f"{name}.jsonl", map(vars, records(name, dataset, read(files))))
    if rows == 0:
        raise DataError(f"{name}: {address(origin)} has no rows", "check the source, `format` and `rows_at`")
    log.info("%s: %d rows from %s", name, rows, address(origin))
    return {
        "kind": origin.kind,
        "address": address(origin),
        "pinned": pinned(origin),
        "licence": origin.licence,
        "classification": origin.classification,
        "use": dataset.use,
        "rows": rows,
        "sha256": listing({file.name: file.path for file in files}),
        "files": [file.name for file in files],
    }


def collect(settings: Collect) -> dict[str, dict[str, object]]:
    """Write every dataset and the manifest, all or nothing; returns the manifest."""
    check_datasets(settings.datasets, settings.policy)
    with publish(OUT) as folder:
        folder.mkdir()
        manifest = {name: collect_one(name, dataset, settings, folder) for name, dataset in sorted(settings.datasets.items())}
        write_json(folder / "manifest.json", manifest)
    return manifest


def main() -> None:
    """Run the stage."""
    collect(conf.load("collect"))


if __name__ == "__main__":
    from stages.run import run

    run(main)
