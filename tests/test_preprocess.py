"""Preprocess: each rule by toy data that trips it alone, the order of preference among duplicates, and bytes that no worker or shard changes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, DataError
from conf.schema import Filters, MinHash, Normalise, Pii, Preprocess, Slurm, Split
from stages import preprocess
from stages.files import read_json, read_jsonl, sha256, write_json, write_jsonl
from stages.steps.rows import LONGEST_DROPPED, beginning, redacted_value
from tests.conftest import ROOT

Rows = list[dict[str, Any]]
ANIMALS = ("otter", "heron", "badger", "lynx", "marten", "stoat", "curlew", "plover", "godwit", "dunlin", "osprey", "kestrel", "merlin", "hobby", "hawk", "tit")


def sentence(number: int) -> str:
    """A text of eight words that no other number shares a shingle with."""
    return " ".join(f"{ANIMALS[(number + i) % 16]}{'abcdefghij'[number // 16 % 10]}{'klmnopqrst'[number // 160 % 10]}{'uvwxyz'[i % 6]}" for i in range(8))


def row(id: str, text: str, **fields: Any) -> dict[str, Any]:
    """One row as collect writes it; `source` is filled in by `collect`."""
    base = {"id": id, "licence": "Apache-2.0", "classification": "public", "completion": "Yes.", "label": "yes", "group": "", "messages": [], "meta": {}}
    return {**base, "text": text, **fields}


FILLER = [row(f"filler-{i:03d}", sentence(i)) for i in range(40)]
OPEN = {"filters": {}, "deduplicate": {"exact": True, "minhash": {"ngram": 3, "buckets": 6, "hashes_per_bucket": 3}}, "split": {"validation": 0.1, "test": 0.2}}


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def collect(**datasets: tuple[str, Rows]) -> None:
    """Write data/collect: name -> (use, rows)."""
    for name, (_, rows) in datasets.items():
        write_jsonl(Path(f"data/collect/{name}.jsonl"), ({**row, "source": name} for row in rows))
    write_json(Path("data/collect/manifest.json"), {name: {"use": use, "rows": len(rows)} for name, (use, rows) in datasets.items()})


def run(**changes: Any) -> dict[str, Any]:
    """Run the stage with changed settings; returns the summary."""
    write_json(Path("params.yaml"), {"preprocess": {**OPEN, "shards": 2, **changes}})
    preprocess.main()
    summary: dict[str, Any] = read_json(Path("data/preprocess/summary.json"))
    return summary


def ids(split: str) -> set[str]:
    """The ids in one output."""
    return {row["id"] for row in read_jsonl(Path(f"data/preprocess/{split}.jsonl"))}


def kept() -> set[str]:
    """The ids in any split."""
    return ids("train") | ids("validation") | ids("test") | ids("corpus")


def reasons() -> dict[str, str]:
    """Id -> reason of each dropped row."""
    return {row["id"]: row["reason"] for row in read_jsonl(Path("data/preprocess/dropped.jsonl"))}


def digests() -> dict[str, str]:
    """Digest of each output."""
    return {path.name: sha256(path) for path in sorted(Path("data/preprocess").iterdir())}


# ---------------------------------------------------------------- one rule each


@pytest.mark.parametrize(
    ("bad", "changes", "reason"),
    [
        ({"text": "  "}, {}, "missing:text"),
        ({"label": ""}, {"missing": {"label": {"action": "drop"}}}, "missing:label"),
        ({"text": "ab cd"}, {"filters": {"min_chars": 6}}, "min_chars"),
        ({"text": "word " * 60}, {"filters": {"max_chars": 200}}, "max_chars"),
        ({"text": "two words"}, {"filters": {"min_words": 3}}, "min_words"),
        ({"text": "12 34 56 78 ab"}, {"filters": {"min_alpha": 0.5}}, "min_alpha"),
        ({"text": "spam " * 9 + "ham eggs"}, {"filters": {"max_repetition": 0.5}}, "max_repetition"),
        ({"text": "my card is 4111 1111 1111 1111"}, {"pii": {"action": "drop"}}, "pii:card"),
        ({"completion": "ask jo@example.com"}, {"pii": {"action": "drop"}}, "pii:email"),
        ({"text": FILLER[0]["text"].upper()}, {}, "duplicate:exact of rows/filler-000"),
        ({"text": "Please, " + FILLER[0]["text"] + "!"}, {}, "duplicate:near of rows/filler-000"),
        ({"completion": ""}, {}, "chat:completion"),
        ({"id": "filler-039", "text": "another text under a known id"}, {}, "duplicate:id of rows/filler-039"),
    ],
)
def test_a_row_is_dropped_with_its_reason(bad: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    bad = row(**{"id": "z", "text": "a plain message about nothing at all", **bad})
    collect(rows=("train", [*FILLER, bad]))
    summary = run(**changes)
    dropped = list(read_jsonl(Path("data/preprocess/dropped.jsonl")))
    assert [row["reason"] for row in dropped] == [reason]
    assert summary["sources"]["rows"]["dropped"] == summary["reasons"] == {reason.split(" of ")[0]: 1}
    assert summary["sources"]["rows"]["read"] == 41 and sum(summary["sources"]["rows"]["kept"].values()) == 40
    assert set(dropped[0]) == {*FILLER[0], "source", "reason"}


def test_what_is_good_is_kept_in_order_and_formatted() -> None:
    collect(rows=("train", FILLER[::-1]))
    summary = run(chat={"system": "Be {brief}.", "prompt": "Q: {{ text }}", "completion": "{{ label }}\n{{ completion }}\n"})
    assert reasons() == {} and summary["rows"]["dropped"] == 0
    for split in ("train", "validation", "test"):
        rows = list(read_jsonl(Path(f"data/preprocess/{split}.jsonl")))
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
        assert len(rows) == summary["rows"][split] > 0
        for each in rows:
            assert [m["role"] for m in each["messages"]] == ["system", "user", "assistant"]
            assert [m["content"] for m in each["messages"]] == ["Be {brief}.", f"Q: {each['text']}", "yes\nYes."]
            assert each["completion"] == "yes\nYes." and set(each) == {*FILLER[0], "source"}


def test_missing_fields_are_filled_or_stop_the_run_by_name() -> None:
    collect(rows=("train", [*FILLER, row("z", "a plain message about nothing", label=" ")]))
    run(missing={"label": {"action": "fill", "value": "none"}})
    assert {r["label"] for s in ("train", "validation", "test") for r in read_jsonl(Path(f"data/preprocess/{s}.jsonl")) if r["id"] == "z"} == {"none"}
    with pytest.raises(DataError, match=r"source rows, id z: field label is empty"):
        run(missing={"label": {"action": "fail"}})


def test_text_is_normalised() -> None:
    collect(rows=("train", [*FILLER, row("z", "  the cafÃ© &amp; bar\u00a0 is\r\n\r\n\r\n\r\nopen cafe\u0301 ", meta={"half": "HALF"})]))
    path = Path("data/collect/rows.jsonl")
    path.write_text(path.read_text().replace("HALF", r"\ud83d"))
    run()
    found = [r for s in ("train", "validation", "test") for r in read_jsonl(Path(f"data/preprocess/{s}.jsonl")) if r["id"] == "z"]
    assert found[0]["text"] == "the café & bar is\n\nopen café"
    assert found[0]["meta"] == {"half": "\ufffd"}


def test_personal_data_is_redacted_everywhere_and_counted() -> None:
    mail = "jo@example.com"
    bad = row("y", f"write to {mail} about the late parcel", completion=f"Sent to {mail}.", group=mail, meta={"from": [mail]})
    collect(rows=("train", [*FILLER, bad, row("z", f"{mail} no", label="")]))
    summary = run(missing={"label": {"action": "drop"}})
    assert summary["redacted"] == {"email": 2}
    assert reasons() == {"z": "missing:label"}
    for path in Path("data/preprocess").iterdir():
        assert mail not in path.read_text()
    assert "<EMAIL>" in Path("data/preprocess/dropped.jsonl").read_text()


def test_personal_data_stays_where_it_is_switched_off() -> None:
    collect(rows=("train", [*FILLER, row("y", "write to jo@example.com about it")]))
    run(pii={"action": "off"})
    assert any("jo@example.com" in path.read_text() for path in Path("data/preprocess").iterdir())


@pytest.mark.parametrize("text", ["call 4111111111111111 now " * 200_000, "é" * 4_000_000, "1.2." * 1_000_000])
def test_an_endless_line_is_dropped_and_kept_in_part(text: str) -> None:
    collect(rows=("train", [*FILLER, row("z", text)]))
    assert run()["reasons"] == {"max_chars": 1}
    kept = next(read_jsonl(Path("data/preprocess/dropped.jsonl")))["text"]
    assert kept.endswith(f"… ({len(text.strip())} characters)") and "4111" not in kept


@pytest.mark.parametrize("blank", [" ", ""])
def test_no_half_of_personal_data_is_kept_of_a_long_row(blank: str) -> None:
    for shift in range(0, 30, 3):
        text = "x" * shift + f"{blank}jo@example.com{blank},, 4111 1111 1111 1111{blank},," * 2_000
        kept = beginning(text, Pii())
        assert 8_000 < len(kept) <= LONGEST_DROPPED
        assert "jo@" not in kept and "4111" not in kept and "example" not in kept


def test_the_names_in_meta_are_redacted_and_none_is_lost() -> None:
    meta = {"jo@example.com": 1, "al@example.com": {"from 4111111111111111": "x"}, "n": 2}
    assert redacted_value(meta, Pii()) == {"<EMAIL>": 1, "<EMAIL> 1": {"from <CARD>": "x"}, "n": 2}


# ---------------------------------------------------------------- which duplicate stays


def test_a_test_row_is_kept_and_its_repeats_in_training_are_dropped() -> None:
    test = [row("t1", sentence(300)), row("t2", sentence(300)), row("t3", sentence(301))]
    train = [row("a1", sentence(300).title()), row("a2", "Hello there " + sentence(301)), *FILLER]
    collect(aaa=("train", train), zzz=("test", test))
    run(split={"test": 0.0})
    assert ids("test") == {"t1", "t2", "t3"}
    assert reasons() == {"a1": "duplicate:exact of zzz/t1", "a2": "duplicate:near of zzz/t3"}


def test_the_first_by_source_and_id_is_kept() -> None:
    same = [row(id, sentence(300)) for id in ("c", "b", "d")]
    collect(beta=("train", [*same, *FILLER]), alpha=("train", [row("e", "well, " + sentence(300))]))
    run()
    assert "e" in kept()
    assert reasons() == {"b": "duplicate:near of alpha/e", "c": "duplicate:exact of beta/b", "d": "duplicate:exact of beta/b"}


def test_documents_are_compared_among_themselves_only() -> None:
    document = {"completion": "", "label": ""}
    corpus = [row("d1", FILLER[0]["text"], **document), row("d2", FILLER[0]["text"], **document), row("d3", sentence(300), **document)]
    collect(rows=("train", FILLER), articles=("corpus", corpus))
    summary = run(missing={"text": {"action": "drop"}, "label": {"action": "drop"}}, decontaminate=None)
    assert reasons() == {"d2": "duplicate:exact of articles/d1"}
    assert ids("corpus") == {"d1", "d3"} and summary["rows"]["corpus"] == 2


def test_deduplication_can_be_switched_off() -> None:
    collect(rows=("train", [*FILLER, row("y", FILLER[0]["text"]), row("z", "well, " + FILLER[0]["text"])]))
    run(deduplicate={"exact": False, "minhash": None}, decontaminate=None)
    assert reasons() == {}


def test_deduplicating_again_drops_nothing() -> None:
    collect(rows=("train", [*FILLER, *(row(f"z{i}", FILLER[i]["text"]) for i in range(9))]))
    assert run(decontaminate=None)["reasons"] == {"duplicate:exact": 9}
    again = [row for split in ("train", "validation", "test") for row in read_jsonl(Path(f"data/preprocess/{split}.jsonl"))]
    collect(rows=("train", again))
    assert run(decontaminate=None)["reasons"] == {}


# ---------------------------------------------------------------- decontamination


def test_training_rows_that_repeat_an_evaluation_row_are_dropped() -> None:
    long = " ".join(sentence(i) for i in range(300, 304))
    half = " ".join(sentence(i) for i in (300, *range(310, 316)))
    train = [row("long", "By the way: " + long), row("half", half), row("short", "is it open?!")]
    quiz, official = [row("q", long), row("s", "Is it open")], [row("t", sentence(400))]
    collect(rows=("train", [*FILLER, *train]), quiz=("benchmark", quiz), official=("test", official))
    summary = run(split={"test": 0.0, "validation": 0.0})
    assert reasons() == {"long": "contaminated:quiz", "short": "contaminated:quiz"}
    assert summary["sources"]["quiz"] == {"use": "benchmark", "read": 2, "kept": {}, "dropped": {}}


def test_rows_that_repeat_the_test_split_are_dropped_and_the_test_split_stays() -> None:
    collect(rows=("train", [*FILLER, row("z", sentence(300) + " and more")]), official=("test", [row("t", sentence(300) + " for me")]))
    run(deduplicate={"minhash": None}, split={"validation": 0.0, "test": 0.0}, decontaminate={"ngram": 4})
    assert reasons() == {"z": "contaminated:test"} and ids("test") == {"t"}


def test_decontamination_can_be_switched_off() -> None:
    collect(rows=("train", [*FILLER, row("z", sentence(300) + " and more")]), official=("test", [row("t", sentence(300) + " for me")]))
    run(deduplicate={"minhash": None}, split={"validation": 0.0, "test": 0.0}, decontaminate=None)
    assert reasons() == {}


# ---------------------------------------------------------------- what stops the run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], r"rows\.jsonl:40: the file ends in the middle of a line"),
        (lambda text: text[: text.index("\n", 9000) + 1], r"rows\.jsonl is truncated or altered: \d+ rows, and 40"),
        (lambda text: text.replace('"id": "filler-007"', '"id": filler-007'), r"rows\.jsonl:8: Expecting value"),
        (lambda text: text.replace('"id": "filler-007"', '"id": 7'), r"rows\.jsonl:8: no record"),
        (lambda text: text.replace('"meta": {}', '"meta": {"a": NaN}', 1), r"rows\.jsonl:1: NaN is no JSON"),
        (lambda text: text.replace('"source": "rows"', '"source": "else"', 1), r"row filler-000 says source='else'"),
        (lambda text: "", r"0 rows, and 40"),
    ],
)
def test_damaged_input_stops_the_run_and_is_named(damage: Any, message: str) -> None:
    collect(rows=("train", FILLER))
    path = Path("data/collect/rows.jsonl")
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        run(shards=3)
    assert not Path("data/preprocess").exists()


def test_a_failure_in_a_worker_process_is_told_in_the_same_sentence() -> None:
    collect(rows=("train", [*FILLER, row("z", "a plain message", label="")]))
    with pytest.raises(DataError, match=r"source rows, id z: field label is empty"):
        run(workers=2, missing={"label": {"action": "fail"}})


def test_missing_input_stops_the_run() -> None:
    collect(rows=("train", FILLER))
    Path("data/collect/rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"data/collect/rows\.jsonl is missing"):
        run()
    shutil.rmtree("data/collect")
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        run()


def test_nothing_to_train_on_or_to_test_with_stops_the_run_and_leaves_the_old_outputs() -> None:
    collect(rows=("train", FILLER))
    run()
    before = digests()
    with pytest.raises(DataError, match=r"no row is left to train on; dropped: \{'min_chars': 40\}"):
        run(filters={"min_chars": 5000})
    with pytest.raises(DataError, match=r"no row is left to test with"):
        run(split={"test": 0.0})
    collect(rows=("test", FILLER))
    with pytest.raises(DataError, match=r"no row is left to train on"):
        run()
    assert digests() == before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ text", r"preprocess\.chat\.prompt='\{\{ text' is no Jinja template"),
        ("{{ tekst }}", r"preprocess\.chat\.prompt fails on rows/filler-\d+: 'tekst' is undefined"),
        ("{{ text.__class__.__mro__ }}", r"preprocess\.chat\.prompt fails on .*unsafe"),
    ],
)
def test_a_bad_template_stops_the_run_by_name(prompt: str, message: str) -> None:
    collect(rows=("train", FILLER))
    with pytest.raises(ConfigError, match=message):
        run(chat={"prompt": prompt})


# ---------------------------------------------------------------- splitting


def test_groups_lie_on_one_side_and_leave_training_when_a_test_source_has_them() -> None:
    from stages.steps.split import side, split_key

    rows = [row(f"r{i:03d}", sentence(100 + i), group=f"customer-{i % 12}") for i in range(120)]
    collect(rows=("train", [*rows, row("free", sentence(300))]), official=("test", [row("t", sentence(301), group="customer-0")]))
    split = {"by": "group", "validation": 0.2, "test": 0.2}
    summary = run(split=split)
    sides = {name: {r["group"] for r in read_jsonl(Path(f"data/preprocess/{name}.jsonl"))} - {""} for name in ("train", "validation", "test")}
    assert all(sides.values())
    assert not sides["train"] & sides["validation"] and not sides["train"] & sides["test"] and not sides["validation"] & sides["test"]
    assert summary["reasons"] == {"group:test": 10}
    assert side(split_key("rows", "free", "", Split(**split)), Split(**split)) in ("train", "validation", "test")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.text(max_size=3), st.sampled_from(["", "g", "h"]))), st.sampled_from(["id", "group"]))
def test_a_row_never_changes_side_when_others_come(rows: list[tuple[str, str, str]], by: Any) -> None:
    from stages.steps.split import side, split_key

    chosen = Split(validation=0.3, test=0.3, by=by)
    sides = [side(split_key(*row, chosen), chosen) for row in rows]
    assert [side(split_key(*row, chosen), chosen) for row in rows[: len(rows) // 2]] == sides[: len(rows) // 2]
    if by == "group":
        for group in ("g", "h"):
            assert len({s for s, row in zip(sides, rows, strict=True) if row[2] == group}) <= 1


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.15), (0.3, 0.0), (0.0, 0.5)])
def test_shares_are_as_set(validation: float, test: float) -> None:
    from stages.steps.split import side

    sides = [side(f"rows/{i}", Split(validation=validation, test=test)) for i in range(20_000)]
    assert abs(sides.count("validation") / 20_000 - validation) < 0.01
    assert abs(sides.count("test") / 20_000 - test) < 0.01


def test_another_salt_is_another_split() -> None:
    from stages.steps.split import side

    assert [side(str(i), Split(salt="a", test=0.5)) for i in range(50)] != [side(str(i), Split(salt="b", test=0.5)) for i in range(50)]


# ---------------------------------------------------------------- the same bytes


def dirty(count: int) -> Rows:
    """Rows of which some are dropped for every reason."""
    rows = []
    for i in range(count):
        text = sentence(i % 700 if i % 9 else i % 50)
        text = ("Hello, " + text, text, f"{text} jo{i}@example.com", "", text.upper() + " \u00a0", "x")[i % 6]
        rows.append(row(f"{(i * 7919) % 100_003:06d}", text, group=f"g{i % 30}", meta={"number": i}))
    return rows


def test_neither_workers_nor_shards_change_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dirty(600)
    uses = {"one": ("train", 0, 400), "two": ("train", 400, 500), "three": ("test", 500, 540), "four": ("corpus", 540, 580), "five": ("benchmark", 580, 600)}
    collect(**{name: (use, rows[start:end]) for name, (use, start, end) in uses.items()})
    seen = []
    for workers, shards in ((1, 1), (1, 3), (2, 5), (3, 4)):
        monkeypatch.setenv("TRUNKLINE_WORKERS", str(workers))
        summary = run(shards=shards, filters={"min_words": 2})
        assert {"missing:text", "min_words", "duplicate:exact", "duplicate:near"} <= set(summary["reasons"])
        seen.append(digests())
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_the_order_of_the_input_changes_no_byte() -> None:
    rows = dirty(200)
    collect(one=("train", rows))
    run()
    before = digests()
    collect(one=("train", rows[::-1]))
    run()
    assert digests() == before


def test_many_small_runs_make_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.steps import deduplicate, grams, order
    from stages.steps import rows as rows_module

    collect(one=("train", [*dirty(300), *(row("000000", sentence(500 + i)) for i in range(9))]))
    assert run()["reasons"]["duplicate:id"] == 9
    before = digests()
    monkeypatch.setattr(rows_module, "RUN_BYTES", 2000)
    monkeypatch.setattr(rows_module, "FAN_IN", 3)
    for module, name, value in (
        (order, "PART_BYTES", 3000),
        (order, "BUFFERED", 7),
        (deduplicate, "TEXTS", 5),
        (deduplicate, "HELD", 10),
        (grams, "KNOWN_WORDS", 9),
    ):
        monkeypatch.setattr(module, name, value)
    run()
    assert digests() == before


# ---------------------------------------------------------------- pieces


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_normalising_whitespace_is_idempotent(text: str) -> None:
    from stages.steps.clean import collapse

    once = collapse(text)
    assert collapse(once) == once and "\n\n\n" not in once and "  " not in once


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=30), st.integers(1, 7))
def test_shares_of_a_file_are_a_partition_of_its_lines(texts: list[str], shares: int) -> None:
    from stages.steps.sources import line_number, read_share

    path = Path("rows.jsonl")
    write_jsonl(path, (row(str(i), text.encode(errors="replace").decode()) for i, text in enumerate(texts)))
    assert [r["id"] for share in range(shares) for r in read_share(path, share, shares)] == [str(i) for i in range(len(texts))]
    assert line_number(path, path.stat().st_size) == len(texts) + 1


def test_settings_of_normalise_are_read() -> None:
    from stages.steps.clean import NormaliseText

    assert NormaliseText(Normalise(ftfy=False, unicode=None, whitespace=False)).normalise(" cafÃ©  e\u0301 ") == " cafÃ©  e\u0301 "
    assert NormaliseText(Normalise(ftfy=False, unicode="NFKC")).normalise("ﬁve") == "five"
    assert NormaliseText(Normalise(ftfy=True, unicode=None)).normalise("cafÃ©") == "café"


def test_scripts_without_blanks_are_compared_by_character() -> None:
    from stages.steps.grams import words

    assert [word.decode() for word in words("退货政策 is OK, No. 7!")] == ["退", "货", "政", "策", "is", "ok", "no", "0"]


mixed = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(alphabet="aZ ,.!1234\n\t\r&;é\u0301ÃÂ©\u00a0ß\x07\x85Ⅷ٣", max_size=20),
        st.sampled_from(["cafÃ©", "&amp;", "itâ€™s", "<b>"]),
    )
).map("".join)


@settings(max_examples=300)
@given(mixed)
def test_words_are_those_of_datatrove(text: str) -> None:
    from datatrove.utils.text import simplify_text

    from stages.steps.grams import WORD, words

    assert [word.decode() for word in words(text)] == WORD.findall(simplify_text(text))


@settings(max_examples=300)
@given(mixed)
def test_text_is_repaired_by_ftfy_unless_it_would_change_nothing(text: str) -> None:
    from datatrove.pipeline.formatters.ftfy import FTFYFormatter

    from stages.steps.clean import NormaliseText

    assert NormaliseText(Normalise(unicode=None, whitespace=False)).normalise(text) == FTFYFormatter().format(text)


numbers = st.one_of(st.integers(), st.integers(2**62, 2**70), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_scratch_and_outputs_are_the_json_that_python_writes(meta: dict[str, Any]) -> None:
    from stages.files import canonical
    from stages.steps.rows import decode, encode, publishable
    from stages.steps.sources import parse

    found = {**row("a", "text"), "source": "rows", "meta": meta}
    line = canonical(found, indent=None).encode()
    assert publishable(found) == publishable(parse(line)) == publishable(decode(encode(found))) == line


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "[" * 5000])
def test_what_is_no_json_is_refused(number: str) -> None:
    from stages.steps.sources import parse

    with pytest.raises(ValueError, match=r"is no JSON|too large a number|nested too deeply"):
        parse(f'{{"id": "a", "meta": {{"a": {number}}}}}\n'.encode())


@pytest.mark.parametrize(
    "template",
    [
        "{{ text }}",
        "Q: {{ text }}\n",
        "{{ label }}\n{{ completion }}",
        "{% if label %}{{ label }}{% endif %}",
        "{{ text | upper }}",
        "{{ meta.a }} {{ id }}",
        "a {# b #} c",
    ],
)
def test_plain_templates_are_filled_in_as_jinja_does(template: str, tmp_path: Path) -> None:
    from conf.schema import Chat, Pii
    from stages.steps.chat import FormatChat, compile_template
    from stages.steps.rows import Dropped

    record = {**row("a", "what <is> {{ it }}?\n", meta={"a": 1}), "source": "rows"}
    step = FormatChat(Chat(prompt=template), Dropped(tmp_path, "chat", Pii()))
    assert step.render("prompt", record) == compile_template(template, "prompt").render(record)


# ---------------------------------------------------------------- near duplicates


@given(st.lists(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 2))
def test_signatures_are_those_of_datatrove(texts: list[list[int]], seed: int) -> None:
    import numpy as np
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    from stages.steps.deduplicate import factors, signatures

    chosen = MinHash(buckets=3, hashes_per_bucket=2)
    step = MinhashDedupSignature("signatures", MinhashConfig(5, 3, 2, seed=seed, hash_config=HashConfig(hash_fc="sha1")), language=WhitespaceTokenizer())
    theirs = [list(chain.from_iterable(step.get_signature(np.array(text, dtype=np.uint64).reshape(-1, 1)))) for text in texts]
    ours = signatures(np.array(list(chain.from_iterable(texts)), dtype=np.uint64), np.array(list(map(len, texts))), *factors(chosen, seed))
    assert ours.T.tolist() == theirs


def test_signatures_are_remainders_at_the_edges_too() -> None:
    import numpy as np

    from stages.steps.deduplicate import PRIME, signatures

    edges = np.array([0, 1, 2**61 - 2, 2**61 - 1, 2**61, 2**62 - 3, 2**62 - 2, 2**63, 2**64 - 1], dtype=np.uint64)
    found = signatures(edges, np.ones(len(edges), dtype=np.int64), np.ones(1, dtype=np.uint64), np.zeros(1, dtype=np.uint64))
    assert found[0].tolist() == [int(edge) % int(PRIME) for edge in edges]


@pytest.mark.parametrize("held", [2_000_000, 7])
def test_near_duplicates_are_the_clusters_of_datatrove(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own three passes over the same texts, against the list that this stage makes."""
    import struct

    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    from stages.steps import deduplicate
    from stages.steps.grams import sha1_hashes, words

    class Signatures(MinhashDedupSignature):
        def get_shingles(self, text: str) -> np.ndarray:
            return sha1_hashes([words(text)], 3)[0].reshape(-1, 1)

    monkeypatch.setattr(deduplicate, "HELD", held)
    rows = sorted(
        (row(f"{i:04d}", ("", "Hello, ", "Well then ")[i % 3] + sentence(i % 90) + (" thanks" if i % 7 == 0 else "")) for i in range(240)),
        key=lambda r: r["id"],
    )
    collect(rows=("train", rows))
    run(deduplicate={"exact": False, "minhash": {"ngram": 3, "buckets": 6, "hashes_per_bucket": 3}}, decontaminate=None, shards=3)
    config = MinhashConfig(3, 6, 3, hash_config=HashConfig(hash_fc="sha1"))
    signed, pairs, clusters = (str(tmp_path / name) for name in ("signatures", "pairs", "clusters"))  # fsspec remembers what a relative path once meant
    Signatures(signed, config, language=WhitespaceTokenizer()).run(Document(text=r["text"], id=r["id"]) for r in rows)
    for bucket in range(6):
        MinhashDedupBuckets(signed, pairs, config=config).run(None, bucket, 6)
    MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True).run(None)
    first: dict[int, int] = {}
    theirs = {}
    for index, cluster in struct.iter_unpack("<II", Path("clusters/000000.clusters").read_bytes()):
        if (kept := first.setdefault(cluster, index)) != index:
            theirs[rows[index]["id"]] = f"duplicate:near of rows/{rows[kept]['id']}"
    assert len(theirs) > 100
    assert reasons() == theirs


@given(st.lists(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=6), max_size=6), st.integers(1, 4))
def test_sums_tell_ngrams_apart_as_their_words_do(texts: list[list[bytes]], size: int) -> None:
    from stages.steps.grams import WordHashes, grams, sum_hashes

    hashes, counts = sum_hashes(texts, size, WordHashes())
    each = [grams(tokens, size) for tokens in texts]
    assert counts.tolist() == list(map(len, each))
    seen = dict(zip([gram for some in each for gram in some], hashes.tolist(), strict=True))
    assert len(set(seen.values())) == len(seen)
    assert [seen[gram] for some in each for gram in some] == hashes.tolist()


def test_limits_name_themselves() -> None:
    from stages.steps.clean import broken_limit

    assert broken_limit("fine words here", Filters()) is None
    assert broken_limit("", Filters()) == "min_chars"


# ---------------------------------------------------------------- executors


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5", " "])
def test_a_wrong_number_of_workers_is_named(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_WORKERS", workers)
    collect(rows=("train", FILLER))
    with pytest.raises(ConfigError, match=f"TRUNKLINE_WORKERS='{workers}' is no number of processes"):
        run()


def test_the_machine_says_how_many_workers_and_else_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.steps.executors import worker_count

    assert worker_count(Preprocess(workers=3)) == 3
    monkeypatch.setenv("TRUNKLINE_WORKERS", "2")
    assert worker_count(Preprocess(workers=3)) == 2


class Die(PipelineStep):
    """Ends its process as the kernel does when memory runs out, in one task of three."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from ()


class Fill(PipelineStep):
    """Writes where no space is left."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from stages.steps.rows import Runs

        runs = Runs(Path(), "full")
        runs.add("a", b"a" * 100_000)
        runs.close()
        yield from ()


class Sleep(PipelineStep):
    """Says who it is, and takes its time."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        Path(f"{rank}.pid").write_text(str(os.getpid()))
        time.sleep(300)
        yield from ()


def test_a_killed_worker_is_told_and_not_waited_for(tmp_path: Path) -> None:
    from stages.steps.executors import execute

    with pytest.raises(DataError, match=r"a worker process was killed in the pass `clean`\n.*memory"):
        execute([Die()], 3, Preprocess(workers=2), tmp_path / "clean")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_in_a_worker_is_what_the_stage_hears_of(tmp_path: Path) -> None:
    from stages.steps.executors import execute

    (tmp_path / "full-000000.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as error:
        execute([Fill()], 2, Preprocess(workers=2), tmp_path / "clean")
    assert error.value.errno == 28


def alive(pid: int) -> bool:
    """Whether a process runs (one that nobody has waited for yet does not)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes through /proc")
def test_workers_end_with_the_stage(tmp_path: Path) -> None:
    code = "from pathlib import Path; from conf.schema import Preprocess; from stages.steps.executors import execute; from tests.test_preprocess import Sleep\n"
    code += "if __name__ == '__main__': execute([Sleep()], 2, Preprocess(workers=2), Path('sleep'))"
    Path("sleeper.py").write_text(code)
    stage = subprocess.Popen([sys.executable, "sleeper.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while len(pids := [path for path in Path().glob("*.pid") if path.read_text()]) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    workers = [int(path.read_text()) for path in pids]
    assert len(workers) == 2 and all(map(alive, workers))
    stage.kill()
    stage.wait()
    until = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_slurm_is_made_from_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stages.steps import executors
    from stages.steps.parts import ReadPart

    chosen = Preprocess(executor="slurm", slurm=Slurm(partition="cpu", time="02:00:00", qos="low", memory_gb=8), workers=2, shards=4)
    if shutil.which("sbatch") is None:
        with pytest.raises(ConfigError, match="sbatch"):
            executors.make([ReadPart(tmp_path)], 4, chosen, tmp_path / "logs")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    made = executors.make([ReadPart(tmp_path)], 4, chosen, tmp_path / "logs/clean")
    options = made.get_sbatch_args(4)  # type: ignore[attr-defined]
    assert (options["partition"], options["time"], options["qos"], options["mem-per-cpu"], options["array"]) == ("cpu", "02:00:00", "low", "8G", "0-3%2")


def test_ray_says_what_to_install_or_is_made(tmp_path: Path) -> None:
    from importlib.util import find_spec

    from stages.steps import executors
    from stages.steps.parts import ReadPart

    chosen = Preprocess(executor="ray", workers=2, shards=4)
    if find_spec("ray") is None:
        with pytest.raises(ConfigError, match=r"pip install 'ray\[default\]'"):
            executors.make([ReadPart(tmp_path)], 4, chosen, tmp_path / "logs")
    else:
        assert executors.make([ReadPart(tmp_path)], 4, chosen, tmp_path / "logs").world_size == 4


def test_a_slurm_job_that_leaves_the_queue_undone_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stages.steps import executors
    from stages.steps.parts import ReadPart

    bin = tmp_path / "bin"
    bin.mkdir()
    for command, output in (("sbatch", "Submitted batch job 7"), ("squeue", "")):
        (bin / command).write_text(f"#!/bin/sh\necho '{output}'\n")
        (bin / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.0)
    chosen = Preprocess(executor="slurm", slurm=Slurm(partition="cpu"), shards=2)
    with pytest.raises(DataError, match="2 of 2 tasks of clean failed"):
        executors.execute([ReadPart(tmp_path)], 2, chosen, tmp_path / "logs/clean")
