"""Collect: every format into records, every damage named, and the manifest last."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conf.errors import ConfigError, DataError, DigestMismatch, PolicyBreach, TrunklineError
from conf.schema import Collect
from conf.yaml import read as read_yaml
from stages.collect import OUT, collect, main
from stages.files import read_json
from stages.records import Record, read_records
from stages.sources.download import DOWNLOADS
from stages.sources.policy import check_datasets

ROOT = Path(__file__).parent.parent
MIRROR = ROOT.parent / "shared" / "mirror"
POLICY = {purpose: {"classifications": ["public"], "licences": ["MIT"]} for purpose in ("training", "evaluation", "serving")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRUNKLINE_MIRROR", raising=False)
    return tmp_path


def dataset(path: str, content: bytes | str, use: str = "train", licence: str = "MIT", classification: str = "public", **keys: object) -> dict[str, object]:
    """A dataset of one local file, written here."""
    data = content.encode() if isinstance(content, str) else content
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)
    origin = {"kind": "files", "path": path, "sha256": hashlib.sha256(data).hexdigest(), "licence": licence, "classification": classification}
    return {"origin": origin, "use": use, **keys}


def configured(datasets: dict[str, dict[str, object]], **keys: object) -> Collect:
    return TypeAdapter(Collect).validate_json(json.dumps({"datasets": datasets, "policy": POLICY, **keys}))


def rows(path: str, content: bytes | str, limits: dict[str, object] | None = None, **keys: object) -> list[Record]:
    """Collect one file and read its records back."""
    collect(configured({"toy": dataset(path, content, **keys)}, **(limits or {})))
    return list(read_records(OUT / "toy.jsonl"))


# ---------------------------------------------------------------- formats

TWO = [("where is it", "order_status"), ('say "hi", now\nplease', "greeting")]


def as_csv(delimiter: str = ",") -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([("text", "category"), *TWO])
    return stream.getvalue()


def as_parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"text": [text for text, _ in TWO], "category": [label for _, label in TWO]}), stream)
    return stream.getvalue()


AS_JSONL = "".join(json.dumps({"text": text, "category": label}) + "\n" for text, label in TWO)
AS_HTML = "<title>T</title><ul>" + "".join(f"<li data-c={label}><pre>{text}</pre></li>" for text, label in TWO) + "</ul>"


@pytest.mark.parametrize(
    ("path", "content", "keys"),
    [
        ("a.jsonl", AS_JSONL, {}),
        ("a.ndjson.gz", gzip.compress(AS_JSONL.encode()), {}),
        ("a.jsonl.bz2", bz2.compress(AS_JSONL.encode()), {}),
        ("a.dat", AS_JSONL, {"format": "jsonl"}),
        ("a.jsonl", "\ufeff" + AS_JSONL, {}),
        ("a.jsonl", AS_JSONL.encode("utf-16"), {"encoding": "utf-16"}),
        ("a.json", json.dumps({"x": {"rows": [json.loads(line) for line in AS_JSONL.splitlines()]}}), {"rows_at": "x.rows"}),
        ("a.csv", as_csv(), {}),
        ("a.tsv", as_csv("\t"), {}),
        ("a.parquet", as_parquet(), {}),
        ("a.html", AS_HTML, {"rows_at": "li", "fields": {"text": "pre", "label": "@data-c"}}),
    ],
)
def test_every_table_gives_the_same_rows(path: str, content: bytes | str, keys: dict[str, object]) -> None:
    found = rows(path, content, **{"fields": {"label": "category"}, **keys})
    texts = [(" ".join(record.text.split()), record.label) for record in found]
    assert texts == [(" ".join(text.split()), label) for text, label in TWO]


def test_documents_are_one_row_each(here: Path) -> None:
    (text,) = rows("a.txt", "one\ntwo\n")
    assert text.text == "one\ntwo\n" and text.meta == {"file": "a.txt"}
    (page,) = rows(
        "a.html",
        "<html><head><title>Returns</title><style>p{}</style></head><body><h1>Returns</h1><p>Within\n<b>30</b> days.</p>"
        "<script>alert(1)</script><p>Free.</p></body></html>",
    )
    assert page.text == "Returns\nWithin 30 days.\nFree." and page.meta == {"file": "a.html", "title": "Returns"}
    (article,) = rows("a.md", "---\nid: policy-7\ntitle: Returns\nsince: 2024-05-01\n---\n# Returns\n\nWithin 30 days.\n")
    assert (article.id, article.text, article.meta) == ("policy-7", "# Returns\n\nWithin 30 days.", {"title": "Returns", "since": "2024-05-01", "file": "a.md"})
    (plain,) = rows("b.md", "# No front matter\n---\nbelow a rule\n")
    assert plain.text.startswith("# No front matter")


def test_lines_and_texts(here: Path) -> None:
    assert [record.text for record in rows("a.txt", "one\r\n\n two\n", format="lines")] == ["one", " two"]
    assert [record.text for record in rows("a.json", '["one", "two"]')] == ["one", "two"]
    assert [record.text for record in rows("a.jsonl", '"one"\n{"text": "two"}\n')] == ["one", "two"]
    assert [record.text for record in rows("a.json", '{"b": ["one"], "a": ["two"]}', rows_at="*")] == ["one", "two"]


def test_fields_meta_and_limit(here: Path) -> None:
    content = '{"q": "one", "n": 1, "tags": ["x"], "id": 7}\n{"q": null, "label": true, "id": 8}\n{"q": "three"}\n'
    found = rows("a.jsonl", content, fields={"text": "q"}, limit=2)
    assert [(record.id, record.text, record.label, record.meta) for record in found] == [("7", "one", "", {"n": 1, "tags": ["x"]}), ("8", "", "true", {})]
    assert {(record.source, record.licence, record.classification) for record in found} == {("toy", "MIT", "public")}


def test_parquet_values_become_plain(here: Path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "at": [datetime.datetime(2024, 5, 1, 12)], "price": [decimal.Decimal("1.50")], "score": [float("nan")]}), stream)
    assert rows("a.parquet", stream.getvalue())[0].meta == {"at": "2024-05-01T12:00:00", "price": "1.50", "score": None}


# ---------------------------------------------------------------- damage

DAMAGED = {
    "cut short": ("a.jsonl", '{"text": "a"}\n{"text": "b', {}, r"a\.jsonl:2: no JSON"),
    "not an object": ("a.jsonl", "[1]\n", {}, r"a\.jsonl:1: a list"),
    "NaN": ("a.jsonl", '{"text": "a", "n": NaN}\n', {}, "NaN is no JSON"),
    "deep": ("a.jsonl", "[" * 100_000 + "\n", {}, r"a\.jsonl:1: no JSON"),
    "wrong byte": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', {}, r"a\.jsonl:2: byte 27 \(0xe9\) is not utf-8"),
    "NUL byte": ("a.txt", b"ab\ncd\0", {"format": "lines"}, r"a\.txt:2: a NUL byte at byte 5"),
    "NUL escaped": ("a.jsonl", '{"text": "a\\u0000"}\n', {}, r"a\.jsonl:1, column text: a NUL character at character 1"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}\n', {}, r"U\+D800"),
    "open quote": ("a.csv", 'text\n"never closed\nx\n', {}, r"a\.csv:3: no CSV"),
    "too many values": ("a.csv", "text,label\na,b\nc,d,e\n", {}, r"a\.csv:3: 3 values under 2 columns"),
    "column twice": ("a.csv", "text,text\na,b\n", {}, "names a column twice"),
    "no such column": ("a.csv", "body,category\na,b\n", {}, "no column for fields.text: text\n.*body, category"),
    "mapped nowhere": ("a.csv", "text,category\na,b\n", {"fields": {"label": "kind"}, "limit": 1}, "no column for fields.label: kind"),
    "empty": ("a.csv", "text,label\n", {}, "has no rows"),
    "no bytes": ("a.jsonl", "", {}, "has no rows"),
    "same id": ("a.jsonl", '{"id": "t1", "text": "a"}\n{"id": "t1", "text": "b"}\n', {}, r"a\.jsonl:2: id 't1' was given before, to a\.jsonl:1"),
    "no parquet": ("a.parquet", b"PAR1 or so", {}, "no Parquet"),
    "no gzip": ("a.jsonl.gz", gzip.compress(AS_JSONL.encode())[:-9], {}, "cannot be decompressed"),
    "no array": ("a.json", '{"rows": 1}', {"rows_at": "rows"}, "rows is no array"),
    "no key": ("a.json", '{"rows": []}', {"rows_at": "row"}, "it has the keys rows"),
    "front matter": ("a.md", "---\na: [\n---\nx", {}, "front matter is no YAML"),
    "selector": ("a.html", "<p>x</p>", {"rows_at": "p["}, "is no CSS"),
    "unknown format": ("a.dat", "x", {}, "does not tell the format"),
    "unknown encoding": ("a.txt", "x", {"encoding": "utf-9"}, "encoding 'utf-9' is unknown"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_and_nothing_is_written(case: str) -> None:
    path, content, keys, reason = DAMAGED[case]
    with pytest.raises(TrunklineError, match=reason) as caught:
        rows(path, content, **keys)
    assert isinstance(caught.value, DataError | ConfigError) and caught.value.remedy
    assert list(Path("data").iterdir()) == []


@pytest.mark.parametrize("path", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_rows_too_long_are_refused(path: str) -> None:
    text = "x" * 5000
    content = {"a.jsonl": json.dumps({"text": text}), "a.csv": f'text\n"{text}', "a.txt": text, "a.json": json.dumps([text])}[path]
    with pytest.raises(DataError, match=r"longer than collect\.max_row_bytes=1000"):
        rows(path, content, {"max_row_bytes": 1000})


def test_decompression_bomb_is_refused() -> None:
    with pytest.raises(DataError, match=r"max_source_bytes=1000000 when decompressed"):
        rows("a.txt.gz", gzip.compress((b"0" * 9_999 + b"\n") * 1000), {"max_source_bytes": 1_000_000}, format="lines")


# ---------------------------------------------------------------- ids, determinism

ROW = st.fixed_dictionaries({"text": st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=3)})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, min_size=1, max_size=8))
def test_derived_ids_are_unique_and_the_bytes_repeat(data: list[dict[str, str]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in data)
    found = rows("a.jsonl", content)
    assert [record.text for record in found] == [row["text"] for row in data]
    assert len({record.id for record in found}) == len(data)
    written = (OUT / "toy.jsonl").read_bytes()
    rows("a.jsonl", content)
    assert (OUT / "toy.jsonl").read_bytes() == written


def test_equal_rows_are_told_apart_by_a_suffix() -> None:
    first, other, second, third = [record.id for record in rows("a.txt", "x\ny\nx\nx\n", format="lines")]
    assert (second, third) == (f"{first}-2", f"{first}-3") and other != first


# ---------------------------------------------------------------- manifest, policy, main


def test_manifest_says_what_was_collected(here: Path) -> None:
    (here / "b").mkdir()
    manifest = collect(configured({"one": dataset("a.txt", "x\ny", format="lines"), "two": dataset("b/a.jsonl", AS_JSONL, use="test")}))
    assert read_json(OUT / "manifest.json") == manifest
    assert manifest["one"] == {
        "kind": "files",
        "address": "a.txt",
        "pinned": hashlib.sha256(b"x\ny").hexdigest(),
        "sha256": hashlib.sha256(b"x\ny").hexdigest(),
        "licence": "MIT",
        "classification": "public",
        "use": "train",
        "rows": 2,
        "files": ["a.txt"],
    }
    collect(configured({"two": dataset("b/a.jsonl", AS_JSONL)}))
    assert sorted(path.name for path in OUT.iterdir()) == ["manifest.json", "two.jsonl"]  # a dataset that is gone leaves nothing behind
    assert str(here) not in (OUT / "manifest.json").read_text()


def test_every_breach_is_told_before_anything_is_read() -> None:
    datasets = {
        "gpl": dataset("a.txt", "x", licence="GPL-3.0-only"),
        "secret": dataset("b.txt", "x", use="attack", classification="restricted"),
        "fine": dataset("c.txt", "x"),
    }
    Path("c.txt").unlink()  # reading would fail
    with pytest.raises(PolicyBreach) as caught:
        collect(configured(datasets))
    said = str(caught.value)
    assert "gpl: licence GPL-3.0-only may not be used for training" in said
    assert "secret: classification restricted may not be used for evaluation" in said and "fine" not in said


def test_wrong_digest_stops_the_stage_and_the_old_output_stays() -> None:
    fine = dataset("a.txt", "x")
    collect(configured({"toy": fine}))
    Path("a.txt").write_text("altered")
    with pytest.raises(DigestMismatch) as caught:
        collect(configured({"toy": fine}))
    assert hashlib.sha256(b"x").hexdigest() in str(caught.value) and hashlib.sha256(b"altered").hexdigest() in str(caught.value)
    assert [record.text for record in read_records(OUT / "toy.jsonl")] == ["x"]


def test_main_reads_params() -> None:
    params = {"collect": {"datasets": {"toy": dataset("a.txt", "x")}, "policy": POLICY}}
    Path("params.yaml").write_text(json.dumps(params), encoding="utf-8")
    main()
    assert read_json(OUT / "manifest.json")["toy"]["rows"] == 1


# ---------------------------------------------------------------- what is shipped


def shipped(*choices: str) -> Collect:
    """The named files of conf/collect/, merged as their defaults lists merge them."""
    merged: dict[str, dict[str, object]] = {}
    for choice in choices:
        for key, value in read_yaml(ROOT / "conf" / "collect" / f"{choice}.yaml").items():
            if key != "defaults":
                merged.setdefault(key, {}).update(value)
    return TypeAdapter(Collect).validate_json(json.dumps(merged))


def test_shipped_sources_fit_the_schema_and_the_policy() -> None:
    settings = shipped("policy", "benchmarks", "attacks", "banking77")
    check_datasets(settings.datasets, settings.policy)
    families = [name for name, dataset in settings.datasets.items() if dataset.use == "attack"]
    assert len(families) >= 6 and any(dataset.use == "benign" for dataset in settings.datasets.values())


@pytest.mark.skipif(not MIRROR.is_dir(), reason="the mirror is not here")
def test_banking77_comes_from_the_mirror_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_MIRROR", str(MIRROR))
    settings = shipped("policy", "banking77")
    manifest = collect(settings)
    assert {name: entry["rows"] for name, entry in manifest.items()} == {"banking77-train": 10003, "banking77-test": 3080}
    assert len({record.label for record in read_records(OUT / "banking77-train.jsonl")}) == 77
    assert not DOWNLOADS.exists()
